//! vhost-user messages: framing, memory tables, and which protocol features VVU can carry.
//!
//! Request codes and feature bits come from the `vhost` crate; what is here is what a relay needs
//! and that crate keeps to itself. All numbers are little-endian, which is the byte order of both
//! hosts that a shared-memory transport can connect.

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};

pub use vhost::vhost_user::message::{BackendReq, FrontendReq};

use super::addr::{BarOffset, SiblingGpa, SiblingVa};

/// Bytes of a message header.
pub const HEADER_SIZE: usize = 12;
/// Largest message, header included, in bytes: what one receive buffer of the guest driver holds.
pub const MESSAGE_SIZE_MAX: usize = 4096;
/// Largest payload in bytes.
pub const PAYLOAD_SIZE_MAX: usize = MESSAGE_SIZE_MAX - HEADER_SIZE;
/// Most file descriptors attached to one message, and most regions of a memory table.
pub const REGIONS_MAX: usize = 32;
/// Smallest unit of memory that a region can describe, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Bit 8 of the u64 in `SET_VRING_KICK`, `SET_VRING_CALL` and `SET_VRING_ERR`: no file descriptor
/// is attached. Bits 0 to 7 are the queue index.
pub const VRING_NO_FD: u64 = 1 << 8;
/// Mask of the queue index in the u64 of `SET_VRING_KICK`, `SET_VRING_CALL` and `SET_VRING_ERR`.
pub const VRING_INDEX_MASK: u64 = 0xff;

/// Protocol features that need nothing but message bytes, or whose file descriptors the device
/// turns into resources of its own. Every other bit is cleared on its way through.
pub const CARRIED_PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::RARP)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::MTU)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CROSS_ENDIAN)
    .union(VhostUserProtocolFeatures::CRYPTO_SESSION)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::STATUS);

/// Virtio feature bits that the device cannot carry: dirty logging needs a shared log.
pub const MASKED_FEATURES: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// `VHOST_USER_F_PROTOCOL_FEATURES`, bit 30 of the virtio features.
pub const F_PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

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

/// Why bytes are not a vhost-user message, or not one of the kind they claim to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Fewer bytes than a header.
    #[error("{got} bytes are no vhost-user message: want at least {HEADER_SIZE}")]
    Short {
        /// Bytes there.
        got: usize,
    },
    /// The version field is not 1.
    #[error("vhost-user version is {got}: want 1")]
    Version {
        /// Version there.
        got: u32,
    },
    /// The payload would not fit in a message.
    #[error("payload of {got} bytes in request {request}: want at most {PAYLOAD_SIZE_MAX}")]
    TooLarge {
        /// Request code.
        request: u32,
        /// Bytes announced.
        got: u32,
    },
    /// Payload length and request do not go together.
    #[error("payload of {got} bytes in request {request}: want {want}")]
    PayloadSize {
        /// Request code.
        request: u32,
        /// Bytes there.
        got: usize,
        /// Bytes of such a payload.
        want: usize,
    },
    /// A memory table without regions or with too many.
    #[error("memory table of {got} regions: want 1 to {REGIONS_MAX}")]
    RegionCount {
        /// Regions announced.
        got: u32,
    },
    /// A region that is empty, not made of pages, or that wraps around.
    #[error(
        "memory region {index} (guest address {gpa}, size {size:#x}, offset {offset}) is not a range of whole pages"
    )]
    RegionShape {
        /// Position in the table.
        index: usize,
        /// Where it starts in the sibling.
        gpa: SiblingGpa,
        /// Bytes.
        size: u64,
        /// Where it starts in its file.
        offset: BarOffset,
    },
    /// Two regions claim the same addresses.
    #[error("memory regions {first} and {second} overlap")]
    RegionOverlap {
        /// Position of one.
        first: usize,
        /// Position of the other.
        second: usize,
    },
}

impl Header {
    const VERSION: u32 = 1;
    const VERSION_MASK: u32 = 0b11;
    const REPLY: u32 = 1 << 2;
    const NEED_REPLY: u32 = 1 << 3;

