//! The memory of all trackers of a connection: who makes it, who may hand it in, where each ring is.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs, ftruncate, memfd_create,
};
use rustix::io::Errno;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::Tracker;
use super::tracker::{ENTRY_SIZE, HEADER_SIZE};
use crate::spec::PAGE_SIZE;
use crate::spec::addr::BarOffset;
use crate::spec::vhost_user::{InflightArea, MessageError};

/// Each ring's part starts at a multiple of this, as in QEMU's back-ends.
const ALIGNMENT: u64 = 64;
/// `f_type` of sysfs, where a PCI device's memory is (`SYSFS_MAGIC`).
const SYSFS: i64 = 0x6265_6572;

/// Why a front-end gets no in-flight region, or cannot hand one in.
#[derive(Debug, thiserror::Error)]
pub(in crate::backend) enum RegionError {
    /// The message is malformed.
    #[error(transparent)]
    Message(MessageError),
    /// More rings than there are, or none.
    #[error("in-flight region for {got} queues: want 1 to {most}")]
    Queues {
        /// Rings asked for.
        got: u16,
        /// Rings of the device.
        most: u16,
    },
    /// Rings larger than any can be, or empty.
    #[error("in-flight region for queues of {got} descriptors: want 1 to {most}")]
    QueueSize {
        /// Descriptors asked for.
        got: u16,
        /// Descriptors of the largest ring.
        most: u16,
    },
    /// Not enough bytes, or at a strange place.
    #[error(
        "in-flight region of {size:#x} bytes at offset {offset}: want {want:#x} bytes on a page boundary"
    )]
    Place {
        /// Bytes there.
        size: u64,
        /// Where.
        offset: BarOffset,
        /// Bytes that this many rings of this size need.
        want: u64,
    },
    /// Not one file.
    #[error("{got} file descriptors came with the in-flight region: want 1")]
    Fds {
        /// How many.
        got: usize,
    },
    /// The file could be made smaller, and then an access to it would kill us.
    #[error(
        "the file of the in-flight region can shrink: want the one that GET_INFLIGHT_FD returned, or one sealed with F_SEAL_SHRINK"
    )]
    CanShrink,
    /// The file has no such range, or cannot be mapped.
    #[error("cannot map the in-flight region: {0}")]
    Map(String),
    /// A system call failed.
    #[error("cannot use an in-flight region: {0}")]
    Io(#[from] Errno),
    /// The region knows fewer or smaller rings than the device is told to start.
    #[error(
        "the in-flight region is for {queues} queues of {queue_size} descriptors: it has no place for queue {index} of {size}"
    )]
    NoPlace {
        /// Rings it knows.
        queues: u16,
        /// Their size in descriptors.
        queue_size: u16,
        /// The ring.
        index: usize,
        /// Its size in descriptors.
        size: u16,
    },
}

/// The largest device.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend) struct Limits {
    pub(in crate::backend) queues: u16,
    /// In descriptors.
    pub(in crate::backend) queue_size: u16,
}

/// Payload of both messages (vhost-user, "Inflight description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Description {
    area: InflightArea,
    queues: u16,
    /// In descriptors.
    queue_size: u16,
}

impl Description {
    pub(super) const SIZE: usize = InflightArea::DESCRIPTION_SIZE;
    /// Says that there is no region.
    pub(super) const NOTHING: Self =
        Self { area: InflightArea { size: 0, offset: BarOffset(0) }, queues: 0, queue_size: 0 };

    pub(super) fn parse(request: u32, payload: &[u8]) -> Result<Self, MessageError> {
        let area = InflightArea::parse(request, payload)?;
        let field = |at: usize| u16::from_le_bytes([payload[at], payload[at + 1]]);
        Ok(Self { area, queues: field(16), queue_size: field(18) })
    }

