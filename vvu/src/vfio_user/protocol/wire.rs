//! Limits, errors and the form of structures that all messages share.

/// Bytes of a message header.
pub const HEADER_SIZE: usize = 16;
/// Most bytes of data in one region access.
pub const TRANSFER_SIZE_MAX: usize = 1 << 20;
/// Bytes of [`RegionAccess`](super::RegionAccess), which precedes the data.
pub(super) const REGION_ACCESS_SIZE: usize = 16;
/// Most bytes of a message, header included: a region access with all its data.
pub const MESSAGE_SIZE_MAX: usize = HEADER_SIZE + REGION_ACCESS_SIZE + TRANSFER_SIZE_MAX;
/// Most file descriptors attached to one message; QEMU attaches no more either.
pub const FDS_MAX: usize = 16;

/// Bytes are not a vfio-user message, or not of the kind that they claim to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// The size field is smaller than a header, or larger than any message.
    #[error("vfio-user message of {got} bytes: want {HEADER_SIZE} to {MESSAGE_SIZE_MAX}")]
    Size {
        /// Announced bytes, including the header.
        got: u32,
    },
    /// The message is neither a command nor a reply.
    #[error("vfio-user message of type {got}: want 0 (command) or 1 (reply)")]
    Type {
        /// Type of the message.
        got: u32,
    },
    /// The payload is shorter than its structure, or than the data it announces.
    #[error("vfio-user payload of {got} bytes: want at least {want}")]
    PayloadSize {
        /// Bytes of the payload.
        got: usize,
        /// Bytes of the structure and its data.
        want: usize,
    },
    /// The version data is not a JSON object that a zero byte ends.
    #[error("vfio-user version data is no JSON object ended by a zero byte")]
    VersionData,
}

/// Defines a structure of little-endian fields, in wire order.
macro_rules! wire_struct {
    ($(#[$doc:meta])* $name:ident, $size:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl $name {
            /// Bytes on the wire.
            pub const SIZE: usize = $size;

            /// Reads the structure at the start of `bytes`, and returns the bytes that follow it.
            ///
            /// # Errors
            /// [`MessageError::PayloadSize`].
            pub fn parse(bytes: &[u8]) -> Result<(Self, &[u8]), MessageError> {
                let short = || MessageError::PayloadSize { got: bytes.len(), want: Self::SIZE };
                let rest = bytes;
                $(
                    let (field, rest) = rest.split_first_chunk().ok_or_else(short)?;
                    let $field = <$type>::from_le_bytes(*field);
                )*
                Ok((Self { $($field,)* }, rest))
            }

            /// The wire form.
            #[must_use]
            pub fn to_bytes(&self) -> [u8; Self::SIZE] {
                let mut bytes = [0; Self::SIZE];
                let fields = [$(self.$field.to_le_bytes().as_slice(),)*].concat();
                bytes.copy_from_slice(&fields);
                bytes
            }
        }
    };
}

pub(super) use wire_struct;