    /// Reads the header at the start of `bytes` and checks version and size.
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

    /// The header of the reply of `size` payload bytes to this request.
    #[must_use]
    pub fn reply(&self, size: u32) -> Self {
        Self { request: self.request, flags: Self::VERSION | Self::REPLY, size }
    }

    /// The wire form.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        for (field, value) in bytes.chunks_exact_mut(4).zip([self.request, self.flags, self.size]) {
            field.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// The payload size as a length.
    #[must_use]
    pub fn payload_size(&self) -> usize {
        usize::try_from(self.size).unwrap_or(usize::MAX)
    }

    /// Whether this is a reply.
    #[must_use]
    pub fn is_reply(&self) -> bool {
        self.flags & Self::REPLY != 0
    }

    /// Whether the sender asks for an acknowledgement (with `REPLY_ACK` negotiated).
    #[must_use]
    pub fn needs_reply(&self) -> bool {
        self.flags & Self::NEED_REPLY != 0
    }
}

/// Reads a payload that is a single u64.
///
/// # Errors
/// [`MessageError::PayloadSize`].
pub fn parse_u64(request: u32, payload: &[u8]) -> Result<u64, MessageError> {
    let bytes = payload.try_into().map_err(|_| MessageError::PayloadSize {
        request,
        got: payload.len(),
        want: size_of::<u64>(),
    })?;
    Ok(u64::from_le_bytes(bytes))
}

/// One region of the sibling's memory (vhost-user, "Memory region description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Guest physical address of the first byte.
    pub gpa: SiblingGpa,
    /// Bytes.
    pub size: u64,
    /// Virtual address of the first byte in the sibling's VMM.
    pub va: SiblingVa,
    /// Offset of the first byte in the file, which is its offset in the shared memory BAR.
    pub offset: BarOffset,
}

impl MemoryRegion {
    /// Bytes on the wire.
    pub const SIZE: usize = 32;

    fn parse(bytes: &[u8; Self::SIZE]) -> Self {
        let mut words = [0; 4];
        for (word, field) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        }
        let [gpa, size, va, offset] = words;
        Self { gpa: SiblingGpa(gpa), size, va: SiblingVa(va), offset: BarOffset(offset) }
    }

    /// The wire form.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        for (field, value) in bytes.chunks_exact_mut(8).zip([self.gpa.0, self.size, self.va.0, self.offset.0])
        {
            field.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// Whether the region is made of whole pages and none of its three ranges wraps. The virtual
    /// address need not be aligned.
    fn is_well_formed(&self) -> bool {
        let aligned = |value: u64| value.is_multiple_of(PAGE_SIZE);
        self.size != 0
            && aligned(self.size)
            && aligned(self.gpa.0)
            && aligned(self.offset.0)
            && [self.gpa.0, self.va.0, self.offset.0]
                .iter()
                .all(|start| start.checked_add(self.size).is_some())
    }

    /// Whether the two regions share a guest physical or a virtual address.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let cross = |a: u64, b: u64| a < b.saturating_add(other.size) && b < a.saturating_add(self.size);
        cross(self.gpa.0, other.gpa.0) || cross(self.va.0, other.va.0)
    }
}