    pub(super) fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        self.area.write(&mut bytes);
        bytes[16..18].copy_from_slice(&self.queues.to_le_bytes());
        bytes[18..20].copy_from_slice(&self.queue_size.to_le_bytes());
        bytes
    }

    fn check(self, limits: Limits) -> Result<(), RegionError> {
        let Self { queues, queue_size, .. } = self;
        if !(1..=limits.queues).contains(&queues) {
            return Err(RegionError::Queues { got: queues, most: limits.queues });
        }
        if !(1..=limits.queue_size).contains(&queue_size) {
            return Err(RegionError::QueueSize { got: queue_size, most: limits.queue_size });
        }
        Ok(())
    }

    /// Bytes from one ring's part to the next one's.
    fn stride(self) -> u64 {
        (HEADER_SIZE + u64::from(self.queue_size) * ENTRY_SIZE).next_multiple_of(ALIGNMENT)
    }

    /// Bytes of all parts.
    fn size(self) -> u64 {
        self.stride() * u64::from(self.queues)
    }
}

/// Makes the memory that `asked` is about. Nobody can resize it.
pub(super) fn create(asked: Description, limits: Limits) -> Result<(Description, OwnedFd), RegionError> {
    asked.check(limits)?;
    let area = InflightArea { size: asked.size(), offset: BarOffset(0) };
    let file = memfd_create("vvu-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, area.size)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok((Description { area, ..asked }, file))
}

/// A mapped region. The front-end can write to it at any time.
#[derive(Debug)]
pub(super) struct Region {
    description: Description,
    memory: GuestMemoryMmap,
}

impl Region {
    /// Maps what the front-end handed in.
    pub(super) fn open(
        description: Description,
        fds: Vec<OwnedFd>,
        limits: Limits,
    ) -> Result<Self, RegionError> {
        description.check(limits)?;
        let InflightArea { size, offset } = description.area;
        let want = description.size();
        if size < want || !offset.0.is_multiple_of(PAGE_SIZE) {
            return Err(RegionError::Place { size, offset, want });
        }
        let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| RegionError::Fds { got: fds.len() })?;
        if can_shrink(&fd)? {
            return Err(RegionError::CanShrink);
        }
        let map = |error: &dyn std::fmt::Display| RegionError::Map(error.to_string());
        let end = offset.0.checked_add(want);
        let length = u64::try_from(fstat(&fd)?.st_size).unwrap_or(0);
        if end.is_none_or(|end| end > length) {
            return Err(map(&format_args!("its file ends at {length:#x}")));
        }
        let length = usize::try_from(want).map_err(|error| map(&error))?;
        let file = FileOffset::new(File::from(fd), offset.0);
        let mapping = MmapRegion::from_file(file, length).map_err(|error| map(&error))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(0));
        let region = region.ok_or_else(|| map(&"the address space ends"))?;
        let memory = GuestMemoryMmap::from_regions(vec![region]).map_err(|error| map(&error))?;
        Ok(Self { description, memory })
    }

    pub(super) fn tracker(&self, index: usize, size: u16) -> Result<Tracker, RegionError> {
        let Description { queues, queue_size, .. } = self.description;
        match u16::try_from(index) {
            Ok(ring) if ring < queues && size <= queue_size => {
                let base = self.description.stride() * u64::from(ring);
                Ok(Tracker::new(self.memory.clone(), GuestAddress(base), queue_size))
            }
            _ => Err(RegionError::NoPlace { queues, queue_size, index, size }),
        }
    }
}

/// Whether somebody else can take away the memory behind a mapping of `fd`.
fn can_shrink(fd: impl AsFd) -> Result<bool, RegionError> {
    match fcntl_get_seals(&fd) {
        Ok(seals) => Ok(!seals.contains(SealFlags::SHRINK)),
        // What has no seals may still be the memory of a PCI device, whose size is fixed.
        Err(Errno::INVAL) => Ok(fstatfs(&fd)?.f_type != SYSFS),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
#[path = "region_test.rs"]
mod tests;
