//! A vhost-user socket that never blocks: whole messages in, whole messages out, with their file
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

use crate::spec::vhost_user::{HEADER_SIZE, Header, MESSAGE_SIZE_MAX, MessageError, REGIONS_MAX};

/// A complete vhost-user message.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// Header and payload as they are on the wire.
    pub bytes: Vec<u8>,
    /// The file descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// A message that carries `payload` and no file descriptor.
    #[must_use]
    pub fn new(header: Header, payload: &[u8]) -> Self {
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend_from_slice(payload);
        Self { header, bytes, fds: Vec::new() }
    }

    /// The bytes after the header.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.bytes[HEADER_SIZE..]
    }

    /// The bytes after the header, for rewriting in place.
    #[must_use]
    pub fn payload_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[HEADER_SIZE..]
    }
}

/// Why a vhost-user socket cannot be used any longer.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The peer closed its end.
    #[error("the peer closed the connection")]
    Closed,
    /// What the peer sent is not a vhost-user message.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// More file descriptors than any message has.
    #[error("more than {REGIONS_MAX} file descriptors came with one message")]
    TooManyFds,
    /// The system refused.
    #[error("vhost-user socket: {0}")]
    Io(#[from] Errno),
}

/// A vhost-user socket. Bytes are read exactly up to the end of a message, so that file descriptors
/// cannot be counted to the wrong one.
#[derive(Debug)]
pub struct MessageSocket {
    stream: UnixStream,
    incoming: Vec<u8>,
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
            incoming: Vec::with_capacity(HEADER_SIZE),
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
            let wanted = if self.incoming.len() < HEADER_SIZE {
                HEADER_SIZE
            } else {
                let header = Header::parse(&self.incoming)?;
                let wanted = HEADER_SIZE + header.payload_size();
                if self.incoming.len() == wanted {
                    let bytes = std::mem::take(&mut self.incoming);
                    let fds = std::mem::take(&mut self.incoming_fds);
                    return Ok(Some(Message { header, bytes, fds }));
                }
                wanted
            };
            if !self.fill(wanted)? {
                return Ok(None);
            }
        }
    }

    /// Reads towards `wanted` bytes in all; false if none are there now.
    fn fill(&mut self, wanted: usize) -> Result<bool, SocketError> {
        let mut buffer = [0; MESSAGE_SIZE_MAX];
        let missing = &mut buffer[..wanted - self.incoming.len()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(REGIONS_MAX))];
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
        if received.flags.contains(ReturnFlags::CTRUNC) || self.incoming_fds.len() > REGIONS_MAX {
            return Err(SocketError::TooManyFds);
        }
        if received.bytes == 0 {
            return Err(SocketError::Closed);
        }
        self.incoming.extend_from_slice(&buffer[..received.bytes]);
        Ok(true)
    }

    /// Sends a message, or keeps what the peer does not take yet for [`flush`](Self::flush). Callers
    /// keep memory bounded by sending only when the socket is not [congested](Self::is_congested).
    ///
    /// # Errors
    /// Any [`SocketError`]; the socket is of no further use.
    pub fn send(&mut self, bytes: Vec<u8>, fds: Vec<OwnedFd>) -> Result<(), SocketError> {
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
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(REGIONS_MAX))];
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::vhost_user::PAYLOAD_SIZE_MAX;
    use proptest::prelude::*;
    use std::io::Write;

    fn pair() -> (MessageSocket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("socketpair");
        (MessageSocket::new(ours), theirs)
    }

    fn message(request: u32, payload: &[u8]) -> Vec<u8> {
        let size = u32::try_from(payload.len()).expect("small payload");
        Message::new(Header { request, flags: 1, size }, payload).bytes
    }

    #[test]
    fn fds_stay_with_the_message_they_came_with() {
        let (mut socket, peer) = pair();
        let mut peer = MessageSocket::new(peer);
        let fd = || vec![rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("eventfd")];
        peer.send(message(1, &[]), Vec::new()).expect("send");
        peer.send(message(12, &[0; 8]), fd()).expect("send");
        peer.send(message(2, &[1; 8]), Vec::new()).expect("send");
        let counts: Vec<_> = (0..3)
            .map(|_| socket.receive().expect("receive").expect("complete"))
            .map(|message| (message.header.request, message.fds.len()))
            .collect();
        assert_eq!(counts, [(1, 0), (12, 1), (2, 0)]);
        assert!(socket.receive().expect("receive").is_none());
    }

    #[test]
    fn an_oversized_header_ends_the_connection() {
        let (mut socket, mut peer) = pair();
        peer.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x80]).expect("write");
        assert!(matches!(socket.receive(), Err(SocketError::Message(MessageError::TooLarge { .. }))));
    }

    #[test]
    fn more_fds_than_any_message_has_end_the_connection() {
        let (mut socket, peer) = pair();
        let fds = vec![peer.as_fd(); 200];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(200))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&peer, &[IoSlice::new(&message(5, &[0; 8]))], &mut control, SendFlags::empty())
            .expect("send");
        assert!(matches!(socket.receive(), Err(SocketError::TooManyFds)));
    }

    #[test]
    fn a_peer_that_does_not_read_congests_and_a_closed_one_is_noticed() {
        let (mut socket, peer) = pair();
        while !socket.is_congested() {
            socket.send(message(1, &[0; PAYLOAD_SIZE_MAX]), Vec::new()).expect("send");
        }
        drop(peer);
        assert!(matches!(socket.flush(), Err(SocketError::Closed)));
        assert!(matches!(socket.receive(), Err(SocketError::Closed)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_fragmentation_gives_the_same_messages(
            sizes in proptest::collection::vec(0..300usize, 1..8),
            cuts in proptest::collection::vec(1..40usize, 1..50),
        ) {
            let (mut socket, mut peer) = pair();
            let sent: Vec<_> = (1..).zip(&sizes).map(|(request, size)| message(request, &vec![7; *size])).collect();
            let stream = sent.concat();
            let mut received = Vec::new();
            let mut cuts = cuts.into_iter().cycle();
            let mut rest = &stream[..];
            while !rest.is_empty() {
                let (now, later) = rest.split_at(cuts.next().unwrap_or(1).min(rest.len()));
                peer.write_all(now).expect("write");
                rest = later;
                while let Some(message) = socket.receive().expect("receive") {
                    received.push(message.bytes);
                }
            }
            prop_assert_eq!(received, sent);
        }
    }
}
