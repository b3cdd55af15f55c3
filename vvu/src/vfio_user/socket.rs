//! The socket of a vfio-user client or server.

use crate::framed_socket::{self, FramedSocket, Framing};
use crate::spec::vfio_user::{FDS_MAX, HEADER_SIZE, Header, MessageError};

/// A complete vfio-user message.
pub type Message = framed_socket::Message<Header>;
/// Why a vfio-user socket cannot be used any longer.
pub type SocketError = framed_socket::SocketError<MessageError>;
/// A vfio-user socket.
pub type MessageSocket = FramedSocket<Header>;

impl Framing for Header {
    const SIZE: usize = HEADER_SIZE;
    const FDS_MAX: usize = FDS_MAX;
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
