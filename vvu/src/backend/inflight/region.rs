//! The memory of all trackers of a connection: how it is made, what is accepted from a front-end, and where each ring's
//! part is.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs, ftruncate, memfd_create,
};
use rustix::io::Errno;
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::tracker::{ENTRY_SIZE, HEADER_SIZE, Tracker};
use crate::spec::PAGE_SIZE;

/// Each ring's part starts at a multiple of this, as in QEMU's back-ends.
const ALIGNMENT: u64 = 64;
/// `f_type` of sysfs, where a PCI device's memory is (`SYSFS_MAGIC`).
const SYSFS: i64 = 0x6265_6572;
/// `f_type` of files in huge pages (`HUGETLBFS_MAGIC`).
const HUGETLBFS: i64 = 0x9584_58f6;

/// Why a front-end gets no in-flight region, or cannot hand one in.
#[derive(Debug, thiserror::Error)]
pub(in crate::backend) enum RegionError {
    #[error("in-flight region for {got} queues: want 1 to {most}")]
    Queues { got: u16, most: u16 },
    #[error("in-flight region for queues of {got} descriptors: want 1 to {most}")]
    QueueSize { got: u16, most: u16 },
    #[error(
        "in-flight region of {size:#x} bytes at offset {offset:#x}: want {want:#x} bytes on a page boundary"
    )]
    Place { size: u64, offset: u64, want: u64 },
    /// An access to memory that is gone would end this process.
    #[error(
        "the file of the in-flight region can shrink: want the one that GET_INFLIGHT_FD returned, or one sealed with F_SEAL_SHRINK"
    )]
    CanShrink,
    /// An access fails, and ends this process, when no huge page is free.
    #[error(
        "the in-flight region is in huge pages: want the one that GET_INFLIGHT_FD returned, or ordinary pages"
    )]
    HugePages,
    #[error("cannot map the in-flight region: {0}")]
    Map(String),
    #[error("cannot use an in-flight region: {0}")]
    Io(#[from] Errno),
    #[error(
        "the in-flight region is for {queues} queues of {queue_size} descriptors: it has no place for queue {index} of {size}"
    )]
    NoPlace { queues: u16, queue_size: u16, index: u16, size: u16 },
}

/// The queues of the device.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend) struct Limits {
    pub(in crate::backend) queues: u16,
    /// Descriptors of the largest queue.
    pub(in crate::backend) queue_size: u16,
}

/// A file, whatever descriptors and paths lead to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// The identity of an open file.
    pub(in crate::backend) fn of(file: &File) -> io::Result<Self> {
        let stat = fstat(file)?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }
}

/// The queues that a region is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    queues: u16,
    /// Descriptors of the largest queue.
    queue_size: u16,
}

impl Layout {
    fn of(description: &VhostUserInflight, limits: Limits) -> Result<Self, RegionError> {
        let (queues, queue_size) = (description.num_queues, description.queue_size);
        if !(1..=limits.queues).contains(&queues) {
            return Err(RegionError::Queues { got: queues, most: limits.queues });
        }
        if !(1..=limits.queue_size).contains(&queue_size) {
            return Err(RegionError::QueueSize { got: queue_size, most: limits.queue_size });
        }
        Ok(Self { queues, queue_size })
    }

    /// Bytes from the start of one ring's part to the start of the next.
    fn stride(self) -> u64 {
        (HEADER_SIZE + u64::from(self.queue_size) * ENTRY_SIZE).next_multiple_of(ALIGNMENT)
    }

    /// Bytes of all parts.
    fn size(self) -> u64 {
        self.stride() * u64::from(self.queues)
    }
}

