//! A non-blocking socket that sends and receives whole messages with their file descriptors. [`Framing`] defines the
//! messages of a protocol.

use std::collections::VecDeque;
use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use serde::{Deserialize, Serialize};

use crate::durable::{Adopted, Fd, Held, Landed, Ledger, RestoreError};

/// Most file descriptors in a message of any protocol.
const FDS_MAX: usize = 32;
/// Most file descriptors that the kernel sends with one call (unix(7), `SCM_MAX_FD`).
const SCM_MAX_FD: usize = 253;

/// The parts of a message header that a socket has to understand.
pub trait Framing: Copy + fmt::Debug {
    /// Size of a header in bytes.
    const SIZE: usize;
    /// Most file descriptors in one message, at most 32.
    const FDS_MAX: usize;
    /// Bytes to read at first, at least [`SIZE`](Self::SIZE). More make a small message one read.
    const FIRST_READ: usize = Self::SIZE;
    /// Error for bytes that are no header a peer may send.
    type Error: std::error::Error;

    /// Checks and reads the [`SIZE`](Self::SIZE) bytes of a header.
    ///
    /// # Errors
    /// [`Framing::Error`], above all for a size larger than that of any message, since that many bytes are allocated.
    fn from_wire(bytes: &[u8]) -> Result<Self, Self::Error>;

    /// Appends the wire form to `bytes`.
    fn append_to(&self, bytes: &mut Vec<u8>);

    /// Bytes that follow the header.
    fn payload_len(&self) -> usize;
}

/// A complete message.
#[derive(Debug)]
pub struct Message<H> {
    /// The header.
    pub header: H,
    /// Header and payload as they are on the wire.
    pub bytes: Vec<u8>,
    /// File descriptors of the message.
    pub fds: Vec<OwnedFd>,
}

impl<H: Framing> Message<H> {
    /// Makes a message with `payload` and without file descriptors.
    #[must_use]
    pub fn new(header: H, payload: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(H::SIZE + payload.len());
        header.append_to(&mut bytes);
        bytes.extend_from_slice(payload);
        Self { header, bytes, fds: Vec::new() }
    }

    /// Returns the bytes after the header.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.bytes[H::SIZE..]
    }

    /// Returns the bytes after the header, to be changed in place.
    #[must_use]
    pub fn payload_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[H::SIZE..]
    }
}

/// A socket cannot be used any longer; `E` is the error of a header.
#[derive(Debug, thiserror::Error)]
pub enum SocketError<E> {
    /// The peer closed its end.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer sent bytes that are no message of the protocol.
    #[error(transparent)]
    Message(E),
    /// The peer sent more file descriptors than a message may have.
    #[error("more than {max} file descriptors came with one message")]
    TooManyFds {
        /// Most file descriptors of a message.
        max: usize,
    },
    /// A system call failed.
    #[error("socket: {0}")]
    Io(#[from] Errno),
}

/// A socket of messages with header `H`.
///
/// A read may go beyond the end of a message, by less than [`Framing::FIRST_READ`] bytes. File descriptors stay with the
/// message that they were sent with: the kernel ends a read behind the bytes that were sent together with file
/// descriptors, so the descriptors of a read belong to the message of its last byte (unix(7), "Ancillary messages").
/// This holds for peers that send a message with one or more calls, and never two messages with one call.
///
/// A socket with a [`Ledger`] outlives its process. It reads at most once for each call of [`receive`](Self::receive), and
/// it sends only when [`flush`](Self::flush) is called, so that its owner can commit before.
#[derive(Debug)]
pub struct FramedSocket<H> {
    stream: Fd,
    incoming: Incoming<H>,
    outgoing: VecDeque<Outgoing>,
    durable: Option<Durable>,
}

/// The ledger of a socket, and the positions that its state is about.
#[derive(Debug)]
struct Durable {
    ledger: Ledger,
    sent: u32,
    received: u32,
    /// The last call of `receive` read a part of a message.
    unfinished: bool,
}

/// The state of a socket as it is saved.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedSocket {
    stream: RawFd,
    sent: u32,
    received: u32,
    bytes: Vec<u8>,
    fds: Vec<RawFd>,
    earlier_fds: usize,
    outgoing: Vec<SavedOutgoing>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedOutgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<RawFd>,
}

/// A message that is being received, and perhaps the beginning of the next.
#[derive(Debug)]
struct Incoming<H> {
    /// The header, once all its bytes are there.
    header: Option<H>,
    /// Space for the bytes wanted, the first `filled` of which are there.
    bytes: Vec<u8>,
    filled: usize,
    fds: Vec<Fd>,
    /// Number of the `fds` that came before the last read.
    earlier_fds: usize,
}

impl<H: Framing> Incoming<H> {
    /// Begins with `bytes`, the rest of the last read, and the `fds` of that read.
    fn new(bytes: &[u8], fds: Vec<Fd>) -> Self {
        let filled = bytes.len();
        let mut all = vec![0; H::FIRST_READ.max(filled)];
        all[..filled].copy_from_slice(bytes);
        Self { header: None, bytes: all, filled, fds, earlier_fds: 0 }
    }

