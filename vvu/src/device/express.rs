//! The server of the express device: gives the device VM's VMM the call eventfds of the front-end, so that the guest
//! signals them without the proxy.
//!
//! The server talks in one direction only and never waits: what the VMM does not take at once stays in a bounded queue,
//! and meanwhile call eventfds get no peer. Whatever goes wrong here, the guest driver still has the doorbells of the vvu
//! device.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use self::peers::{Changes, Limits, Peers};
use self::same_file::is_same_file;
use super::events::Source;
use super::resources::Resources;
use super::vrings::Eventfd;
use crate::durable::{Fd, hold_until_commit};
use crate::event::Event;
use crate::framed_socket::{FramedSocket, Framing, SocketError};
use crate::spec::addr::QueueIndex;
use crate::spec::express::page::{self, Entry, Header};
use crate::spec::express::{PeerId, ServerMessage, VECTORS};

mod keep;
pub(crate) mod peers;
mod same_file;

pub(super) use keep::SavedExpress;

/// The server, for one VMM at a time. Further ones stay in the backlog.
#[derive(Debug)]
pub(super) struct Express {
    listener: UnixListener,
    header: Header,
    /// The page of the last VMM that connected.
    page: Option<SharedPage>,
    peers: Peers<Eventfd>,
    /// Eventfds that the guest signals to confirm a peer.
    confirmations: BTreeMap<PeerId, Fd>,
    vmm: Option<FramedSocket<FromVmm>>,
    /// The user has been told that the numbers of peers are used up.
    exhausted: bool,
}

