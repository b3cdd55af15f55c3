//! The sibling memory file: the sibling's RAM, which the shared memory BAR is a window of.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs,
    ftruncate, memfd_create,
};
use rustix::io::Errno;

use super::claim::claim;
use crate::spec::addr::BarOffset;
use crate::spec::vhost_user::{InflightArea, MemoryRegion};
use crate::spec::{HUGE_PAGE_SIZE, PAGE_SIZE};

/// Bytes of a back-end's in-flight region, of which there are some after the sibling's RAM: both the
/// front-end and the device VM can map them there (vhost-user, "Inflight I/O tracking"). Enough for 128
/// queues of 1024 descriptors.
const INFLIGHT_SIZE: u64 = 4 << 20;
/// In-flight regions in the file, and so devices that can share one sibling.
const INFLIGHT_REGIONS: u64 = 8;
/// Bytes after the sibling's RAM. They take no memory until they are used.
const TAIL_SIZE: u64 = INFLIGHT_REGIONS * INFLIGHT_SIZE;

/// Why a memory region of the front-end cannot be shown in the shared memory BAR.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error(
        "memory region {gpa:#x} is not in the sibling memory file: start the sibling with \
         -object memory-backend-file,id=mem,share=on,mem-path=<the file vvu proxy names> -machine memory-backend=mem"
    )]
    Foreign { gpa: u64 },
    #[error(
        "memory region at offset {offset} of size {size:#x} ends beyond the sibling memory file of {len:#x} bytes: \
         give vvu proxy the sibling's memory size"
    )]
    Beyond { offset: BarOffset, size: u64, len: u64 },
    #[error(
        "in-flight region of {size:#x} bytes: want at most {INFLIGHT_SIZE:#x}, behind the RAM in the sibling memory file"
    )]
    Inflight { size: u64 },
    #[error("cannot use the file of a memory region: {0}")]
    Io(#[from] Errno),
    #[error("cannot hand out the sibling memory file: {0}")]
    File(io::Error),
}

/// Why there is no sibling memory file to use.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Such a size cannot be.
    #[error("sibling memory of {got} bytes: want a multiple of {page} above 0")]
    Size {
        /// Bytes asked for.
        got: u64,
        /// Bytes of a page.
        page: u64,
    },
    /// The kernel has not enough huge pages.
    #[error(
        "cannot have {wanted} huge pages of 2 MiB: {source}; reserve them with `sysctl vm.nr_hugepages={wanted}`, and \
         more if others use some"
    )]
    HugePages {
        /// Pages asked for.
        wanted: u64,
        /// The cause.
        source: io::Error,
    },
    /// The file is not one that another proxy made.
    #[error("this is no sibling memory file: want one that another vvu proxy made")]
    Kind,
    /// All in-flight regions are taken.
    #[error("{INFLIGHT_REGIONS} proxies use this sibling memory file already: no more can")]
    Full,
    /// The kernel refused, for instance for want of memory.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Errno> for OpenError {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// The sibling memory file. Several devices may serve one sibling, and then share it.
#[derive(Debug)]
pub struct SiblingMemory {
    file: File,
    ram: u64,
    /// Offset of the in-flight region of this device.
    inflight: u64,
    identity: (u64, u64),
    /// The file is made of huge pages.
    huge: bool,
}