    /// Takes the message, once it is complete.
    fn take(&mut self) -> Result<Option<Message<H>>, SocketError<H::Error>> {
        if self.filled < H::SIZE {
            return Ok(None);
        }
        let header = match self.header {
            Some(header) => header,
            None => H::from_wire(&self.bytes[..H::SIZE]).map_err(SocketError::Message)?,
        };
        self.header = Some(header);
        let size = H::SIZE + header.payload_len();
        if self.filled < size {
            self.bytes.resize(size.max(H::FIRST_READ), 0);
            return Ok(None);
        }
        let rest = &self.bytes[size..self.filled];
        // The descriptors of the last read belong to the message of its last byte.
        let later = if rest.is_empty() { Vec::new() } else { self.fds.split_off(self.earlier_fds) };
        let next = Self::new(rest, later);
        let Self { mut bytes, fds, .. } = std::mem::replace(self, next);
        bytes.truncate(size);
        let fds = fds.into_iter().map(Held::into_inner).collect();
        Ok(Some(Message { header, bytes, fds }))
    }

    /// Adds what was read last.
    fn add(&mut self, bytes: &[u8], fds: impl IntoIterator<Item = Fd>) {
        self.earlier_fds = self.fds.len();
        self.fds.extend(fds);
        let end = self.filled + bytes.len();
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes[self.filled..end].copy_from_slice(bytes);
        self.filled = end;
    }
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<Fd>,
}

fn too_many_fds<H: Framing>() -> SocketError<H::Error> {
    SocketError::TooManyFds { max: H::FDS_MAX }
}