/// Makes a region for the queues that `asked` names, in a file whose size is sealed.
///
/// # Errors
/// [`RegionError::Queues`], [`RegionError::QueueSize`], [`RegionError::Io`].
pub(in crate::backend) fn create(
    asked: &VhostUserInflight,
    limits: Limits,
) -> Result<(VhostUserInflight, File), RegionError> {
    let layout = Layout::of(asked, limits)?;
    let file = memfd_create("vvu-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, layout.size())?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let made = VhostUserInflight::new(layout.size(), 0, layout.queues, layout.queue_size);
    Ok((made, file.into()))
}

/// An empty file, for an answer that says that there is no region.
///
/// # Errors
/// When there is no file descriptor left.
pub(in crate::backend) fn no_file() -> Result<File, RegionError> {
    Ok(memfd_create("vvu-no-inflight", MemfdFlags::CLOEXEC)?.into())
}

/// A mapped region. The front-end can write to it at any time.
#[derive(Debug)]
pub(in crate::backend) struct Region {
    layout: Layout,
    memory: GuestMemoryMmap,
}

impl Region {
    /// Maps the region that the front-end handed in. `lasting` is a file that nobody makes shorter, although the file itself does not say so.
    ///
    /// # Errors
    /// [`RegionError`].
    pub(in crate::backend) fn open(
        description: &VhostUserInflight,
        file: File,
        limits: Limits,
        lasting: Option<FileId>,
    ) -> Result<Self, RegionError> {
        let layout = Layout::of(description, limits)?;
        let VhostUserInflight { mmap_size: size, mmap_offset: offset, .. } = *description;
        let want = layout.size();
        if size < want || !offset.is_multiple_of(PAGE_SIZE) {
            return Err(RegionError::Place { size, offset, want });
        }
        let lasts = lasting.is_some() && FileId::of(&file).ok() == lasting;
        let length = match fixed_length(&file)? {
            Some(length) => length,
            None if lasts => u64::try_from(fstat(&file)?.st_size).unwrap_or(0),
            None => return Err(RegionError::CanShrink),
        };
        if fstatfs(&file)?.f_type == HUGETLBFS {
            return Err(RegionError::HugePages);
        }
        let map = |error: &dyn std::fmt::Display| RegionError::Map(error.to_string());
        let end = offset.checked_add(want);
        if end.is_none_or(|end| end > length) {
            return Err(map(&format_args!("its file ends at {length:#x}")));
        }
        let length = usize::try_from(want).map_err(|error| map(&error))?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), length);
        let region = GuestRegionMmap::new(mapping.map_err(|error| map(&error))?, GuestAddress(0));
        let region = region.ok_or_else(|| map(&"the address space ends"))?;
        let memory = GuestMemoryMmap::from_regions(vec![region]).map_err(|error| map(&error))?;
        Ok(Self { layout, memory })
    }

    /// The tracker of ring `index`, which has `size` descriptors. `None` if the front-end made the region for smaller
    /// rings: QEMU 10.0 asks for a region for 128 descriptors and starts rings of 1024.
    ///
    /// # Errors
    /// [`RegionError::NoPlace`] when the region is for fewer rings.
    pub(in crate::backend) fn tracker(
        &self,
        index: u16,
        size: u16,
    ) -> Result<Option<Tracker<GuestMemoryMmap>>, RegionError> {
        match self.place(index, size) {
            Ok(tracker) => Ok(Some(tracker)),
            Err(error) if index < self.layout.queues => {
                log::warn!("queue {index} is served without in-flight tracking: {error}");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn place(&self, index: u16, size: u16) -> Result<Tracker<GuestMemoryMmap>, RegionError> {
        let Layout { queues, queue_size } = self.layout;
        if index >= queues || size > queue_size {
            return Err(RegionError::NoPlace { queues, queue_size, index, size });
        }
        let base = self.layout.stride() * u64::from(index);
        Ok(Tracker::new(self.memory.clone(), GuestAddress(base), queue_size))
    }
}

/// The bytes of a file that nobody can shrink, so that nobody can take away the memory behind a mapping of it; `None` if
/// somebody could.
fn fixed_length(fd: impl AsFd) -> Result<Option<u64>, RegionError> {
    let length = || fstat(&fd).map(|stat| Some(u64::try_from(stat.st_size).unwrap_or(0)));
    match fcntl_get_seals(&fd) {
        Ok(seals) if seals.contains(SealFlags::SHRINK) => Ok(length()?),
        Ok(_) => Ok(None),
        // A file without seals may still be the memory of a PCI device, whose size is fixed.
        Err(Errno::INVAL) if fstatfs(&fd)?.f_type == SYSFS => Ok(length()?),
        // VFIO's tells no size, and the kernel maps nothing behind a region of the device.
        Err(Errno::INVAL) if is_vfio_device(&fd) => Ok(Some(u64::MAX)),
        Err(Errno::INVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether `fd` is VFIO's descriptor of a device. The bridge hands it over where the kernel does not map the file in sysfs.
fn is_vfio_device(fd: impl AsFd) -> bool {
    let link = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    rustix::fs::readlink(link, Vec::new()).is_ok_and(|name| name.as_bytes() == b"anon_inode:[vfio-device]")
}

#[cfg(test)]
#[path = "region_test.rs"]
mod tests;
