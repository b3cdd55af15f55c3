//! The sibling memory file: it holds the sibling's RAM, and the shared memory BAR shows it.
//!
//! From its start: the header, if the file is made for a window; the sibling's RAM; in-flight regions.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs,
    ftruncate, memfd_create,
};
use rustix::io::Errno;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::claim::{claim, is_claimed};
use crate::spec::addr::BarOffset;
use crate::spec::vhost_user::{InflightArea, MemoryRegion};
use crate::spec::{HUGE_PAGE_SIZE, PAGE_SIZE};

/// Bytes of an in-flight region (vhost-user, "Inflight I/O tracking"), enough for 128 queues of 1024
/// descriptors. The regions follow the sibling's RAM, where front-end and device VM can map them.
const INFLIGHT_SIZE: u64 = 4 << 20;
/// In-flight regions in the file. Each device of a sibling uses one.
const INFLIGHT_REGIONS: u64 = 8;
/// Bytes after the sibling's RAM. The kernel allocates them when they are used.
const TAIL_SIZE: u64 = INFLIGHT_REGIONS * INFLIGHT_SIZE;

/// Bytes in front of the sibling's RAM in a file for a window. The device VM keeps the metadata of a file system there,
/// and neither its kernel nor that file system takes bytes of the sibling's guest for metadata.
const WINDOW_HEADER: u64 = HUGE_PAGE_SIZE;

/// Why the shared memory BAR cannot show a memory region of the front-end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error(
        "memory region {gpa:#x} is not in the sibling memory file: start the sibling with \
         -object memory-backend-file,id=mem,share=on,mem-path=<the file vvu proxy names> -machine memory-backend=mem, \
         and without devices that bring memory of their own (ivshmem-doorbell, ivshmem-plain, virtio-pmem-pci)"
    )]
    Foreign { gpa: u64 },
    #[error(
        "the sibling's memory is the file of another vvu proxy, and the proxy that made the one used here has ended: \
         start this proxy again, and then the device VM"
    )]
    Orphaned,
    #[error(
        "memory region at offset {offset} of size {size:#x} ends beyond the sibling memory file of {len:#x} bytes: \
         give vvu proxy the sibling's memory size"
    )]
    Beyond { offset: BarOffset, size: u64, len: u64 },
    #[error(
        "memory region at offset {offset} begins in the header of the sibling memory file: add offset={}M to the sibling's \
         -object memory-backend-file", header >> 20
    )]
    Header { offset: BarOffset, header: u64 },
    #[error(
        "in-flight region of {size:#x} bytes: want at most {INFLIGHT_SIZE:#x}, behind the RAM in the sibling memory file"
    )]
    Inflight { size: u64 },
    #[error("cannot use the file of a memory region: {0}")]
    Io(#[from] Errno),
    #[error("cannot hand out the sibling memory file: {0}")]
    File(io::Error),
}

/// Why a sibling memory file cannot be created or opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The size is 0 or not a multiple of the page size.
    #[error("sibling memory of {got} bytes: want a multiple of {page} above 0")]
    Size {
        /// Bytes asked for.
        got: u64,
        /// Bytes of a page.
        page: u64,
    },
    /// The host has not reserved enough huge pages.
    #[error(
        "cannot have {wanted} huge pages of 2 MiB: {source}; reserve them with `sysctl vm.nr_hugepages={wanted}`, and \
         more if other programs use some"
    )]
    HugePages {
        /// Pages asked for.
        wanted: u64,
        /// The cause.
        source: io::Error,
    },
    /// The file is not a sibling memory file.
    #[error("this is not a sibling memory file: want one that another vvu proxy made")]
    Kind,
    /// Other devices use all in-flight regions.
    #[error("{INFLIGHT_REGIONS} proxies use this sibling memory file already, which is the maximum")]
    Full,
    /// A system call failed, for instance because there is not enough memory.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl From<Errno> for OpenError {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// The kind of sibling memory file to create.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryOptions {
    /// Huge pages of 2 MiB. All are allocated at once, so that no later access fails for want of one.
    pub huge_pages: bool,
    /// A header of 2 MiB in front of the sibling's RAM, so that the device VM can have the file as persistent memory.
    pub window: bool,
}

/// A sibling memory file. The devices of one sibling share one file.
#[derive(Debug)]
pub struct SiblingMemory {
    file: File,
    /// Holds the claim on the in-flight region; never handed out.
    claims: File,
    /// Bytes before the RAM.
    header: u64,
    ram: u64,
    /// Offset of the in-flight region of this device.
    inflight: u64,
    identity: (u64, u64),
    /// The file consists of huge pages.
    huge: bool,
}