impl Express {
    /// Makes the server of a vvu device with this `uuid`.
    ///
    /// # Errors
    /// When the kernel has no memory or no file descriptor left, or refuses to poll `listener`.
    pub(super) fn new(listener: UnixListener, uuid: [u8; 16], resources: &Resources) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        resources.events.add(&listener, Source::Express)?;
        let header = Header { queues: resources.queues, uuid };
        Ok(Self {
            listener,
            header,
            page: None,
            peers: Peers::new(header.queues),
            confirmations: BTreeMap::new(),
            vmm: None,
            exhausted: false,
        })
    }

    /// Sets other limits than QEMU's, while there is no VMM.
    pub(super) fn set_limits(&mut self, limits: Limits) {
        self.peers = Peers::with_limits(self.header.queues, limits);
    }

    /// Deals with the VMM: a connection, its end, or room for what it has yet to be told. Returns true if call eventfds
    /// that have no peer can get one now: the caller then sets them again.
    pub(super) fn process(&mut self, resources: &Resources) -> bool {
        let could_connect = self.can_connect();
        if let Some(vmm) = &mut self.vmm {
            // Nothing but the end of the connection comes from a VMM.
            let outcome = vmm.flush().and_then(|()| vmm.receive().map(drop));
            self.keep(resources, outcome);
        }
        if self.vmm.is_none() && !resources.closer.is_full() {
            self.accept(resources);
        }
        !could_connect && self.can_connect()
    }

    fn accept(&mut self, resources: &Resources) {
        match accept_with(&self.listener, SocketFlags::CLOEXEC) {
            Ok(stream) => self.greet(resources, stream.into()),
            Err(Errno::AGAIN) => return,
            Err(error) => {
                log::warn!("cannot accept a VMM for the express device: {error}");
                return resources.events.retry_later();
            }
        }
        if self.vmm.is_none() {
            // The next one may have been in the backlog for long, and so causes no event.
            resources.events.again();
        }
    }

    /// Greets `stream` as a VMM that has connected, after hanging up on the one before.
    #[cfg(fuzzing)]
    pub(super) fn adopt(&mut self, resources: &Resources, stream: UnixStream) {
        self.keep(resources, Err(SocketError::Closed));
        self.greet(resources, stream);
    }

    /// Returns whether the VMM takes messages now.
    fn can_connect(&self) -> bool {
        self.vmm.as_ref().is_some_and(|vmm| !vmm.is_congested())
    }

    /// Sends what QEMU's device waits for when it is made.
    ///
    /// Each connection has a page of its own, since the guest of an earlier one may live on and would take the peers of
    /// this one for its own. Numbers of peers are never given again, since it may be the same QEMU that connects again.
    fn greet(&mut self, resources: &Resources, stream: UnixStream) {
        let Some(shared) = or_warn(SharedPage::new(&self.header)) else { return };
        let Some(page) = or_warn(shared.file.try_clone()) else { return };
        if or_warn(resources.events.add(&stream, Source::Express)).is_none() {
            return;
        }
        let ledger = resources.ledgers.map(|ledgers| ledgers.express);
        let mut vmm = FramedSocket::with_ledger(OwnedFd::from(stream), ledger);
        let greeting = [
            (ServerMessage::Version, vec![]),
            (ServerMessage::OwnId, vec![]),
            (ServerMessage::Page, vec![page.into()]),
        ];
        let outcome =
            greeting.into_iter().try_for_each(|(message, fds)| vmm.send(message.to_bytes().to_vec(), fds));
        log::info!("a VMM connected to the express device");
        drop(hold_until_commit(self.page.replace(shared)));
        self.vmm = Some(vmm);
        self.keep(resources, outcome);
    }

    /// Makes `call` the call eventfd of `queue`, before the guest driver hears of it.
    pub(super) fn set_call(&mut self, resources: &Resources, queue: QueueIndex, call: Option<&Eventfd>) {
        let own = call.and_then(|call| or_warn(call.try_clone()));
        let may_connect = self.can_connect();
        let Changes { disconnect, connect } = self.peers.set_call(queue, own, may_connect, is_same_file);
        let outcome = self.disconnect(resources, disconnect);
        self.keep(resources, outcome);
        // A VMM that could not be told of the disconnection has no peers any more.
        if let (Some(id), Some(call), true) = (connect, call, self.vmm.is_some()) {
            match or_warn(self.vectors(resources, id, call)) {
                Some(vectors) => {
                    let outcome = self.connect(id, vectors);
                    self.keep(resources, outcome);
                }
                None => self.peers.withdraw(id),
            }
        }
        self.publish(queue);
        if may_connect && self.peers.is_exhausted() && !std::mem::replace(&mut self.exhausted, true) {
            log::warn!(
                "the express device is out of peers: the proxy signals new call eventfds itself; start it and both VMs \
                 again when their speed matters"
            );
        }
    }

    /// Makes the eventfds of peer `id`.
    fn vectors(
        &mut self,
        resources: &Resources,
        id: PeerId,
        call: &Eventfd,
    ) -> Result<[OwnedFd; VECTORS], Errno> {
        let call = call.try_clone()?.into();
        let errno = |error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
        let confirmation = Event::new().map_err(errno)?;
        let theirs = confirmation.try_clone().map_err(errno)?.into();
        resources.events.add(&confirmation, Source::Confirmation(id))?;
        self.confirmations.insert(id, OwnedFd::from(confirmation).into());
        Ok([call, theirs])
    }

    fn connect(&mut self, id: PeerId, vectors: [OwnedFd; VECTORS]) -> Result<(), SocketError<Silence>> {
        let Some(vmm) = &mut self.vmm else { return Ok(()) };
        let message = ServerMessage::Peer(id).to_bytes();
        vectors.into_iter().try_for_each(|vector| vmm.send(message.to_vec(), vec![vector]))
    }

    fn disconnect(&mut self, resources: &Resources, peers: Vec<PeerId>) -> Result<(), SocketError<Silence>> {
        for id in peers {
            self.unwatch(resources, id);
            if let Some(vmm) = &mut self.vmm {
                vmm.send(ServerMessage::Peer(id).to_bytes().to_vec(), Vec::new())?;
            }
        }
        Ok(())
    }

    /// The guest signalled the confirmation of peer `id`.
    pub(super) fn confirm(&mut self, resources: &Resources, id: PeerId) {
        self.unwatch(resources, id);
        if let Some(queue) = self.peers.confirm(id) {
            self.publish(queue);
        }
    }

    fn unwatch(&mut self, resources: &Resources, id: PeerId) {
        // The VMM has the eventfd as well, so closing it here is not enough.
        if let Some(confirmation) = self.confirmations.remove(&id) {
            resources.events.remove(&confirmation);
        }
    }

    /// Disconnects all call eventfds: the front-end or the guest driver left.
    pub(super) fn clear(&mut self, resources: &Resources) {
        let ids = self.peers.clear();
        let outcome = self.disconnect(resources, ids);
        self.keep(resources, outcome);
        self.publish_all();
    }

    /// Hangs up after an error. The VMM keeps the peers that it knows, but gets no more.
    fn keep(&mut self, resources: &Resources, outcome: Result<(), SocketError<Silence>>) {
        let Err(error) = outcome else { return };
        match error {
            SocketError::Closed => log::info!("the VMM closed the express device"),
            error => log::warn!("no longer serves the VMM of the express device: {error}"),
        }
        if let Some(vmm) = self.vmm.take() {
            resources.disconnect(vmm);
        }
        for id in self.peers.clear() {
            self.unwatch(resources, id);
        }
        self.publish_all();
    }

    fn publish_all(&self) {
        (0..self.header.queues).for_each(|queue| self.publish(QueueIndex(queue)));
    }

    fn publish(&self, queue: QueueIndex) {
        if let Some(page) = &self.page {
            page.set(queue, self.peers.entry(queue));
        }
    }
}

