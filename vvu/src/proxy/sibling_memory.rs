//! The sibling memory file: the sibling's RAM, which the shared memory BAR is a window of.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};

use crate::spec::addr::BarOffset;
use crate::spec::vhost_user::{MemoryRegion, PAGE_SIZE};

/// Creates a sibling memory file of `size` bytes that nobody can resize: neither the front-end nor a
/// guest can make an access to the shared memory BAR fault.
///
/// # Errors
/// When the kernel refuses, for instance for want of memory.
pub fn create_sibling_memory(size: u64) -> io::Result<File> {
    let memory = memfd_create("vvu-sibling-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&memory, size)?;
    fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(memory.into())
}

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
    #[error("cannot look at the file of a memory region: {0}")]
    Io(#[from] rustix::io::Errno),
}

#[derive(Debug)]
pub(crate) struct SiblingMemory {
    file: File,
    len: u64,
    identity: (u64, u64),
}

impl SiblingMemory {
    pub(crate) fn new(file: File) -> io::Result<Self> {
        let stat = fstat(&file)?;
        let len = u64::try_from(stat.st_size).unwrap_or(0);
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) {
            let text = format!("sibling memory file has {len} bytes: want a multiple of {PAGE_SIZE} above 0");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(Self { file, len, identity: (stat.st_dev, stat.st_ino) })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Bytes in the file.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Checks that `region`, which the front-end says is in the file `fd`, is in this file.
    pub(crate) fn check(&self, region: &MemoryRegion, fd: impl AsFd) -> Result<(), MemoryError> {
        let stat = fstat(fd)?;
        if (stat.st_dev, stat.st_ino) != self.identity {
            return Err(MemoryError::Foreign { gpa: region.gpa.0 });
        }
        let end = region.offset.0.checked_add(region.size);
        if end.is_none_or(|end| end > self.len) {
            let MemoryRegion { offset, size, .. } = *region;
            return Err(MemoryError::Beyond { offset, size, len: self.len });
        }
        Ok(())
    }

    /// Reads for a VMM that does not map the BAR; what is beyond the file reads as zeroes.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let end = data.len().min(usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX));
        if let Err(error) = self.file.read_exact_at(&mut data[..end], offset) {
            log::warn!("reading sibling memory at {offset:#x}: {error}");
        }
    }

    /// Writes for a VMM that does not map the BAR; what is beyond the file is ignored.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let end = data.len().min(usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX));
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
        let file = create_sibling_memory(0x4000).expect("memfd");
        let same = file.try_clone().expect("dup");
        let other = create_sibling_memory(0x4000).expect("memfd");
        let memory = SiblingMemory::new(file).expect("memory");
        assert!(memory.check(&region(0x1000, 0x3000), &same).is_ok());
        assert!(matches!(memory.check(&region(0, 0x1000), &other), Err(MemoryError::Foreign { .. })));
        for (offset, size) in [(0x1000, 0x4000), (0x4000, 0x1000), (u64::MAX - 0xfff, 0x1000)] {
            assert!(matches!(memory.check(&region(offset, size), &same), Err(MemoryError::Beyond { .. })));
        }
    }

    #[test]
    fn nobody_can_shrink_it() {
        let file = create_sibling_memory(0x4000).expect("memfd");
        assert!(file.set_len(0x1000).is_err());
        assert!(file.set_len(0x8000).is_err());
    }

    #[test]
    fn trapped_accesses_reach_the_file_and_nothing_beyond() {
        let memory = SiblingMemory::new(create_sibling_memory(0x1000).expect("memfd")).expect("memory");
        memory.write(0xffc, &[1, 2, 3, 4, 5, 6]);
        let mut data = [9; 6];
        memory.read(0xffc, &mut data);
        assert_eq!(data, [1, 2, 3, 4, 0, 0]);
        memory.write(u64::MAX, &[1]);
        memory.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 6]);
    }

    #[test]
    fn an_empty_or_odd_file_is_refused() {
        for size in [0, 1000] {
            let file: File = memfd_create("odd", MemfdFlags::CLOEXEC).expect("memfd").into();
            file.set_len(size).expect("truncate");
            assert!(SiblingMemory::new(file).is_err());
        }
    }
}