/// Reads the payload of `SET_MEM_TABLE`.
///
/// # Errors
/// [`MessageError::PayloadSize`], [`MessageError::RegionCount`], [`MessageError::RegionShape`],
/// [`MessageError::RegionOverlap`].
pub fn parse_memory_table(payload: &[u8]) -> Result<Vec<MemoryRegion>, MessageError> {
    let request = FrontendReq::SET_MEM_TABLE as u32;
    let (count, regions) = payload.split_first_chunk::<8>().ok_or(MessageError::PayloadSize {
        request,
        got: payload.len(),
        want: 8 + MemoryRegion::SIZE,
    })?;
    let [a, b, c, d, ..] = *count;
    let count = u32::from_le_bytes([a, b, c, d]);
    let wanted = usize::try_from(count).ok().filter(|n| (1..=REGIONS_MAX).contains(n));
    let wanted = wanted.ok_or(MessageError::RegionCount { got: count })?;
    let (regions, rest) = regions.as_chunks::<{ MemoryRegion::SIZE }>();
    if regions.len() != wanted || !rest.is_empty() {
        let want = 8 + wanted * MemoryRegion::SIZE;
        return Err(MessageError::PayloadSize { request, got: payload.len(), want });
    }
    let regions: Vec<_> = regions.iter().map(MemoryRegion::parse).collect();
    for (index, region) in regions.iter().enumerate() {
        check_shape(index, region)?;
        if let Some(first) = regions[..index].iter().position(|earlier| earlier.overlaps(region)) {
            return Err(MessageError::RegionOverlap { first, second: index });
        }
    }
    Ok(regions)
}

/// Writes the payload of `SET_MEM_TABLE`.
#[must_use]
pub fn memory_table_to_bytes(regions: &[MemoryRegion]) -> Vec<u8> {
    let count = u64::try_from(regions.len()).unwrap_or(u64::MAX);
    let mut bytes = count.to_le_bytes().to_vec();
    regions.iter().for_each(|region| bytes.extend(region.to_bytes()));
    bytes
}

/// Reads the payload of `ADD_MEM_REG` and `REM_MEM_REG`: eight bytes of padding and one region.
///
/// # Errors
/// [`MessageError::PayloadSize`], [`MessageError::RegionShape`].
pub fn parse_single_region(request: u32, payload: &[u8]) -> Result<MemoryRegion, MessageError> {
    let want = 8 + MemoryRegion::SIZE;
    let region = payload.get(8..).and_then(|region| region.try_into().ok());
    let region = region.ok_or(MessageError::PayloadSize { request, got: payload.len(), want })?;
    let region = MemoryRegion::parse(region);
    check_shape(0, &region)?;
    Ok(region)
}

/// The area of an in-flight region (vhost-user, "Inflight description"): the first two of its fields.
/// How many queues it is for and how large they are is between front-end and back-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightArea {
    /// Bytes.
    pub size: u64,
    /// Offset in the file, which is its offset in the shared memory BAR.
    pub offset: BarOffset,
}

impl InflightArea {
    /// Bytes of the whole description: two 64-bit fields, two 16-bit fields and padding.
    pub const DESCRIPTION_SIZE: usize = 24;

    /// Reads the payload of `GET_INFLIGHT_FD`, of its reply, and of `SET_INFLIGHT_FD`.
    ///
    /// # Errors
    /// [`MessageError::PayloadSize`].
    pub fn parse(request: u32, payload: &[u8]) -> Result<Self, MessageError> {
        let want = Self::DESCRIPTION_SIZE;
        let ([size, offset, _], []) = payload.as_chunks::<8>() else {
            return Err(MessageError::PayloadSize { request, got: payload.len(), want });
        };
        Ok(Self { size: u64::from_le_bytes(*size), offset: BarOffset(u64::from_le_bytes(*offset)) })
    }

    /// Writes this area into a payload that [`parse`](Self::parse) accepted.
    pub fn write(&self, payload: &mut [u8]) {
        for (field, value) in payload.chunks_exact_mut(8).zip([self.size, self.offset.0]) {
            field.copy_from_slice(&value.to_le_bytes());
        }
    }
}

