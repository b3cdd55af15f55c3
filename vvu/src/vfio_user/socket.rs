//! A vfio-user socket that never blocks: whole messages in, whole messages out, with their file
//! descriptors.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::spec::vfio_user::{FDS_MAX, HEADER_SIZE, Header, MessageError};

/// A complete vfio-user message.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// The bytes after the header.
    pub payload: Vec<u8>,
    /// The file descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

/// Why a vfio-user socket cannot be used any longer.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The peer closed its end.
    #[error("the peer closed the connection")]
    Closed,
    /// What the peer sent is not a vfio-user message.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// More file descriptors than a message may have.
    #[error("more than {FDS_MAX} file descriptors came with one message")]
    TooManyFds,
    /// The system refused.
    #[error("vfio-user socket: {0}")]
    Io(#[from] Errno),
}

/// A vfio-user socket. Bytes are read exactly up to the end of a message, so that file descriptors
/// cannot be counted to the wrong one.
#[derive(Debug)]
pub struct MessageSocket {
    stream: UnixStream,
    /// The header, then the whole message; as long as is wanted, `filled` bytes of it are there.
    incoming: Vec<u8>,
    filled: usize,
    incoming_fds: Vec<OwnedFd>,
    outgoing: VecDeque<Outgoing>,
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

impl MessageSocket {
    /// Uses a connected stream; whether it is in blocking mode does not matter.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            incoming: vec![0; HEADER_SIZE],
            filled: 0,
            incoming_fds: Vec::new(),
            outgoing: VecDeque::new(),
        }
    }

    /// The next message, or `None` if it is not complete yet.
    ///
    /// # Errors
    /// Any [`SocketError`]; the socket is of no further use.
    pub fn receive(&mut self) -> Result<Option<Message>, SocketError> {
        loop {
            if self.filled == self.incoming.len() {
                let (header, payload) = Header::parse(&self.incoming)?;
                header.check()?;
                if payload.len() == header.payload_size() {
                    let payload = payload.to_vec();
                    let fds = std::mem::take(&mut self.incoming_fds);
                    self.incoming = vec![0; HEADER_SIZE];
                    self.filled = 0;
                    return Ok(Some(Message { header, payload, fds }));
                }
                self.incoming.resize(HEADER_SIZE + header.payload_size(), 0);
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// Reads towards the end of `incoming`; false if nothing is there now.
    fn fill(&mut self) -> Result<bool, SocketError> {
        let missing = &mut self.incoming[self.filled..];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(&self.stream, &mut [IoSliceMut::new(missing)], &mut control, flags) {
            Ok(received) => received,
            Err(Errno::AGAIN) => return Ok(false),
            Err(Errno::INTR) => return Ok(true),
            Err(Errno::CONNRESET) => return Err(SocketError::Closed),
            Err(error) => return Err(error.into()),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.incoming_fds.extend(fds);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || self.incoming_fds.len() > FDS_MAX {
            return Err(SocketError::TooManyFds);
        }
        if received.bytes == 0 {
            return Err(SocketError::Closed);
        }
        self.filled += received.bytes;
        Ok(true)
    }

    /// Sends a message, or keeps what the peer does not take yet for [`flush`](Self::flush). Callers
    /// keep memory bounded by sending only when the socket is not [congested](Self::is_congested).
    ///
    /// # Errors
    /// Any [`SocketError`]; the socket is of no further use.
    pub fn send(&mut self, header: Header, payload: &[u8], fds: Vec<OwnedFd>) -> Result<(), SocketError> {
        // Header and payload leave in one call: QEMU gives up on a header that comes in parts.
        let bytes = [&header.to_bytes()[..], payload].concat();
        self.outgoing.push_back(Outgoing { bytes, sent: 0, fds });
        self.flush()
    }

    /// Sends what was kept, as far as the peer takes it.
    ///
    /// # Errors
    /// Any [`SocketError`]; the socket is of no further use.
    pub fn flush(&mut self) -> Result<(), SocketError> {
        while let Some(message) = self.outgoing.front_mut() {
            let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(SocketError::TooManyFds);
            }
            let rest = [IoSlice::new(&message.bytes[message.sent..])];
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.stream, &rest, &mut control, flags) {
                Ok(sent) => {
                    message.sent += sent;
                    message.fds.clear();
                    if message.sent == message.bytes.len() {
                        self.outgoing.pop_front();
                    }
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(SocketError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Whether the peer has yet to take something that was sent before.
    #[must_use]
    pub fn is_congested(&self) -> bool {
        !self.outgoing.is_empty()
    }
}

impl AsFd for MessageSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
