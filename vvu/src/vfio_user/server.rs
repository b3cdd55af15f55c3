//! Serves a PCI function to an unpatched VMM: a vfio-user server, one client at a time.
//!
//! [`Server`] is the loop, `commands` answers one message, [`VmmHost`] is what the client lends the function: memory
//! for DMA ([`DmaSpace`]) and the eventfds of its MSI-X vectors.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};

use crate::durable::{Adopted, RestoreError, SocketSlot, Store, hold_until_commit};
use crate::event::StopToken;
use crate::pci::PciFunction;
use crate::shortage::is_shortage;
use crate::vfio_user::protocol::MessageError;
use crate::vfio_user::protocol::socket::{Message, MessageSocket, SocketError};
use commands::CommandHandler;
pub use dma::{DmaError, DmaSpace};
pub use host::VmmHost;

mod commands;
mod dma;
mod host;
#[cfg(fuzzing)]
pub mod hostile_client;
mod keep;
#[cfg(test)]
mod tests;

/// The server cannot go on. Nothing that a client does is a reason.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Waiting for events failed.
    #[error("cannot wait for events: {0}")]
    Epoll(#[from] Errno),
    /// The listening socket failed.
    #[error("cannot accept a vfio-user client: {0}")]
    Accept(io::Error),
    /// The state for a successor cannot be saved.
    #[error("cannot save the state: {0}")]
    Save(io::Error),
    /// The state of a predecessor cannot be taken over.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

/// A vfio-user server.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    /// Kept, since the poll set has only its descriptor.
    _stop: StopToken,
    /// Waits for the stop, the device, the listener while there is no client, and the client.
    poll: OwnedFd,
    kept: Option<Kept>,
}

/// What makes a server outlive its process.
#[derive(Debug)]
struct Kept {
    store: Store,
    /// The descriptors that a predecessor has left, until they are taken over.
    left: Option<Adopted>,
}

/// Source of an event.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Source {
    Stop,
    Device,
    Listener,
    Client,
}

impl Source {
    const ALL: [Self; 4] = [Self::Stop, Self::Device, Self::Listener, Self::Client];

    fn data(self) -> EventData {
        EventData::new_u64(self as u64)
    }

    fn of(data: EventData) -> Option<Self> {
        Self::ALL.into_iter().find(|source| *source as u64 == data.u64())
    }
}

/// A connected client.
struct Client {
    socket: MessageSocket,
    commands: CommandHandler,
    refusals: u32,
    /// The poll set waits until the client takes more, not until it sends.
    waits_for_room: bool,
}

/// Pause before the next attempt to accept a client when the last one failed for want of a resource.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Refused commands of one client that are logged as warnings.
const LOUD_REFUSALS: u32 = 16;

impl Server {
    /// Makes a server of `device` for the clients of `listener`, which [`stop`](StopToken::stop) ends. All that is waited
    /// for is watched from now on, so that [`serve`](Self::serve) does not fail for a shortage at its start.
    ///
    /// # Errors
    /// When the listener cannot be put into non-blocking mode, or there is no file descriptor or no memory left.
    pub fn new(listener: UnixListener, stop: StopToken, device: &impl PciFunction) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let poll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&poll, &stop, Source::Stop.data(), EventFlags::IN)?;
        epoll::add(&poll, &listener, Source::Listener.data(), EventFlags::IN)?;
        epoll::add(&poll, device.events(), Source::Device.data(), EventFlags::IN)?;
        Ok(Self { listener, _stop: stop, poll, kept: None })
    }

    /// Commits the state to `store` after each event, and first takes over what a predecessor has saved there; `left` are
    /// the descriptors that it left.
    #[doc(hidden)]
    #[must_use]
    pub fn with_store(self, store: Store, left: Adopted) -> Self {
        Self { kept: Some(Kept { store, left: Some(left) }), ..self }
    }

    /// Serves `device`, for which the server was made, to one client after the other until the stop is requested. The
    /// device is reset after each client, and its own events are served all the time.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn serve<D: PciFunction>(self, device: &mut D) -> Result<(), ServerError> {
        let host = VmmHost::new(device.vector_count());
        let mut service = Service { server: self, device, host, client: None, accept_at: None };
        service.take_over()?;
        let result = service.run();
        service.device.reset();
        result
    }
}

/// One call of [`Server::serve`].
struct Service<'s, D> {
    server: Server,
    device: &'s mut D,
    host: VmmHost,
    client: Option<Client>,
    /// When to try to accept a client again, after a shortage.
    accept_at: Option<Instant>,
}

