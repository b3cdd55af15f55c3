//! The socket of a vfio-user client or server.

use super::header::Header;
use super::payloads::RegionAccess;
use super::wire::{FDS_MAX, HEADER_SIZE, MessageError};
use crate::framed_socket::{self, FramedSocket, Framing};

/// A complete vfio-user message.
pub type Message = framed_socket::Message<Header>;
/// A vfio-user socket cannot be used any longer.
pub type SocketError = framed_socket::SocketError<MessageError>;
/// A vfio-user socket.
pub type MessageSocket = FramedSocket<Header>;

impl Framing for Header {
    const SIZE: usize = HEADER_SIZE;
    const FDS_MAX: usize = FDS_MAX;
    /// Bytes of an access to a register, such as a doorbell.
    const FIRST_READ: usize = HEADER_SIZE + RegionAccess::SIZE + 8;
    type Error = MessageError;

    fn from_wire(bytes: &[u8]) -> Result<Self, MessageError> {
        let (header, _) = Self::parse(bytes)?;
        header.check()?;
        Ok(header)
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
    use proptest::prelude::*;
    use std::io::IoSlice;
    use std::mem::MaybeUninit;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use crate::vfio_user::protocol::Command;

    /// One call of a peer.
    fn send(peer: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let sent = sendmsg(peer, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).expect("send");
        assert_eq!(sent, bytes.len());
    }

    fn message(id: u16, payload: usize) -> Vec<u8> {
        let header = Header::command(id, Command::RegionWrite, payload);
        Message::new(header, &vec![u8::try_from(id & 0xff).expect("a byte"); payload]).bytes
    }

    fn descriptors(count: usize) -> Vec<OwnedFd> {
        let one = || rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("eventfd");
        (0..count).map(|_| one()).collect()
    }

    #[test]
    fn a_small_message_takes_one_read() {
        let (ours, peer) = UnixStream::pair().expect("socket pair");
        let mut socket = MessageSocket::new(ours);
        send(&peer, &message(1, RegionAccess::SIZE + 4), &[]);
        send(&peer, &message(2, 0), &[]);
        assert!(!socket.has_read_ahead());
        assert_eq!(socket.receive().expect("receive").expect("complete").header.id, 1);
        send(&peer, &message(3, RegionAccess::SIZE + 8), &[]);
        assert_eq!(socket.receive().expect("receive").expect("complete").header.id, 2);
        assert!(socket.has_read_ahead(), "most of the third came with the second");
        assert_eq!(socket.receive().expect("receive").expect("complete").header.id, 3);
        assert!(!socket.has_read_ahead());
        assert!(socket.receive().expect("receive").is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        /// However messages are cut into calls and however late they are read, each has its own descriptors.
        #[test]
        fn descriptors_stay_with_the_message_they_were_sent_with(
            // Size of the payload, descriptors, where the message is cut, and whether it is read at once.
            messages in proptest::collection::vec((0..60usize, 0..3usize, 1..80usize, any::<bool>()), 1..20),
        ) {
            let (ours, peer) = UnixStream::pair().expect("socket pair");
            let mut socket = MessageSocket::new(ours);
            let mut got = Vec::new();
            let mut read = |socket: &mut MessageSocket| {
                while let Some(message) = socket.receive().expect("receive") {
                    got.push((message.header.id, message.payload().len(), message.fds.len()));
                }
            };
            let mut sent = Vec::new();
            for (id, (payload, fds, cut, at_once)) in (1..).zip(messages) {
                let bytes = message(id, payload);
                let (now, later) = bytes.split_at(cut.min(bytes.len()));
                send(&peer, now, &descriptors(fds));
                if at_once {
                    read(&mut socket);
                }
                if !later.is_empty() {
                    send(&peer, later, &[]);
                }
                sent.push((id, payload, fds));
            }
            read(&mut socket);
            prop_assert_eq!(got, sent);
        }
    }
}
