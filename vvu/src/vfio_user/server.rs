//! Serves a PCI function to an unpatched VMM: a vfio-user server, one client at a time.
//!
//! [`Server`] is the loop, `commands` answers one message, [`VmmHost`] is what the client lends the function: memory
//! for DMA ([`DmaSpace`]) and the eventfds of its MSI-X vectors.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;

use crate::event::StopToken;
use crate::pci::PciFunction;
use crate::vfio_user::protocol::MessageError;
use crate::vfio_user::protocol::socket::{Message, MessageSocket, SocketError};
use commands::CommandHandler;
pub use dma::{DmaError, DmaSpace};
pub use host::VmmHost;

mod commands;
mod dma;
mod host;
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
    Accept(std::io::Error),
}

/// A vfio-user server.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    stop: StopToken,
}

/// What an event is about.
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
}

/// Refused commands of one client that are logged as warnings.
const LOUD_REFUSALS: u32 = 16;

impl Server {
    /// Makes a server for the clients of `listener`, which [`stop`](StopToken::stop) ends.
    ///
    /// # Errors
    /// When the listener cannot be put into non-blocking mode.
    pub fn new(listener: UnixListener, stop: StopToken) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener, stop })
    }

    /// Serves `device` to one client after the other until the stop is requested. The device is reset after each
    /// client, and its own events are served all the time.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn serve<D: PciFunction>(&mut self, device: &mut D) -> Result<(), ServerError> {
        let mut host = VmmHost::new(device.vector_count());
        let result = self.serve_clients(device, &mut host);
        device.reset();
        result
    }

    fn serve_clients<D: PciFunction>(
        &mut self,
        device: &mut D,
        host: &mut VmmHost,
    ) -> Result<(), ServerError> {
        let poll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&poll, &self.stop, Source::Stop.data(), EventFlags::IN)?;
        epoll::add(&poll, device.events(), Source::Device.data(), EventFlags::IN)?;
        epoll::add(&poll, &self.listener, Source::Listener.data(), EventFlags::IN)?;
        let mut client: Option<Client> = None;
        let mut events = Vec::with_capacity(Source::ALL.len());
        loop {
            events.clear();
            // Nobody tells of a message that was read together with the one before.
            let ahead = client.as_ref().is_some_and(Client::is_due);
            match epoll::wait(&poll, spare_capacity(&mut events), ahead.then_some(&Timespec::default())) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let is_client = |event: &Event| matches!(Source::of(event.data), Some(Source::Client));
            if ahead && !events.iter().any(is_client) {
                events.push(Event { flags: EventFlags::IN, data: Source::Client.data() });
            }
            for event in &events {
                match Source::of(event.data) {
                    Some(Source::Stop) => return Ok(()),
                    Some(Source::Device) => device.process(host),
                    Some(Source::Listener) if client.is_none() => {
                        client = self.accept()?;
                        if let Some(client) = &client {
                            // Further clients stay in the backlog.
                            epoll::delete(&poll, &self.listener)?;
                            epoll::add(&poll, &client.socket, Source::Client.data(), EventFlags::IN)?;
                        }
                    }
                    Some(Source::Client) => {
                        let Some(connected) = &mut client else { continue };
                        let was_congested = connected.socket.is_congested();
                        if let Err(error) = connected.step(host, device) {
                            match error {
                                SocketError::Closed => log::info!("the vfio-user client disconnected"),
                                error => log::error!("disconnecting the vfio-user client: {error}"),
                            }
                            // Closing the socket takes it out of the poll set.
                            client = None;
                            device.reset();
                            *host = VmmHost::new(device.vector_count());
                            epoll::add(&poll, &self.listener, Source::Listener.data(), EventFlags::IN)?;
                        } else if connected.socket.is_congested() != was_congested {
                            let interest = if was_congested { EventFlags::IN } else { EventFlags::OUT };
                            epoll::modify(&poll, connected.socket.as_fd(), Source::Client.data(), interest)?;
                        }
                    }
                    Some(Source::Listener) | None => {}
                }
            }
        }
    }

    /// The next client, if it is still there.
    fn accept(&self) -> Result<Option<Client>, ServerError> {
        use std::io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
        match self.listener.accept() {
            Ok((stream, _)) => {
                log::info!("a vfio-user client connected");
                let socket = MessageSocket::new(stream);
                Ok(Some(Client { socket, commands: CommandHandler::default(), refusals: 0 }))
            }
            Err(error) if matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted) => Ok(None),
            Err(error) => Err(ServerError::Accept(error)),
        }
    }
}

impl Client {
    /// Whether there may be a message that needs no further reading.
    fn is_due(&self) -> bool {
        self.socket.has_read_ahead() && !self.socket.is_congested()
    }

    /// Goes on with the reply that the client has yet to take, or else with its next message. A
    /// client that takes no replies is not listened to, so at most one reply waits.
    fn step<D: PciFunction>(&mut self, host: &mut VmmHost, device: &mut D) -> Result<(), SocketError> {
        if self.socket.is_congested() {
            return self.socket.flush();
        }
        let Some(message) = self.socket.receive()? else { return Ok(()) };
        let header = message.header;
        if header.is_reply() {
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
