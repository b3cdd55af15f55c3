//! Kinds of payload, and how those are read that a vvu device looks into.

use vhost::vhost_user::message::{VhostUserVringAddr, VhostUserVringState};
use vm_memory::ByteValued;

use super::header::MessageError;

/// Bit 8 of the u64 in `SET_VRING_KICK`, `SET_VRING_CALL` and `SET_VRING_ERR`: no file descriptor
/// is attached. Bits 0 to 7 are the queue index.
pub const VRING_NO_FD: u64 = 1 << 8;
/// Mask of the queue index in the u64 of `SET_VRING_KICK`, `SET_VRING_CALL` and `SET_VRING_ERR`.
pub const VRING_INDEX_MASK: u64 = 0xff;

/// What the payload of a request or of a reply is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// Nothing. A device does not check that: the back-end judges what is there all the same.
    Empty,
    /// A u64 that means nothing to a device.
    U64,
    /// A u64 of virtio feature bits.
    Features,
    /// A u64 of protocol feature bits.
    ProtocolFeatures,
    /// A u64: how many queues the back-end has.
    QueueCount,
    /// [`VhostUserVringState`]: queue index and a number, 32 bits each.
    VringState,
    /// [`VhostUserVringAddr`]: queue index, flags and four addresses.
    VringAddr,
    /// [`VringEventfd`].
    VringEventfd,
    /// A count and as many [`MemoryRegion`](super::MemoryRegion)s.
    MemoryTable,
    /// One [`MemoryRegion`](super::MemoryRegion) after eight bytes of padding.
    SingleRegion,
    /// `VhostUserInflight`, which begins with an [`InflightArea`](super::InflightArea).
    Inflight,
    /// `VhostUserConfig` and bytes of the device configuration.
    Config,
    /// `struct vhost_iotlb_msg` (linux/vhost_types.h).
    Iotlb,
    /// A structure that a device does not look into; its name in the vhost-user specification.
    Other(&'static str),
}

impl Payload {
    /// The queue index in a payload of this kind; `None` if the kind has none.
    ///
    /// # Errors
    /// [`MessageError::PayloadSize`].
    pub fn queue(self, request: u32, payload: &[u8]) -> Result<Option<u32>, MessageError> {
        match self {
            Self::VringState => Ok(Some(decode::<VhostUserVringState>(request, payload)?.index)),
            Self::VringAddr => Ok(Some(decode::<VhostUserVringAddr>(request, payload)?.index)),
            Self::VringEventfd => Ok(Some(VringEventfd::parse(request, payload)?.queue)),
            _ => Ok(None),
        }
    }
}

/// Payload of `SET_VRING_KICK`, `SET_VRING_CALL` and `SET_VRING_ERR`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringEventfd {
    /// Queue index, 0 to 255.
    pub queue: u32,
    /// Whether an eventfd is attached to the message.
    pub attached: bool,
}

impl VringEventfd {
    /// Reads the payload.
    ///
    /// # Errors
    /// [`MessageError::PayloadSize`].
    pub fn parse(request: u32, payload: &[u8]) -> Result<Self, MessageError> {
        let value = parse_u64(request, payload)?;
        let queue = u32::try_from(value & VRING_INDEX_MASK).unwrap_or(u32::MAX);
        Ok(Self { queue, attached: value & VRING_NO_FD == 0 })
    }
}

/// Reads a payload that is exactly one structure `T`.
///
/// # Errors
/// [`MessageError::PayloadSize`].
pub fn decode<T: ByteValued + Default>(request: u32, payload: &[u8]) -> Result<T, MessageError> {
    let want = size_of::<T>();
    if payload.len() != want {
        return Err(MessageError::PayloadSize { request, got: payload.len(), want });
    }
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(payload);
    Ok(value)
}

/// Reads a payload that is a single u64.
///
/// # Errors
/// [`MessageError::PayloadSize`].
pub fn parse_u64(request: u32, payload: &[u8]) -> Result<u64, MessageError> {
    decode(request, payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_indices_are_found_where_each_kind_has_them() {
        let state = [3, 0, 0, 0, 9, 0, 0, 0];
        assert_eq!(Payload::VringState.queue(8, &state), Ok(Some(3)));
        let mut addresses = [0xff; 40];
        addresses[..4].copy_from_slice(&[0, 1, 0, 0]);
        assert_eq!(Payload::VringAddr.queue(9, &addresses), Ok(Some(0x100)));
        assert_eq!(Payload::VringEventfd.queue(12, &0x1_0000_0102u64.to_le_bytes()), Ok(Some(2)));
        assert_eq!(Payload::U64.queue(39, &state), Ok(None));
        for kind in [Payload::VringState, Payload::VringAddr, Payload::VringEventfd] {
            assert!(
                matches!(kind.queue(8, &[0; 7]), Err(MessageError::PayloadSize { got: 7, .. })),
                "{kind:?}"
            );
        }
    }

    #[test]
    fn an_eventfd_is_attached_unless_bit_8_is_set() {
        let parse = |value: u64| VringEventfd::parse(12, &value.to_le_bytes()).expect("payload");
        assert_eq!(parse(5), VringEventfd { queue: 5, attached: true });
        assert_eq!(parse(0x1ff), VringEventfd { queue: 255, attached: false });
    }
}