impl<D: PciFunction> Service<'_, D> {
    fn run(&mut self) -> Result<(), ServerError> {
        let mut events = Vec::with_capacity(Source::ALL.len());
        loop {
            self.wait(&mut events)?;
            for event in &events {
                match Source::of(event.data) {
                    Some(Source::Stop) => return Ok(()),
                    Some(Source::Device) => self.device.process(&self.host),
                    Some(Source::Listener) if self.client.is_none() => self.accept()?,
                    Some(Source::Client) => self.step()?,
                    Some(Source::Listener) | None => {}
                }
                self.commit()?;
                self.watch_client()?;
            }
        }
    }

    /// Waits for events, a message that was read already among them.
    fn wait(&mut self, events: &mut Vec<Event>) -> Result<(), ServerError> {
        events.clear();
        // The kernel does not announce a message that was read together with the one before.
        let ahead = self.client.as_ref().is_some_and(Client::is_due);
        let pause = self.accept_at.map(|at| at.saturating_duration_since(Instant::now()));
        let time = if ahead { Some(Duration::ZERO) } else { pause };
        let time = time.and_then(|time| Timespec::try_from(time).ok());
        match epoll::wait(&self.server.poll, spare_capacity(events), time.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let is_client = |event: &Event| matches!(Source::of(event.data), Some(Source::Client));
        if ahead && !events.iter().any(is_client) {
            events.push(Event { flags: EventFlags::IN, data: Source::Client.data() });
        }
        if self.accept_at.is_some_and(|at| Instant::now() >= at) {
            events.push(Event { flags: EventFlags::IN, data: Source::Listener.data() });
        }
        Ok(())
    }

    /// Accepts the next client, if it is still there. Further clients stay in the backlog.
    fn accept(&mut self) -> Result<(), ServerError> {
        use std::io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
        let stream = match self.server.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted) => {
                if self.accept_at.take().is_some() {
                    epoll::add(
                        &self.server.poll,
                        &self.server.listener,
                        Source::Listener.data(),
                        EventFlags::IN,
                    )?;
                }
                return Ok(());
            }
            Err(error) if is_shortage(&error) => {
                // The listener stays readable, so it must not be waited for meanwhile.
                if self.accept_at.replace(Instant::now() + ACCEPT_PAUSE).is_none() {
                    log::warn!(
                        "cannot accept a vfio-user client yet: {error}; trying again until it is possible"
                    );
                    epoll::delete(&self.server.poll, &self.server.listener)?;
                }
                return Ok(());
            }
            Err(error) => return Err(ServerError::Accept(error)),
        };
        log::info!("a vfio-user client connected");
        if self.accept_at.take().is_none() {
            epoll::delete(&self.server.poll, &self.server.listener)?;
        }
        self.serve_client(stream)
    }

    fn serve_client(&mut self, stream: UnixStream) -> Result<(), ServerError> {
        let ledger = self.server.kept.as_ref().map(|kept| kept.store.ledger(SocketSlot::Client));
        let socket = MessageSocket::with_ledger(OwnedFd::from(stream), ledger);
        let client =
            Client { socket, commands: CommandHandler::default(), refusals: 0, waits_for_room: false };
        epoll::add(&self.server.poll, &client.socket, Source::Client.data(), EventFlags::IN)?;
        self.client = Some(client);
        Ok(())
    }

    /// Goes on with the client, if there is one, and makes room for the next when it is gone.
    fn step(&mut self) -> Result<(), ServerError> {
        let Some(client) = &mut self.client else { return Ok(()) };
        if let Err(error) = client.step(&mut self.host, self.device) {
            match error {
                SocketError::Closed => log::info!("the vfio-user client disconnected"),
                error => log::error!("disconnecting the vfio-user client: {error}"),
            }
            // A descriptor that is still open elsewhere stays in the poll set when it is closed here.
            epoll::delete(&self.server.poll, &client.socket)?;
            // It fails if the client has left already.
            let _ = shutdown(&client.socket, Shutdown::Both);
            self.client = None;
            self.device.reset();
            self.host = VmmHost::new(self.device.vector_count());
            epoll::add(&self.server.poll, &self.server.listener, Source::Listener.data(), EventFlags::IN)?;
        }
        Ok(())
    }

    /// Waits for messages of the client, or until it takes its reply.
    fn watch_client(&mut self) -> Result<(), ServerError> {
        let Some(client) = &mut self.client else { return Ok(()) };
        let is_congested = client.socket.is_congested();
        if std::mem::replace(&mut client.waits_for_room, is_congested) != is_congested {
            let interest = if is_congested { EventFlags::OUT } else { EventFlags::IN };
            epoll::modify(&self.server.poll, client.socket.as_fd(), Source::Client.data(), interest)?;
        }
        Ok(())
    }
}

impl Client {
    /// Returns whether there may be a message that was read already.
    fn is_due(&self) -> bool {
        self.socket.has_read_ahead() && !self.socket.is_congested()
    }

    /// Goes on with the reply that the client has yet to take, or else with its next message. At most one reply waits,
    /// since no message is read from a client that does not take its reply.
    fn step<D: PciFunction>(&mut self, host: &mut VmmHost, device: &mut D) -> Result<(), SocketError> {
        if self.socket.is_congested() {
            return self.socket.flush();
        }
        let Some(message) = self.socket.receive()? else { return Ok(()) };
        let header = message.header;
        if header.is_reply() {
            drop(hold_until_commit(message));
            return Err(SocketError::Message(MessageError::Type { got: 1 }));
        }
        let answer = self.commands.answer(message, host, device);
        if let Err(refusal) = &answer {
            let loud = self.refusals < LOUD_REFUSALS && !refusal.is_expected();
            let level = if loud { log::Level::Warn } else { log::Level::Debug };
            self.refusals = self.refusals.saturating_add(1);
            log::log!(level, "refused a command of the vfio-user client: {refusal}");
        }
        if !header.wants_reply() {
            return Ok(());
        }
        match answer {
            Ok(answer) => {
                // Header and payload leave in one call: QEMU gives up on a header that comes in parts.
                let reply = Message::new(header.reply(answer.payload.len()), &answer.payload);
                self.socket.send(reply.bytes, answer.fds)
            }
            Err(refusal) => {
                let errno = refusal.errno().raw_os_error().unsigned_abs();
                self.socket.send(Message::new(header.error_reply(errno), &[]).bytes, Vec::new())
            }
        }
    }
}