impl<H: Framing> FramedSocket<H> {
    /// Uses a connected stream, in blocking mode or not.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self::with_ledger(stream, None)
    }

    /// Uses a connected stream whose state is kept in `ledger`, if there is one.
    #[must_use]
    pub fn with_ledger(stream: impl Into<Fd>, ledger: Option<Ledger>) -> Self {
        let durable = ledger.map(|ledger| {
            let (sent, received) = ledger.unused_positions();
            Durable { ledger, sent, received, unfinished: false }
        });
        let incoming = Incoming::new(&[], Vec::new());
        Self { stream: stream.into(), incoming, outgoing: VecDeque::new(), durable }
    }

    /// Returns the state, or `None` for a socket without a ledger.
    #[must_use]
    pub fn save(&self) -> Option<SavedSocket> {
        let Durable { sent, received, .. } = *self.durable.as_ref()?;
        let Incoming { bytes, filled, fds, earlier_fds, .. } = &self.incoming;
        let numbers = |fds: &[Fd]| fds.iter().map(Fd::number).collect::<Vec<_>>();
        let outgoing = self.outgoing.iter().map(|message| SavedOutgoing {
            bytes: message.bytes.clone(),
            sent: message.sent,
            fds: numbers(&message.fds),
        });
        Some(SavedSocket {
            stream: self.stream.number(),
            sent,
            received,
            bytes: bytes[..*filled].to_vec(),
            fds: numbers(fds),
            earlier_fds: *earlier_fds,
            outgoing: outgoing.collect(),
        })
    }

    /// Restores a socket: the state that was saved last, and what the kernel did since.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn restore(saved: SavedSocket, ledger: Ledger, left: &mut Adopted) -> Result<Self, RestoreError> {
        let mut adopt_all =
            |numbers: Vec<RawFd>| numbers.into_iter().map(|fd| left.adopt(fd)).collect::<Result<Vec<_>, _>>();
        let mut incoming = Incoming::new(&saved.bytes, adopt_all(saved.fds)?);
        incoming.earlier_fds = saved.earlier_fds.min(incoming.fds.len());
        let Landed { bytes, fds, .. } = ledger.landed(saved.received);
        if !bytes.is_empty() {
            incoming.add(&bytes, adopt_all(fds)?);
        }
        let mut since = ledger.sent_since(saved.sent);
        let sent = saved.sent.wrapping_add(position(since));
        let mut outgoing = VecDeque::new();
        for SavedOutgoing { bytes, sent, fds } in saved.outgoing {
            let now = since.min(bytes.len().saturating_sub(sent));
            since -= now;
            let sent = sent + now;
            // Descriptors leave with the first byte, and are closed then.
            let fds = if sent == 0 { adopt_all(fds)? } else { Vec::new() };
            if sent < bytes.len() {
                outgoing.push_back(Outgoing { bytes, sent, fds });
            }
        }
        let received = saved.received.wrapping_add(position(bytes.len()));
        let durable = Some(Durable { ledger, sent, received, unfinished: false });
        Ok(Self { stream: left.adopt(saved.stream)?, incoming, outgoing, durable })
    }

    /// Whether the last call of [`receive`](Self::receive) read a part of a message, after which there may be more to read.
    /// Only a socket with a ledger stops there.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        self.durable.as_ref().is_some_and(|durable| durable.unfinished)
    }

    /// Receives the next message; `None` if it is not complete yet.
    ///
    /// # Errors
    /// Any [`SocketError`]; the socket is of no further use.
    pub fn receive(&mut self) -> Result<Option<Message<H>>, SocketError<H::Error>> {
        if self.durable.is_some() {
            return self.receive_durably();
        }
        loop {
            if let Some(message) = self.incoming.take()? {
                return Ok(Some(message));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// As [`receive`](Self::receive), with at most one read: the next one needs the room of its notes.
    fn receive_durably(&mut self) -> Result<Option<Message<H>>, SocketError<H::Error>> {
        let Some(durable) = &mut self.durable else { return Ok(None) };
        durable.unfinished = false;
        if let Some(message) = self.incoming.take()? {
            return Ok(Some(message));
        }
        let room = self.incoming.bytes.len() - self.incoming.filled;
        let mut landed = match durable.ledger.receive(&self.stream, durable.received, room) {
            Ok(landed) => landed,
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::INTR) => {
                durable.unfinished = true;
                return Ok(None);
            }
            Err(Errno::CONNRESET) => return Err(SocketError::Closed),
            Err(error) => return Err(SocketError::Io(error)),
        };
        durable.received = durable.received.wrapping_add(position(landed.bytes.len()));
        let fds: Vec<_> = landed.take_fds().into_iter().map(Fd::from).collect();
        self.incoming.add(&landed.bytes, fds);
        if landed.truncated || self.incoming.fds.len() > H::FDS_MAX {
            return Err(too_many_fds::<H>());
        }
        if landed.bytes.is_empty() {
            return Err(SocketError::Closed);
        }
        let message = self.incoming.take()?;
        durable.unfinished = message.is_none();
        Ok(message)
    }

    /// Returns whether [`receive`](Self::receive) may have a message of bytes that were read already: the socket does not
    /// become readable for it.
    #[must_use]
    pub fn has_read_ahead(&self) -> bool {
        self.incoming.header.is_none() && self.incoming.filled >= H::SIZE
    }

    /// Reads some of the bytes wanted; false if none are there now.
    fn fill(&mut self) -> Result<bool, SocketError<H::Error>> {
        let Incoming { bytes, filled, fds, earlier_fds, .. } = &mut self.incoming;
        *earlier_fds = fds.len();
        // With room for all that a peer can send, the kernel has none to close, which can block.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_MAX_FD))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut missing = [IoSliceMut::new(&mut bytes[*filled..])];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(&self.stream, &mut missing, &mut control, flags) {
            Ok(received) => received,
            Err(Errno::AGAIN) => return Ok(false),
            Err(Errno::INTR) => return Ok(true),
            Err(Errno::CONNRESET) => return Err(SocketError::Closed),
            Err(error) => return Err(SocketError::Io(error)),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received.map(Fd::from));
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > H::FDS_MAX {
            return Err(too_many_fds::<H>());
        }
        if received.bytes == 0 {
            return Err(SocketError::Closed);
        }
        *filled += received.bytes;
        Ok(true)
    }

    /// Sends a message, and keeps the part that the peer does not take yet for [`flush`](Self::flush); a socket with a ledger
    /// keeps all of it. Callers keep memory bounded by sending only when the socket is not
    /// [congested](Self::is_congested).
    ///
    /// # Errors
    /// Any [`SocketError`]; the socket is of no further use.
    pub fn send(&mut self, bytes: Vec<u8>, fds: Vec<OwnedFd>) -> Result<(), SocketError<H::Error>> {
        let fds = fds.into_iter().map(Fd::from).collect();
        self.outgoing.push_back(Outgoing { bytes, sent: 0, fds });
        if self.durable.is_some() { Ok(()) } else { self.flush() }
    }

    /// Sends the parts that were kept, as far as the peer takes them.
    ///
    /// # Errors
    /// Any [`SocketError`]; the socket is of no further use.
    pub fn flush(&mut self) -> Result<(), SocketError<H::Error>> {
        while let Some(message) = self.outgoing.front_mut() {
            let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
            let rest = &message.bytes[message.sent..];
            let result = match &self.durable {
                Some(durable) => durable.ledger.send(&self.stream, durable.sent, rest, &fds),
                None => Self::send_now(&self.stream, rest, &fds)?,
            };
            match result {
                Ok(sent) => {
                    message.sent += sent;
                    if let Some(durable) = &mut self.durable {
                        durable.sent = durable.sent.wrapping_add(position(sent));
                    }
                    message.fds.clear();
                    if message.sent == message.bytes.len() {
                        self.outgoing.pop_front();
                    }
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(SocketError::Closed),
                Err(error) => return Err(SocketError::Io(error)),
            }
        }
        Ok(())
    }

    /// Makes one call; the inner result is that of the call.
    fn send_now(
        stream: &Fd,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Result<usize, Errno>, SocketError<H::Error>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(too_many_fds::<H>());
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags))
    }

    /// Returns whether the peer has yet to take a part of a message.
    #[must_use]
    pub fn is_congested(&self) -> bool {
        !self.outgoing.is_empty()
    }
}

/// A number of bytes as positions count them.
#[expect(clippy::cast_possible_truncation, reason = "positions are numbers modulo 2^32")]
fn position(bytes: usize) -> u32 {
    bytes as u32
}

impl<H: Framing> AsFd for FramedSocket<H> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
