//! vhost-user messages on a socket.

use crate::framed_socket::{self, FramedSocket, Framing};
use crate::spec::vhost_user::{HEADER_SIZE, Header, MessageError, REGIONS_MAX};

/// A complete vhost-user message.
pub type Message = framed_socket::Message<Header>;
/// The error that ends the use of a vhost-user socket.
pub type SocketError = framed_socket::SocketError<MessageError>;
/// A connected socket of a vhost-user front-end or back-end.
pub type MessageSocket = FramedSocket<Header>;

impl Framing for Header {
    const SIZE: usize = HEADER_SIZE;
    /// `SET_MEM_TABLE` has the most: one for each region.
    const FDS_MAX: usize = REGIONS_MAX;
    type Error = MessageError;

    fn from_wire(bytes: &[u8]) -> Result<Self, MessageError> {
        Self::parse(bytes)
    }

    fn append_to(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.to_bytes());
    }

    fn payload_len(&self) -> usize {
        self.payload_size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::vhost_user::PAYLOAD_SIZE_MAX;
    use proptest::prelude::*;
    use std::io::{IoSlice, Write};
    use std::mem::MaybeUninit;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

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
        assert!(matches!(socket.receive(), Err(SocketError::TooManyFds { max: 32 })));
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