impl SiblingMemory {
    /// Seals that fix the size. So neither a front-end nor a guest can truncate the file and make an
    /// access to the shared memory BAR fault.
    const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);
    /// Name of the file in `/proc`. Nobody can change it, so it tells every proxy whether there is a header.
    const NAME: &str = "vvu-sibling-memory";
    const WINDOW_NAME: &str = "vvu-sibling-window";
    const FLAGS: MemfdFlags = MemfdFlags::CLOEXEC.union(MemfdFlags::ALLOW_SEALING);

    /// Creates a file for `ram` bytes of sibling RAM, a multiple of [`PAGE_SIZE`] above 0.
    ///
    /// # Errors
    /// [`OpenError::Size`], [`OpenError::Io`].
    pub fn create(ram: u64) -> Result<Self, OpenError> {
        Self::create_as(ram, MemoryOptions::default())
    }

    /// Creates a file for `ram` bytes of sibling RAM, above 0 and a multiple of [`PAGE_SIZE`], with either of the
    /// options of [`HUGE_PAGE_SIZE`].
    ///
    /// # Errors
    /// [`OpenError::Size`], [`OpenError::HugePages`], [`OpenError::Io`].
    pub fn create_as(ram: u64, options: MemoryOptions) -> Result<Self, OpenError> {
        let MemoryOptions { huge_pages, window } = options;
        let page = if huge_pages || window { HUGE_PAGE_SIZE } else { PAGE_SIZE };
        let (name, header) = if window { (Self::WINDOW_NAME, WINDOW_HEADER) } else { (Self::NAME, 0) };
        let size = ram.checked_add(header + TAIL_SIZE).filter(|_| ram > 0 && ram.is_multiple_of(page));
        let size = size.ok_or(OpenError::Size { got: ram, page })?;
        let wanted = size / HUGE_PAGE_SIZE;
        let lacking = |error: Errno| match huge_pages {
            true => OpenError::HugePages { wanted, source: error.into() },
            false => error.into(),
        };
        let huge = if huge_pages { MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB } else { MemfdFlags::empty() };
        let file = memfd_create(name, Self::FLAGS | huge).map_err(lacking)?;
        ftruncate(&file, size)?;
        if huge_pages {
            fallocate(&file, FallocateFlags::empty(), 0, size).map_err(lacking)?;
        }
        fcntl_add_seals(&file, Self::SEALS)?;
        Self::open(file.into())
    }

    /// Returns the sizes of header and RAM, as the name and the size of `file` tell.
    fn parts_of(file: &File, size: i64) -> io::Result<(u64, u64)> {
        let name = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let is_window = name.to_string_lossy().starts_with(&format!("/memfd:{} ", Self::WINDOW_NAME));
        let header = if is_window { WINDOW_HEADER } else { 0 };
        Ok((header, u64::try_from(size).unwrap_or(0).saturating_sub(header + TAIL_SIZE)))
    }

    /// Opens the file of another device of the same sibling.
    ///
    /// # Errors
    /// [`OpenError::Kind`], [`OpenError::Full`], [`OpenError::Io`].
    pub fn open(file: File) -> Result<Self, OpenError> {
        let stat = fstat(&file)?;
        let sealed = is_sealed(&file);
        let (header, ram) = Self::parts_of(&file, stat.st_size)?;
        if !sealed || ram == 0 || !ram.is_multiple_of(PAGE_SIZE) {
            return Err(OpenError::Kind);
        }
        let identity = (stat.st_dev, stat.st_ino);
        let huge = fstatfs(&file)?.f_type == libc::HUGETLBFS_MAGIC;
        // A claim belongs to an open file description and ends with its last duplicate. VMMs and
        // front-ends get duplicates of `file`, so the claim is made on a description of its own.
        let claims =
            File::options().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        for region in 0..INFLIGHT_REGIONS {
            let inflight = header + ram + region * INFLIGHT_SIZE;
            if claim(&claims, inflight)? {
                return Ok(Self { file, claims, header, ram, inflight, identity, huge });
            }
        }
        Err(OpenError::Full)
    }

    /// Takes over what [`parts`](Self::parts) returned in an earlier program of this process.
    ///
    /// # Errors
    /// [`OpenError::Kind`], [`OpenError::Io`].
    #[doc(hidden)]
    pub fn inherit(file: File, claims: File, inflight: u64) -> Result<Self, OpenError> {
        let stat = fstat(&file)?;
        let (header, ram) = Self::parts_of(&file, stat.st_size)?;
        if ram == 0 || inflight < header + ram {
            return Err(OpenError::Kind);
        }
        let identity = (stat.st_dev, stat.st_ino);
        let huge = fstatfs(&file)?.f_type == libc::HUGETLBFS_MAGIC;
        Ok(Self { file, claims, header, ram, inflight, identity, huge })
    }

    /// Makes a second handle of the same file and in-flight region.
    ///
    /// # Errors
    /// When there is no file descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        let (file, claims) = (self.file.try_clone()?, self.claims.try_clone()?);
        Ok(Self { file, claims, ..*self })
    }

    /// The file, the description that holds the claim, and the offset of the in-flight region.
    #[doc(hidden)]
    #[must_use]
    pub fn parts(&self) -> (&File, &File, u64) {
        (&self.file, &self.claims, self.inflight)
    }

    /// The file: header, RAM, in-flight regions.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of the file.
    pub(crate) fn size(&self) -> u64 {
        self.header + self.ram + TAIL_SIZE
    }

    /// Bytes before the sibling's RAM, 0 unless the file is made for a window.
    pub(crate) fn header(&self) -> u64 {
        self.header
    }

    /// Checks that `fd`, which came with a memory region, is this file and that the region lies in its RAM.
    pub(crate) fn check(&self, region: &MemoryRegion, fd: impl AsFd) -> Result<(), MemoryError> {
        let MemoryRegion { gpa, size, offset, .. } = *region;
        if !self.is(&fd)? {
            // A failure to look proves nothing.
            let orphaned = is_sealed(&fd) && self.is_orphaned().unwrap_or(false);
            return Err(if orphaned { MemoryError::Orphaned } else { MemoryError::Foreign { gpa: gpa.0 } });
        }
        if offset.0 < self.header {
            return Err(MemoryError::Header { offset, header: self.header });
        }
        let (end, len) = (offset.0.checked_add(size), self.header + self.ram);
        if end.is_none_or(|end| end > len) {
            return Err(MemoryError::Beyond { offset, size, len });
        }
        Ok(())
    }

    /// Checks that `fd`, which came with an in-flight region, is this file and that the region is this
    /// device's.
    pub(crate) fn check_inflight(&self, area: InflightArea, fd: impl AsFd) -> Result<(), MemoryError> {
        let fits = area.offset.0 == self.inflight && area.size <= INFLIGHT_SIZE;
        if fits && self.is(fd)? { Ok(()) } else { Err(MemoryError::Inflight { size: area.size }) }
    }

    /// Zeroes this device's in-flight region and returns where `size` bytes of it are.
    pub(crate) fn allocate_inflight(&self, size: u64) -> Result<InflightArea, MemoryError> {
        if size > INFLIGHT_SIZE {
            return Err(MemoryError::Inflight { size });
        }
        let zero = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, zero, self.inflight, INFLIGHT_SIZE)?;
        if self.huge {
            // The hole is filled at once: a later access must not fail for want of a huge page.
            fallocate(&self.file, FallocateFlags::empty(), self.inflight, INFLIGHT_SIZE)?;
        }
        // A part of a huge page cannot be mapped.
        let size = if self.huge { size.next_multiple_of(HUGE_PAGE_SIZE) } else { size };
        Ok(InflightArea { size, offset: BarOffset(self.inflight) })
    }

    /// Whether `fd` refers to this file.
    fn is(&self, fd: impl AsFd) -> Result<bool, MemoryError> {
        // fstat asks the file system, and that of a peer's file might not answer. Only a memfd has seals.
        if !is_sealed(&fd) {
            return Ok(false);
        }
        let stat = fstat(fd)?;
        Ok((stat.st_dev, stat.st_ino) == self.identity)
    }

    /// Whether the proxy that made the file has ended. The link to the file led to that proxy, so no sibling VM that
    /// starts from now on can have this memory.
    fn is_orphaned(&self) -> io::Result<bool> {
        let makers = self.header + self.ram;
        Ok(self.inflight != makers && !is_claimed(&self.claims, makers)?)
    }

    /// Reads for a VMM that does not map the BAR. Bytes beyond the file read as zeroes.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let end = data.len().min(usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX));
        if let Err(error) = self.file.read_exact_at(&mut data[..end], offset) {
            log::warn!("cannot read sibling memory at {offset:#x}: {error}");
        }
    }

    /// Writes for a VMM that does not map the BAR. Bytes beyond the file are ignored.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let end = data.len().min(usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX));
        let data = &data[..end];
        let written = match self.huge {
            // The kernel has no write(2) for files of huge pages.
            true => self.write_mapped(data, offset, HUGE_PAGE_SIZE),
            false => self.file.write_all_at(data, offset),
        };
        if let Err(error) = written {
            log::warn!("cannot write sibling memory at {offset:#x}: {error}");
        }
    }

    /// Writes `data` at `offset` by mapping the pages of `page` bytes that it lies in.
    fn write_mapped(&self, data: &[u8], offset: u64, page: u64) -> io::Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let start = offset - offset % page;
        let at = usize::try_from(offset - start).map_err(io::Error::other)?;
        let size = (at + data.len()).next_multiple_of(usize::try_from(page).map_err(io::Error::other)?);
        let file = FileOffset::new(self.file.try_clone()?, start);
        let pages = MmapRegion::<()>::from_file(file, size).map_err(io::Error::other)?;
        pages.as_volatile_slice().write_slice(data, at).map_err(io::Error::other)
    }
}

/// Whether `fd` is a file of fixed size, as a sibling memory file is.
fn is_sealed(fd: impl AsFd) -> bool {
    fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SiblingMemory::SEALS))
}

#[cfg(test)]
#[path = "sibling_memory_test.rs"]
mod tests;
