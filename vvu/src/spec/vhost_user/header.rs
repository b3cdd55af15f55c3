//! The header of a vhost-user message, and what can be wrong with a message.

use super::REGIONS_MAX;
use crate::spec::addr::{BarOffset, SiblingGpa};

/// Bytes of a message header.
pub const HEADER_SIZE: usize = 12;
/// Most bytes of a message, header included: the size of a receive buffer of the guest driver.
pub const MESSAGE_SIZE_MAX: usize = 4096;
/// Most bytes of a payload.
pub const PAYLOAD_SIZE_MAX: usize = MESSAGE_SIZE_MAX - HEADER_SIZE;

/// Header of a vhost-user message (vhost-user, "Header").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Request code.
    pub request: u32,
    /// Bits 1:0 version, bit 2 reply, bit 3 need-reply.
    pub flags: u32,
    /// Bytes of payload that follow, at most [`PAYLOAD_SIZE_MAX`].
    pub size: u32,
}

/// Why bytes are not a valid vhost-user message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// The message is shorter than a header.
    #[error("vhost-user message of {got} bytes: want at least {HEADER_SIZE}")]
    Short {
        /// Bytes of the message.
        got: usize,
    },
    /// The version field is not 1.
    #[error("vhost-user version is {got}: want 1")]
    Version {
        /// Version in the header.
        got: u32,
    },
    /// The header announces a payload that does not fit in a message.
    #[error("payload of {got} bytes in request {request}: want at most {PAYLOAD_SIZE_MAX}")]
    TooLarge {
        /// Request code.
        request: u32,
        /// Bytes announced.
        got: u32,
    },
    /// The payload does not have the length that the request prescribes.
    #[error("payload of {got} bytes in request {request}: want {want}")]
    PayloadSize {
        /// Request code.
        request: u32,
        /// Bytes of the payload.
        got: usize,
        /// Bytes that the request prescribes.
        want: usize,
    },
    /// A memory table has no region or too many.
    #[error("memory table of {got} regions: want 1 to {REGIONS_MAX}")]
    RegionCount {
        /// Regions announced.
        got: u32,
    },
    /// A memory region is empty, is not made of whole pages, or wraps around.
    #[error(
        "memory region {index} (guest address {gpa}, size {size:#x}, offset {offset}) is not a range of whole pages"
    )]
    RegionShape {
        /// Position in the table.
        index: usize,
        /// Guest physical address of the first byte.
        gpa: SiblingGpa,
        /// Bytes.
        size: u64,
        /// Offset of the first byte in its file.
        offset: BarOffset,
    },
    /// Two memory regions share addresses.
    #[error("memory regions {first} and {second} overlap")]
    RegionOverlap {
        /// Position of the earlier one in the table.
        first: usize,
        /// Position of the later one in the table.
        second: usize,
    },
}

impl Header {
    const VERSION: u32 = 1;
    const VERSION_MASK: u32 = 0b11;
    const REPLY: u32 = 1 << 2;
    const NEED_REPLY: u32 = 1 << 3;

    /// Reads the header at the start of `bytes`; checks its version and payload size.
    ///
    /// # Errors
    /// [`MessageError::Short`], [`MessageError::Version`], [`MessageError::TooLarge`].
    pub fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let (Some(request), Some(flags), Some(size)) = (word(0), word(4), word(8)) else {
            return Err(MessageError::Short { got: bytes.len() });
        };
        let header = Self { request, flags, size };
        if flags & Self::VERSION_MASK != Self::VERSION {
            return Err(MessageError::Version { got: flags & Self::VERSION_MASK });
        }
        if header.payload_size() > PAYLOAD_SIZE_MAX {
            return Err(MessageError::TooLarge { request, got: size });
        }
        Ok(header)
    }

    /// The header of a reply to this request with `size` bytes of payload.
    #[must_use]
    pub fn reply(&self, size: u32) -> Self {
        Self { request: self.request, flags: Self::VERSION | Self::REPLY, size }
    }

    /// The header as it is sent.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        for (field, value) in bytes.chunks_exact_mut(4).zip([self.request, self.flags, self.size]) {
            field.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// Bytes of the payload.
    #[must_use]
    pub fn payload_size(&self) -> usize {
        usize::try_from(self.size).unwrap_or(usize::MAX)
    }

    /// Whether the message is a reply.
    #[must_use]
    pub fn is_reply(&self) -> bool {
        self.flags & Self::REPLY != 0
    }

    /// Whether the sender asks for an acknowledgement. That counts only once both sides have agreed
    /// on `REPLY_ACK`.
    #[must_use]
    pub fn needs_reply(&self) -> bool {
        self.flags & Self::NEED_REPLY != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_header_and_reply() {
        let bytes = [5, 0, 0, 0, 0x09, 0, 0, 0, 40, 0, 0, 0];
        let header = Header::parse(&bytes).expect("header");
        assert_eq!(header, Header { request: 5, flags: 9, size: 40 });
        assert!(header.needs_reply() && !header.is_reply());
        assert_eq!(header.reply(8).to_bytes(), [5, 0, 0, 0, 0x05, 0, 0, 0, 8, 0, 0, 0]);
    }

    #[test]
    fn a_header_of_four_gibibytes_is_refused_before_anything_is_allocated() {
        let bytes = [5, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(Header::parse(&bytes), Err(MessageError::TooLarge { request: 5, got: u32::MAX }));
        assert_eq!(Header::parse(&bytes[..11]), Err(MessageError::Short { got: 11 }));
        assert_eq!(Header::parse(&[0; 12]), Err(MessageError::Version { got: 0 }));
    }

    proptest! {
        #[test]
        fn headers_round_trip(request: u32, reply: bool, need: bool, size in 0..=4084u32) {
            let flags = 1 | u32::from(reply) << 2 | u32::from(need) << 3;
            let header = Header { request, flags, size };
            prop_assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
        }
    }
}