impl SiblingMemory {
    /// Nobody can resize the file: neither the front-end nor a guest can make an access to the shared
    /// memory BAR fault.
    const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);
    const NAME: &str = "vvu-sibling-memory";
    const FLAGS: MemfdFlags = MemfdFlags::CLOEXEC.union(MemfdFlags::ALLOW_SEALING);

    /// Creates a file for `ram` bytes of sibling RAM, a multiple of the page size above 0.
    ///
    /// # Errors
    /// [`OpenError::Size`], [`OpenError::Io`].
    pub fn create(ram: u64) -> Result<Self, OpenError> {
        let size = Self::file_size(ram, PAGE_SIZE)?;
        let file = memfd_create(Self::NAME, Self::FLAGS)?;
        ftruncate(&file, size)?;
        fcntl_add_seals(&file, Self::SEALS)?;
        Self::open(file.into())
    }

    /// Creates a file of huge pages of 2 MiB, which are all taken at once: nobody who uses the memory can find later
    /// that there are none left.
    ///
    /// # Errors
    /// [`OpenError::Size`], [`OpenError::HugePages`], [`OpenError::Io`].
    pub fn create_huge(ram: u64) -> Result<Self, OpenError> {
        let size = Self::file_size(ram, HUGE_PAGE_SIZE)?;
        let wanted = size / HUGE_PAGE_SIZE;
        let lacking = |error: Errno| OpenError::HugePages { wanted, source: error.into() };
        let flags = Self::FLAGS | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let file = memfd_create(Self::NAME, flags).map_err(lacking)?;
        ftruncate(&file, size)?;
        fallocate(&file, FallocateFlags::empty(), 0, size).map_err(lacking)?;
        fcntl_add_seals(&file, Self::SEALS)?;
        Self::open(file.into())
    }

    fn file_size(ram: u64, page: u64) -> Result<u64, OpenError> {
        let size = ram.checked_add(TAIL_SIZE).filter(|_| ram > 0 && ram.is_multiple_of(page));
        size.ok_or(OpenError::Size { got: ram, page })
    }

    /// Uses the file that another device of the same sibling has; `file` must be an opening of its own.
    ///
    /// # Errors
    /// [`OpenError::Kind`], [`OpenError::Full`], [`OpenError::Io`].
    pub fn open(file: File) -> Result<Self, OpenError> {
        let stat = fstat(&file)?;
        let sealed = fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(Self::SEALS));
        let ram = u64::try_from(stat.st_size).unwrap_or(0).saturating_sub(TAIL_SIZE);
        if !sealed || ram == 0 || !ram.is_multiple_of(PAGE_SIZE) {
            return Err(OpenError::Kind);
        }
        let identity = (stat.st_dev, stat.st_ino);
        let huge = fstatfs(&file)?.f_type == libc::HUGETLBFS_MAGIC;
        for region in 0..INFLIGHT_REGIONS {
            let inflight = ram + region * INFLIGHT_SIZE;
            if claim(&file, inflight)? {
                return Ok(Self { file, ram, inflight, identity, huge });
            }
        }
        Err(OpenError::Full)
    }

    /// The file; the sibling's RAM is at its start.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes in the file, which are more than the sibling's RAM.
    pub(crate) fn size(&self) -> u64 {
        self.ram + TAIL_SIZE
    }

    /// Checks that `region`, which the front-end says is in the file `fd`, is in this file's RAM.
    pub(crate) fn check(&self, region: &MemoryRegion, fd: impl AsFd) -> Result<(), MemoryError> {
        let MemoryRegion { gpa, size, offset, .. } = *region;
        if !self.is(fd)? {
            return Err(MemoryError::Foreign { gpa: gpa.0 });
        }
        let end = offset.0.checked_add(size);
        if end.is_none_or(|end| end > self.ram) {
            return Err(MemoryError::Beyond { offset, size, len: self.ram });
        }
        Ok(())
    }

    /// Checks that an in-flight region, which the front-end says is in the file `fd`, is where this
    /// file has one.
    pub(crate) fn check_inflight(&self, area: InflightArea, fd: impl AsFd) -> Result<(), MemoryError> {
        let fits = area.offset.0 == self.inflight && area.size <= INFLIGHT_SIZE;
        if fits && self.is(fd)? { Ok(()) } else { Err(MemoryError::Inflight { size: area.size }) }
    }

    /// Gives the back-end `size` zeroed bytes to track requests in.
    pub(crate) fn allocate_inflight(&self, size: u64) -> Result<InflightArea, MemoryError> {
        if size > INFLIGHT_SIZE {
            return Err(MemoryError::Inflight { size });
        }
        let zero = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, zero, self.inflight, INFLIGHT_SIZE)?;
        if self.huge {
            // A huge page is not there for whoever touches it, so it is taken again at once.
            fallocate(&self.file, FallocateFlags::empty(), self.inflight, INFLIGHT_SIZE)?;
        }
        // Whole pages: huge ones are not unmapped in part.
        let size = if self.huge { size.next_multiple_of(HUGE_PAGE_SIZE) } else { size };
        Ok(InflightArea { size, offset: BarOffset(self.inflight) })
    }

    /// Whether `fd` is this very file.
    fn is(&self, fd: impl AsFd) -> Result<bool, MemoryError> {
        let stat = fstat(fd)?;
        Ok((stat.st_dev, stat.st_ino) == self.identity)
    }

    /// Reads for a VMM that does not map the BAR; what is beyond the file reads as zeroes.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let end = data.len().min(usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX));
        if let Err(error) = self.file.read_exact_at(&mut data[..end], offset) {
            log::warn!("reading sibling memory at {offset:#x}: {error}");
        }
    }

    /// Writes for a VMM that does not map the BAR; what is beyond the file is ignored.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let end = data.len().min(usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX));
        if let Err(error) = self.file.write_all_at(&data[..end], offset) {
            log::warn!("writing sibling memory at {offset:#x}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::addr::{SiblingGpa, SiblingVa};

    fn region(offset: u64, size: u64) -> MemoryRegion {
        MemoryRegion { gpa: SiblingGpa(0), size, va: SiblingVa(0), offset: BarOffset(offset) }
    }

    #[test]
    fn only_ranges_of_this_very_file_are_accepted() {
        let memory = SiblingMemory::create(0x4000).expect("memory");
        let other = SiblingMemory::create(0x4000).expect("memory");
        let same = memory.file().try_clone().expect("dup");
        assert!(memory.check(&region(0x1000, 0x3000), &same).is_ok());
        assert!(matches!(memory.check(&region(0, 0x1000), other.file()), Err(MemoryError::Foreign { .. })));
        for (offset, size) in [(0x1000, 0x4000), (0x4000, 0x1000), (u64::MAX - 0xfff, 0x1000)] {
            assert!(matches!(memory.check(&region(offset, size), &same), Err(MemoryError::Beyond { .. })));
        }
    }

    #[test]
    fn nobody_can_resize_it() {
        let memory = SiblingMemory::create(0x4000).expect("memory");
        assert!(memory.file().set_len(0x1000).is_err());
        assert!(memory.file().set_len(0x4000_0000).is_err());
    }

    #[test]
    fn trapped_accesses_reach_the_file_and_nothing_beyond() {
        let memory = SiblingMemory::create(0x1000).expect("memory");
        let end = memory.size();
        memory.write(end - 4, &[1, 2, 3, 4, 5, 6]);
        let mut data = [9; 6];
        memory.read(end - 4, &mut data);
        assert_eq!(data, [1, 2, 3, 4, 0, 0]);
        memory.write(u64::MAX, &[1]);
        memory.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 6]);
    }

    #[test]
    fn an_in_flight_region_is_zeroed_and_has_one_place() {
        let memory = SiblingMemory::create(0x1000).expect("memory");
        memory.write(0x1000, &[1; 8]);
        let area = memory.allocate_inflight(0x2000).expect("area");
        assert_eq!(area, InflightArea { size: 0x2000, offset: BarOffset(0x1000) });
        let mut data = [9; 8];
        memory.read(0x1000, &mut data);
        assert_eq!(data, [0; 8]);
        assert!(memory.check_inflight(area, memory.file()).is_ok());
        let other = SiblingMemory::create(0x1000).expect("memory");
        assert!(memory.check_inflight(area, other.file()).is_err());
        assert!(memory.check_inflight(InflightArea { offset: BarOffset(0), ..area }, memory.file()).is_err());
        assert!(memory.allocate_inflight(INFLIGHT_SIZE + 1).is_err());
    }

    /// A new opening of the file of `memory`.
    fn reopen(memory: &SiblingMemory) -> File {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/self/fd/{}", memory.file().as_raw_fd());
        File::options().read(true).write(true).open(path).expect("reopen")
    }

    #[test]
    fn devices_that_share_a_file_have_in_flight_regions_of_their_own() {
        let first = SiblingMemory::create(0x1000).expect("memory");
        let mut others: Vec<_> =
            (1..INFLIGHT_REGIONS).map(|_| SiblingMemory::open(reopen(&first)).expect("shared")).collect();
        assert!(matches!(SiblingMemory::open(reopen(&first)), Err(OpenError::Full)));
        let last = others.last().expect("last").allocate_inflight(0x1000).expect("area");
        assert_eq!(last.offset.0, 0x1000 + (INFLIGHT_REGIONS - 1) * INFLIGHT_SIZE);
        assert!(first.check_inflight(last, first.file()).is_err());
        others.remove(2);
        let again = SiblingMemory::open(reopen(&first)).expect("freed");
        assert_eq!(again.inflight, 0x1000 + 3 * INFLIGHT_SIZE);
    }

    #[test]
    fn any_other_file_is_refused() {
        let plain = tempfile::tempfile().expect("file");
        plain.set_len(TAIL_SIZE + 0x1000).expect("size");
        assert!(matches!(SiblingMemory::open(plain), Err(OpenError::Kind)));
        let unsealed = memfd_create("plain", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("memfd");
        ftruncate(&unsealed, TAIL_SIZE + 0x1000).expect("size");
        assert!(matches!(SiblingMemory::open(unsealed.into()), Err(OpenError::Kind)));
    }

    /// Does what can be done on this machine, and says which: nothing here changes how many huge pages there are.
    #[test]
    fn huge_pages_are_all_there_or_their_lack_is_explained() {
        match SiblingMemory::create_huge(4 << 20) {
            Ok(memory) => {
                eprintln!("with the huge pages of this machine");
                assert_eq!(fstatfs(memory.file()).expect("fstatfs").f_type, libc::HUGETLBFS_MAGIC);
                let allocated = fstat(memory.file()).expect("fstat").st_blocks * 512;
                assert_eq!(u64::try_from(allocated), Ok(memory.size()));
                let area = memory.allocate_inflight(0x2000).expect("area");
                assert_eq!((area.offset.0, area.size), (4 << 20, HUGE_PAGE_SIZE));
                let after = fstat(memory.file()).expect("fstat").st_blocks * 512;
                assert_eq!(after, allocated);
                let shared = SiblingMemory::open(reopen(&memory)).expect("shared");
                assert!(shared.check(&region(0, 4 << 20), memory.file()).is_ok());
            }
            Err(error) => {
                eprintln!("without huge pages: {error}");
                assert!(matches!(error, OpenError::HugePages { wanted: 18, .. }), "{error}");
                assert!(error.to_string().contains("sysctl vm.nr_hugepages=18"), "{error}");
            }
        }
        let odd = SiblingMemory::create_huge(1 << 20).expect_err("odd").to_string();
        assert!(odd.contains("want a multiple of 2097152"), "{odd}");
    }

    #[test]
    fn odd_sizes_are_refused() {
        for ram in [0, 1000, !0xfff] {
            assert!(SiblingMemory::create(ram).is_err());
        }
    }
}