fn check_shape(index: usize, region: &MemoryRegion) -> Result<(), MessageError> {
    let MemoryRegion { gpa, size, offset, .. } = *region;
    if region.is_well_formed() { Ok(()) } else { Err(MessageError::RegionShape { index, gpa, size, offset }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn region(gpa: u64, size: u64, va: u64, offset: u64) -> MemoryRegion {
        MemoryRegion { gpa: SiblingGpa(gpa), size, va: SiblingVa(va), offset: BarOffset(offset) }
    }

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

    #[test]
    fn golden_memory_table() {
        #[rustfmt::skip]
        let bytes = [
            2, 0, 0, 0, 0, 0, 0, 0,
            0, 0, 0, 0, 0, 0, 0, 0,  0, 0, 0, 0x80, 0, 0, 0, 0,  0, 0, 0, 0, 0x7f, 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0,
            0, 0, 0, 0, 1, 0, 0, 0,  0, 0, 0, 0x40, 0, 0, 0, 0,  0, 0, 0, 0x80, 0x7f, 0, 0, 0,  0, 0, 0, 0x80, 0, 0, 0, 0,
        ];
        let want = [
            region(0, 0x8000_0000, 0x7f_0000_0000, 0),
            region(0x1_0000_0000, 0x4000_0000, 0x7f_8000_0000, 0x8000_0000),
        ];
        assert_eq!(parse_memory_table(&bytes).expect("table"), want);
        assert_eq!(memory_table_to_bytes(&want), bytes);
    }

    #[test]
    fn tables_that_lie_are_refused() {
        let refuse =
            |regions: &[MemoryRegion]| parse_memory_table(&memory_table_to_bytes(regions)).expect_err("lie");
        assert_eq!(refuse(&[]), MessageError::RegionCount { got: 0 });
        let many: Vec<_> = (0..33).map(|i| region(i << 12, 4096, i << 12, i << 12)).collect();
        assert_eq!(refuse(&many), MessageError::RegionCount { got: 33 });
        for bad in [
            region(0, 0, 0, 0),
            region(1, 4096, 0, 0),
            region(0, 4095, 0, 0),
            region(0, 4096, 0, 7),
            region(0u64.wrapping_sub(4096), 8192, 0, 0),
            region(0, 8192, u64::MAX - 4096, 0),
            region(0, 8192, 0, 0u64.wrapping_sub(4096)),
        ] {
            assert!(matches!(refuse(&[bad]), MessageError::RegionShape { index: 0, .. }), "{bad:?}");
        }
        let overlap = refuse(&[region(0, 8192, 0, 0), region(4096, 8192, 1 << 20, 8192)]);
        assert_eq!(overlap, MessageError::RegionOverlap { first: 0, second: 1 });
        let mut short = memory_table_to_bytes(&[region(0, 4096, 0, 0)]);
        short.pop();
        assert!(matches!(parse_memory_table(&short), Err(MessageError::PayloadSize { .. })));
    }

    #[test]
    fn golden_inflight_description() {
        let mut bytes = [0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 4, 0, 0, 1, 0, 0, 0, 0];
        let area = InflightArea::parse(32, &bytes).expect("area");
        assert_eq!(area, InflightArea { size: 0x1000, offset: BarOffset(0x2000_0000) });
        InflightArea { size: 0x1000, offset: BarOffset(1) }.write(&mut bytes);
        assert_eq!(bytes[8..], [1, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 1, 0, 0, 0, 0]);
        assert!(InflightArea::parse(32, &bytes[..20]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_fail_but_never_panic(bytes in vec(any::<u8>(), 0..1200)) {
            let _ = Header::parse(&bytes);
            let _ = parse_memory_table(&bytes);
            let _ = parse_single_region(37, &bytes);
            let _ = parse_u64(1, &bytes);
            let _ = InflightArea::parse(31, &bytes);
        }

        #[test]
        fn headers_round_trip(request: u32, reply: bool, need: bool, size in 0..=4084u32) {
            let flags = 1 | u32::from(reply) << 2 | u32::from(need) << 3;
            let header = Header { request, flags, size };
            prop_assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
        }

        #[test]
        fn tables_round_trip(sizes in vec((1..1u64 << 20, 0..1u64 << 20), 1..=32)) {
            let mut at = 0;
            let regions: Vec<_> = sizes.iter().map(|(pages, gap)| {
                let region = region(at, pages << 12, at + (1 << 46), at);
                at += (pages + gap) << 12;
                region
            }).collect();
            prop_assert_eq!(parse_memory_table(&memory_table_to_bytes(&regions)), Ok(regions));
        }
    }
}