/// The page that tells the guest which peers there are.
#[derive(Debug)]
struct SharedPage {
    file: File,
    memory: MmapRegion,
}

impl SharedPage {
    fn new(header: &Header) -> io::Result<Self> {
        let file = memfd_create("vvu-express", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, page::SIZE as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let this = Self::open(File::from(file))?;
        let start = this.memory.as_volatile_slice().write_slice(&header.to_bytes(), 0);
        start.map_err(io::Error::other)?;
        Ok(this)
    }

    /// Maps the file of a page.
    fn open(file: File) -> io::Result<Self> {
        let memory = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), page::SIZE);
        let memory = memory.map_err(io::Error::other)?;
        Ok(Self { file, memory })
    }

    fn set(&self, queue: QueueIndex, entry: Entry) {
        let offsets = [Entry::call_offset(queue), Entry::registered_offset(queue)];
        for (value, offset) in entry.to_values().into_iter().zip(offsets) {
            let at = usize::try_from(offset).unwrap_or(page::SIZE);
            let stored = self.memory.as_volatile_slice().store(value.to_le(), at, Ordering::SeqCst);
            // There are fewer queues than the page has entries.
            debug_assert!(stored.is_ok(), "{queue}: {stored:?}");
        }
    }
}

/// A message of a VMM, which has none to send.
#[derive(Clone, Copy, Debug)]
struct FromVmm;

/// A VMM sent something.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the VMM sent a message: want none")]
struct Silence;

impl Framing for FromVmm {
    const SIZE: usize = ServerMessage::SIZE;
    const FDS_MAX: usize = 1;
    type Error = Silence;

    fn from_wire(_: &[u8]) -> Result<Self, Silence> {
        Err(Silence)
    }

    fn append_to(&self, _: &mut Vec<u8>) {}

    fn payload_len(&self) -> usize {
        0
    }
}

/// Returns a result, or `None` with a warning: the guest driver then uses the doorbells of the vvu device.
fn or_warn<T, E: std::fmt::Display>(result: Result<T, E>) -> Option<T> {
    result.inspect_err(|error| log::warn!("a call eventfd does without the express device: {error}")).ok()
}

#[cfg(test)]
#[path = "express_test.rs"]
mod tests;
