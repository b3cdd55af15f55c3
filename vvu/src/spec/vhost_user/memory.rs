//! Memory tables and in-flight areas.

use vhost::vhost_user::message::{
    FrontendReq, VhostUserInflight, VhostUserMemory, VhostUserMemoryRegion, VhostUserSingleMemoryRegion,
};

use super::header::MessageError;
use super::payload::decode;
use crate::spec::PAGE_SIZE;
use crate::spec::addr::{BarOffset, SiblingGpa, SiblingVa};

/// Most regions of a memory table, and most file descriptors attached to one message.
pub const REGIONS_MAX: usize = 32;

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

impl From<VhostUserMemoryRegion> for MemoryRegion {
    fn from(region: VhostUserMemoryRegion) -> Self {
        Self {
            gpa: SiblingGpa(region.guest_phys_addr),
            size: region.memory_size,
            va: SiblingVa(region.user_addr),
            offset: BarOffset(region.mmap_offset),
        }
    }
}

impl MemoryRegion {
    /// Bytes of a region in a message.
    pub const SIZE: usize = size_of::<VhostUserMemoryRegion>();

    /// The region as it is sent.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        for (field, value) in bytes.chunks_exact_mut(8).zip([self.gpa.0, self.size, self.va.0, self.offset.0])
        {
            field.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// Checks that the region at position `index` of its table is made of whole pages, and that none
    /// of its three ranges wraps. The virtual address need not be aligned.
    fn check_shape(self, index: usize) -> Result<Self, MessageError> {
        let Self { gpa, size, va, offset } = self;
        let aligned = [size, gpa.0, offset.0].iter().all(|value| value.is_multiple_of(PAGE_SIZE));
        let bounded = [gpa.0, va.0, offset.0].iter().all(|start| start.checked_add(size).is_some());
        if size != 0 && aligned && bounded {
            Ok(self)
        } else {
            Err(MessageError::RegionShape { index, gpa, size, offset })
        }
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
    const TABLE_HEADER_SIZE: usize = size_of::<VhostUserMemory>();
    let request = FrontendReq::SET_MEM_TABLE as u32;
    let size = |want| MessageError::PayloadSize { request, got: payload.len(), want };
    let (table, regions) =
        payload.split_at_checked(TABLE_HEADER_SIZE).ok_or(size(TABLE_HEADER_SIZE + MemoryRegion::SIZE))?;
    let count = decode::<VhostUserMemory>(request, table)?.num_regions;
    let wanted = usize::try_from(count).ok().filter(|n| (1..=REGIONS_MAX).contains(n));
    let wanted = wanted.ok_or(MessageError::RegionCount { got: count })?;
    let (regions, rest) = regions.as_chunks::<{ MemoryRegion::SIZE }>();
    if regions.len() != wanted || !rest.is_empty() {
        return Err(size(TABLE_HEADER_SIZE + wanted * MemoryRegion::SIZE));
    }
    let mut checked = Vec::<MemoryRegion>::with_capacity(wanted);
    for (second, bytes) in regions.iter().enumerate() {
        let region = MemoryRegion::from(decode::<VhostUserMemoryRegion>(request, bytes)?);
        let region = region.check_shape(second)?;
        if let Some(first) = checked.iter().position(|earlier| earlier.overlaps(&region)) {
            return Err(MessageError::RegionOverlap { first, second });
        }
        checked.push(region);
    }
    Ok(checked)
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
    let region = decode::<VhostUserSingleMemoryRegion>(request, payload)?;
    MemoryRegion::from(*region).check_shape(0)
}

/// Where an in-flight region lies (vhost-user, "Inflight description": the first two fields). The
/// numbers of queues and descriptors that follow concern only front-end and back-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightArea {
    /// Bytes.
    pub size: u64,
    /// Offset in the file, which is its offset in the shared memory BAR.
    pub offset: BarOffset,
}

impl InflightArea {
    /// Bytes of the whole description: two 64-bit fields, two 16-bit fields and padding.
    pub const DESCRIPTION_SIZE: usize = size_of::<VhostUserInflight>();

    /// Reads the payload of `GET_INFLIGHT_FD`, of its reply, and of `SET_INFLIGHT_FD`.
    ///
    /// # Errors
    /// [`MessageError::PayloadSize`].
    pub fn parse(request: u32, payload: &[u8]) -> Result<Self, MessageError> {
        let description = decode::<VhostUserInflight>(request, payload)?;
        Ok(Self { size: description.mmap_size, offset: BarOffset(description.mmap_offset) })
    }

    /// Writes this area into a payload that [`parse`](Self::parse) accepted.
    pub fn write(&self, payload: &mut [u8]) {
        for (field, value) in payload.chunks_exact_mut(8).zip([self.size, self.offset.0]) {
            field.copy_from_slice(&value.to_le_bytes());
        }
    }
}

#[cfg(test)]
#[path = "memory_test.rs"]
mod tests;
