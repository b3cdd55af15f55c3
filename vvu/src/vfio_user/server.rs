//! Serves a PCI function to an unpatched VMM: a vfio-user server, one client at a time.
//!
//! [`Server`] is the loop, `commands` answers one message, [`VmmHost`] is what the client lends the function: memory
//! for DMA ([`DmaSpace`]) and the eventfds of its MSI-X vectors.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};

use crate::durable::{Adopted, RestoreError, SocketSlot, Store, hold_until_commit};
use crate::event::{EventFlags, EventSet, Ready, StopToken, Token};
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
    /// The function is of no use any more, for this reason.
    #[error("{0}")]
    Function(String),
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
    stop: StopToken,
    /// The device's; beside its own events, it has the stop, the client, and the listener while there is no client.
    events: EventSet,
    kept: Option<Kept>,
}

/// What makes a server outlive its process.
#[derive(Debug)]
struct Kept {
    store: Store,
    /// The descriptors that a predecessor has left, until they are taken over.
    left: Option<Adopted>,
}

// What the server itself waits for.
const STOP: u32 = 0;
const LISTENER: u32 = 1;
const CLIENT: u32 = 2;

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
        let events = device.events().clone();
        events.add(&stop, Token::Host(STOP), EventFlags::IN)?;
        let server = Self { listener, stop, events, kept: None };
        server.watch_listener()?;
        Ok(server)
    }

    fn watch_listener(&self) -> Result<(), Errno> {
        self.events.add(&self.listener, Token::Host(LISTENER), EventFlags::IN)
    }

    fn watch_socket(&self, socket: &MessageSocket) -> Result<(), Errno> {
        self.events.add(socket, Token::Host(CLIENT), EventFlags::IN)
    }

    /// Commits the state to `store` after each event, and first takes over what a predecessor has saved there; `left` are
    /// the descriptors that it left.
    #[doc(hidden)]
    #[must_use]
    pub fn with_store(mut self, store: Store, left: Adopted) -> Self {
        self.kept = Some(Kept { store, left: Some(left) });
        self
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

impl Drop for Server {
    fn drop(&mut self) {
        // The device's set outlives the server. The listener is not in it while there is a client.
        let _ = self.events.remove(&self.listener);
        let _ = self.events.remove(&self.stop);
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
        let mut ready = Ready::new();
        loop {
            self.wait(&mut ready)?;
            // What the host does may change what the function waits for.
            if !ready.function.is_empty() {
                self.device.process(&self.host, &ready.function);
                self.settle()?;
            }
            for source in &ready.host {
                match *source {
                    STOP => return Ok(()),
                    LISTENER if self.client.is_none() => self.accept()?,
                    CLIENT => self.step()?,
                    _ => {}
                }
                self.settle()?;
            }
            if let Some(reason) = self.device.failure() {
                return Err(ServerError::Function(reason.to_owned()));
            }
        }
    }

    /// Ends the treatment of an event.
    fn settle(&mut self) -> Result<(), ServerError> {
        self.commit()?;
        self.watch_client()
    }

    /// Waits for events, a message that was read already among them.
    fn wait(&mut self, ready: &mut Ready) -> Result<(), ServerError> {
        // The kernel does not announce a message that was read together with the one before.
        let ahead = self.client.as_ref().is_some_and(Client::is_due);
        let pause = self.accept_at.map(|at| at.saturating_duration_since(Instant::now()));
        let time = if ahead { Some(Duration::ZERO) } else { pause };
        let time = time.and_then(|time| Timespec::try_from(time).ok());
        self.server.events.wait(time.as_ref(), ready)?;
        if ahead && !ready.host.contains(&CLIENT) {
            ready.host.push(CLIENT);
        }
        if self.accept_at.is_some_and(|at| Instant::now() >= at) {
            ready.host.push(LISTENER);
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
                    self.server.watch_listener()?;
                }
                return Ok(());
            }
            Err(error) if is_shortage(&error) => {
                // The listener stays readable, so it must not be waited for meanwhile.
                if self.accept_at.replace(Instant::now() + ACCEPT_PAUSE).is_none() {
                    log::warn!(
                        "cannot accept a vfio-user client yet: {error}; trying again until it is possible"
                    );
                    self.server.events.remove(&self.server.listener)?;
                }
                return Ok(());
            }
            Err(error) => return Err(ServerError::Accept(error)),
        };
        log::info!("a vfio-user client connected");
        if self.accept_at.take().is_none() {
            self.server.events.remove(&self.server.listener)?;
        }
        self.serve_client(stream)
    }

    fn serve_client(&mut self, stream: UnixStream) -> Result<(), ServerError> {
        let ledger = self.server.kept.as_ref().map(|kept| kept.store.ledger(SocketSlot::Client));
        let socket = MessageSocket::with_ledger(OwnedFd::from(stream), ledger);
        let client =
            Client { socket, commands: CommandHandler::default(), refusals: 0, waits_for_room: false };
        self.server.watch_socket(&client.socket)?;
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
            self.server.events.remove(&client.socket)?;
            // It fails if the client has left already.
            let _ = shutdown(&client.socket, Shutdown::Both);
            self.client = None;
            self.device.reset();
            self.host = VmmHost::new(self.device.vector_count());
            self.server.watch_listener()?;
        }
        Ok(())
    }

    /// Waits for messages of the client, or until it takes its reply.
    fn watch_client(&mut self) -> Result<(), ServerError> {
        let Some(client) = &mut self.client else { return Ok(()) };
        let is_congested = client.socket.is_congested();
        if std::mem::replace(&mut client.waits_for_room, is_congested) != is_congested {
            let interest = if is_congested { EventFlags::OUT } else { EventFlags::IN };
            self.server.events.modify(&client.socket, Token::Host(CLIENT), interest)?;
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
