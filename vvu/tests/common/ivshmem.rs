//! QEMU's `ivshmem-doorbell` as far as a server and a guest see it. What would crash QEMU fails the test.
#![allow(dead_code, unreachable_pub, reason = "each test target uses its own part of this")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// Value of the device's `vectors` property.
pub const VECTORS: usize = 2;
/// Eventfds of all peers together. KVM takes about 1000, which other devices need, too.
const EVENTFDS_MAX: usize = 256;

/// The device, once its server has greeted it.
#[derive(Debug)]
pub struct Ivshmem {
    socket: UnixStream,
    greeting: usize,
    page: Option<File>,
    peers: BTreeMap<i64, Vec<OwnedFd>>,
    gone: BTreeSet<i64>,
}

impl Ivshmem {
    /// A device that waits for its server on `socket`.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, greeting: 0, page: None, peers: BTreeMap::new(), gone: BTreeSet::new() }
    }

    /// Connects to the server again, on `socket`, as QEMU does whose chardev has `reconnect`: the device keeps its page
    /// and its peers.
    pub fn reconnect(&mut self, socket: UnixStream) {
        (self.socket, self.greeting) = (socket, 0);
    }

    /// Sends `bytes`, which QEMU never does.
    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("write");
    }

    /// Handles the next message; false if none is there.
    pub fn handle_one(&mut self) -> bool {
        let mut bytes = [0; 8];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Err(Errno::AGAIN) => return false,
            Ok(received) if received.bytes == 0 => return false,
            Err(Errno::CONNRESET) => return false,
            received => assert_eq!(received.expect("a message").bytes, 8),
        }
        let mut fds: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        assert!(fds.len() <= 1, "more than one file descriptor with a message");
        self.handle(i64::from_le_bytes(bytes), fds.pop());
        true
    }

    fn handle(&mut self, number: i64, fd: Option<OwnedFd>) {
        self.greeting += 1;
        match (self.greeting, number, fd) {
            (1, version, None) => assert_eq!(version, 0, "the protocol's version"),
            (2, own, None) => assert_eq!(own, 0, "the device's own number"),
            (3, -1, Some(page)) => {
                let page = File::from(page);
                assert!(page.metadata().expect("metadata").len().is_power_of_two());
                // QEMU takes no second one.
                self.page.get_or_insert(page);
            }
            (4.., 1..0x8000, fd) => self.handle_peer(number, fd),
            (at, number, fd) => panic!("message {at} is {number} with {fd:?}"),
        }
    }

    fn handle_peer(&mut self, id: i64, fd: Option<OwnedFd>) {
        let Some(fd) = fd else {
            assert!(self.peers.remove(&id).is_some(), "peer {id} is not connected");
            assert!(self.gone.insert(id));
            return;
        };
        assert!(!self.gone.contains(&id), "peer {id} is used again");
        let vectors = self.peers.entry(id).or_default();
        assert!(vectors.len() < VECTORS, "peer {id} has more vectors than the device");
        vectors.push(fd);
        assert!(self.eventfds() <= EVENTFDS_MAX, "more eventfds than KVM takes");
    }

    /// Handles all messages that are there; false if the server hung up.
    pub fn handle_all(&mut self) -> bool {
        while self.handle_one() {}
        let mut byte = [0];
        let mut parts = [IoSliceMut::new(&mut byte)];
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        let look = recvmsg(&self.socket, &mut parts, &mut RecvAncillaryBuffer::default(), flags);
        // A message may have come since.
        matches!(look, Err(Errno::AGAIN)) || look.is_ok_and(|message| message.bytes > 0)
    }

    /// Returns whether the server has sent all that QEMU waits for.
    pub fn is_ready(&self) -> bool {
        self.page.is_some()
    }

    /// Returns the peers that are connected, and all that ever were.
    pub fn peers(&self) -> (Vec<i64>, usize) {
        (self.peers.keys().copied().collect(), self.peers.len() + self.gone.len())
    }

    /// Returns the number of eventfds of all peers.
    pub fn eventfds(&self) -> usize {
        self.peers.values().map(Vec::len).sum()
    }

    /// The guest writes to the doorbell register.
    pub fn ring(&self, value: u32) {
        let vector = usize::try_from(value & 0xff).expect("a byte");
        if let Some(eventfd) = self.peers.get(&i64::from(value >> 16)).and_then(|peer| peer.get(vector)) {
            // Only EAGAIN is left: the eventfd is signalled already.
            let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
        }
    }

    /// The guest reads shared memory, zeroes before there is any.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(page) = &self.page {
            page.read_exact_at(data, offset).expect("inside the page");
        }
    }

    /// The guest writes to shared memory.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let Some(page) = &self.page {
            page.write_all_at(data, offset).expect("inside the page");
        }
    }
}
