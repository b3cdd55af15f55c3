//! Device-VM memory as the device reaches it: the client's DMA maps, by I/O virtual address.
//!
//! Each file is mapped once and as a whole, even if many maps show parts of it, since a vIOMMU may map page by page. A
//! client that shrinks a file after it has lent it ends this process; QEMU seals its memory files against that.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::iter::FusedIterator;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Weak};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::Errno;
use vm_memory::guest_memory::{GuestMemorySliceIterator, Result as MemoryResult};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, MmapRegion, Permissions,
    VolatileMemory, VolatileSlice,
};

use crate::durable::{Adopted, Fd, Held, RestoreError};
use crate::spec::addr::Iova;
use crate::vfio_user::protocol::DMA_MAPS_MAX;

/// Most mappings of files at one time, each with a descriptor. QEMU has one file for each memory backend and ROM.
const MAPPINGS_MAX: usize = 64;

/// A DMA map or unmap was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// The range has no bytes, or ends behind the address space.
    #[error("DMA range of {size:#x} bytes at {iova}: want at least one byte, and an end below 2^64")]
    Range {
        /// First address.
        iova: Iova,
        /// Bytes.
        size: u64,
    },
    /// The map allows neither reads nor writes.
    #[error("DMA map at {iova} allows neither reads nor writes")]
    NoAccess {
        /// First address.
        iova: Iova,
    },
    /// The range overlaps one that is mapped.
    #[error("DMA map of {size:#x} bytes at {iova} overlaps the one at {other}: unmap that one first")]
    Overlap {
        /// First address.
        iova: Iova,
        /// Bytes.
        size: u64,
        /// First address of the map that is there.
        other: Iova,
    },
    /// The client has as many maps as it may.
    #[error("{DMA_MAPS_MAX} DMA maps are in use: unmap some, or map larger pages")]
    TooManyMaps,
    /// The client has as many mapped files as it may.
    #[error("{MAPPINGS_MAX} files are mapped for DMA already: want fewer memory backends")]
    TooManyFiles,
    /// The descriptor is not of a regular file.
    #[error("the file of the DMA map at {iova} is no regular file: use memory-backend-memfd,share=on")]
    NotAFile {
        /// First address.
        iova: Iova,
    },
    /// The file is too short for the range.
    #[error(
        "DMA map of {size:#x} bytes at file offset {offset:#x} ends after the file's {file_size:#x} bytes"
    )]
    BeyondFile {
        /// First byte in the file.
        offset: u64,
        /// Bytes.
        size: u64,
        /// Bytes of the file.
        file_size: u64,
    },
    /// The map is writable, but the file is opened for reading only.
    #[error("the file of the writable DMA map at {iova} is opened for reading only")]
    ReadOnlyFile {
        /// First address.
        iova: Iova,
    },
    /// The kernel does not map the file.
    #[error("cannot map the file of the DMA map at {iova}: {errno}")]
    Mmap {
        /// First address.
        iova: Iova,
        /// The cause.
        errno: Errno,
    },
}

impl DmaError {
    /// Returns the errno value for the reply.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Range { .. } | Self::NoAccess { .. } | Self::NotAFile { .. } | Self::BeyondFile { .. } => {
                Errno::INVAL
            }
            Self::Overlap { .. } => Errno::EXIST,
            Self::TooManyMaps | Self::TooManyFiles => Errno::NOSPC,
            Self::ReadOnlyFile { .. } => Errno::ACCESS,
            Self::Mmap { errno, .. } => *errno,
        }
    }
}

/// The DMA maps of a client.
#[derive(Debug, Default)]
pub struct DmaSpace {
    /// Maps by first address, without overlaps.
    maps: BTreeMap<u64, Map>,
    /// Mappings of files, each for as long as a map shows a part of it. A file that has grown has several.
    mappings: Vec<(FileId, Weak<Held<MmapRegion>>)>,
    /// The log says already that memory is inaccessible.
    reported: Cell<bool>,
    /// The maps differ from those that were saved.
    changed: bool,
}

/// A map as it is saved: first and last address, access as bits 0 (read) and 1 (write), and where its bytes are: the number
/// of a descriptor and an offset.
pub(super) type SavedMap = (u64, u64, u8, Option<(RawFd, u64)>);

#[derive(Debug)]
struct Map {
    /// Last address of the map. It is inclusive since a map may end at the end of the address space.
    last: u64,
    access: Permissions,
    /// `None` for memory that is mapped without a file.
    memory: Option<Memory>,
}

#[derive(Debug, Clone)]
struct Memory {
    file: Arc<Held<MmapRegion>>,
    offset: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
    writable: bool,
}

impl DmaSpace {
    /// Maps `size` bytes at `iova` to the bytes at an offset of a file. Without a file every access to the range fails.
    ///
    /// # Errors
    /// [`DmaError`]; nothing is mapped then.
    pub fn map(
        &mut self,
        iova: Iova,
        size: u64,
        access: Permissions,
        file: Option<(OwnedFd, u64)>,
    ) -> Result<(), DmaError> {
        self.map_held(iova, size, access, file.map(|(fd, offset)| (fd.into(), offset)))
    }

    /// As [`map`](Self::map), with a descriptor that the saved state may name.
    pub(super) fn map_held(
        &mut self,
        iova: Iova,
        size: u64,
        access: Permissions,
        file: Option<(Fd, u64)>,
    ) -> Result<(), DmaError> {
        let last = last_address(iova, size)?;
        if access == Permissions::No {
            return Err(DmaError::NoAccess { iova });
        }
        if let Some((&other, _)) = self.last_overlap(iova.0, last) {
            return Err(DmaError::Overlap { iova, size, other: Iova(other) });
        }
        if self.maps.len() >= DMA_MAPS_MAX {
            return Err(DmaError::TooManyMaps);
        }
        let memory = match file {
            Some((fd, offset)) => {
                let file = self.map_file(fd, iova, size, offset, access)?;
                Some(Memory { file, offset })
            }
            None => None,
        };
        self.maps.insert(iova.0, Map { last, access, memory });
        self.changed = true;
        Ok(())
    }

    /// Returns the maps if they have changed since the last call.
    pub(super) fn save(&mut self) -> Option<Vec<SavedMap>> {
        let number = |memory: &Memory| memory.file.file_offset().map_or(-1, |file| file.file().as_raw_fd());
        let saved = |(first, map): (&u64, &Map)| {
            let access =
                u8::from(map.access.allow(Permissions::Read)) | u8::from(map.access.has_write()) << 1;
            (*first, map.last, access, map.memory.as_ref().map(|memory| (number(memory), memory.offset)))
        };
        std::mem::take(&mut self.changed).then(|| self.maps.iter().map(saved).collect())
    }

    /// Restores the maps.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub(super) fn restore(&mut self, saved: Vec<SavedMap>, left: &mut Adopted) -> Result<(), RestoreError> {
        let mut files: BTreeMap<RawFd, Arc<Held<MmapRegion>>> = BTreeMap::new();
        for (first, last, access, memory) in saved {
            let access = match access {
                1 => Permissions::Read,
                2 => Permissions::Write,
                _ => Permissions::ReadWrite,
            };
            let size = last.wrapping_sub(first).wrapping_add(1);
            let memory = match memory {
                None => None,
                Some((number, offset)) => {
                    let file = match files.get(&number) {
                        Some(file) => file.clone(),
                        None => {
                            // The kernel mapped it before; the range was checked against what the file has.
                            let file =
                                self.map_file(left.adopt(number)?, Iova(first), 0, 0, Permissions::Read);
                            let file = file.map_err(|error| RestoreError::Value(error.to_string()))?;
                            files.entry(number).or_insert(file).clone()
                        }
                    };
                    let end = offset.checked_add(size).and_then(|end| usize::try_from(end).ok());
                    if end.is_none_or(|end| end > file.size()) {
                        return Err(RestoreError::Value(format!(
                            "the file of the DMA map at {first:#x} has shrunk"
                        )));
                    }
                    Some(Memory { file, offset })
                }
            };
            self.maps.insert(first, Map { last, access, memory });
        }
        self.changed = true;
        Ok(())
    }

    /// Maps the file `fd`, which has to hold `size` bytes at `offset`.
    fn map_file(
        &mut self,
        fd: Fd,
        iova: Iova,
        size: u64,
        offset: u64,
        access: Permissions,
    ) -> Result<Arc<Held<MmapRegion>>, DmaError> {
        let refused = |errno| DmaError::Mmap { iova, errno };
        let stat = fstat(&fd).map_err(refused)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(DmaError::NotAFile { iova });
        }
        let file_size = u64::try_from(stat.st_size).unwrap_or(0);
        if offset.checked_add(size).is_none_or(|end| end > file_size) {
            return Err(DmaError::BeyondFile { offset, size, file_size });
        }
        let writable = fcntl_getfl(&fd).map_err(refused)?.intersection(OFlags::RWMODE) == OFlags::RDWR;
        if access.has_write() && !writable {
            return Err(DmaError::ReadOnlyFile { iova });
        }
        let id = FileId { device: stat.st_dev, inode: stat.st_ino, writable };
        let length = usize::try_from(file_size).map_err(|_| refused(Errno::FBIG))?;
        // A file that has grown is mapped anew; older maps keep the shorter view of the same bytes.
        let of_file = self.mappings.iter().filter(|(file, _)| *file == id);
        let mut mapped = of_file.filter_map(|(_, mapped)| mapped.upgrade());
        if let Some(mapped) = mapped.find(|mapped| mapped.size() >= length) {
            return Ok(mapped);
        }
        self.mappings.retain(|(_, mapped)| mapped.strong_count() > 0);
        if self.mappings.len() >= MAPPINGS_MAX {
            return Err(DmaError::TooManyFiles);
        }
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let file = Arc::new(File::from(fd.into_inner()));
        let offset = FileOffset::from_arc(Arc::clone(&file), 0);
        let mapped = MmapRegion::build(Some(offset), length, protection, flags).map_err(|error| {
            log::debug!("mmap of {length:#x} bytes: {error}");
            drop(Held::new(Arc::clone(&file)));
            refused(Errno::NOMEM)
        })?;
        let mapped = Arc::new(Held::new(mapped));
        self.mappings.push((id, Arc::downgrade(&mapped)));
        Ok(mapped)
    }

    /// Unmaps `size` bytes at `iova`, mapped or not. Maps that overlap the range keep their other parts. A range that
    /// would end behind the address space ends with it.
    ///
    /// # Errors
    /// [`DmaError::TooManyMaps`] when a map would have to become two; nothing changes then.
    pub fn unmap(&mut self, iova: Iova, size: u64) -> Result<(), DmaError> {
        let first = iova.0;
        let Some(last) = size.checked_sub(1).map(|size| first.saturating_add(size)) else {
            return Ok(());
        };
        let splits =
            self.last_overlap(first, last).is_some_and(|(start, map)| *start < first && map.last > last);
        if splits && self.maps.len() >= DMA_MAPS_MAX {
            return Err(DmaError::TooManyMaps);
        }
        while let Some((&start, _)) = self.last_overlap(first, last) {
            self.changed = true;
            let Some(map) = self.maps.remove(&start) else { break };
            if map.last > last {
                let skipped = last - start + 1;
                let memory =
                    map.memory.clone().map(|memory| Memory { offset: memory.offset + skipped, ..memory });
                self.maps.insert(last + 1, Map { last: map.last, access: map.access, memory });
            }
            if start < first {
                self.maps.insert(start, Map { last: first - 1, ..map });
            }
        }
        Ok(())
    }

    /// Removes all maps.
    pub fn clear(&mut self) {
        *self = Self { changed: true, ..Self::default() };
    }

    /// Returns the last map with an address in `first..=last`.
    fn last_overlap(&self, first: u64, last: u64) -> Option<(&u64, &Map)> {
        self.maps.range(..=last).next_back().filter(|(_, map)| map.last >= first)
    }

    /// Returns at most `count` bytes at `address`, up to the end of the map that holds it.
    fn slice(&self, address: u64, count: usize, access: Permissions) -> MemoryResult<VolatileSlice<'_>> {
        let invalid = || GuestMemoryError::InvalidGuestAddress(GuestAddress(address));
        let (start, map) = self.last_overlap(address, address).ok_or_else(invalid)?;
        if !map.access.allow(access) {
            return Err(invalid());
        }
        let Some(memory) = &map.memory else {
            if !self.reported.replace(true) {
                log::warn!(
                    "device-VM memory at {} is not shared with this process, so the device cannot reach it: \
                     start the device VM with memory-backend-memfd,share=on",
                    Iova(address)
                );
            }
            return Err(GuestMemoryError::HostAddressNotAvailable);
        };
        let rest = usize::try_from(map.last - address).unwrap_or(usize::MAX).saturating_add(1);
        let offset = usize::try_from(memory.offset + (address - start)).map_err(|_| invalid())?;
        Ok(memory.file.get_slice(offset, count.min(rest))?)
    }
}

fn last_address(iova: Iova, size: u64) -> Result<u64, DmaError> {
    let last = size.checked_sub(1).and_then(|rest| iova.0.checked_add(rest));
    last.ok_or(DmaError::Range { iova, size })
}

impl GuestMemory for DmaSpace {
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.get_slices(addr, count, access).is_ok_and(|mut slices| slices.all(|slice| slice.is_ok()))
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> MemoryResult<impl GuestMemorySliceIterator<'a, ()>> {
        let rest = u64::try_from(count.saturating_sub(1)).unwrap_or(u64::MAX);
        if addr.0.checked_add(rest).is_none() {
            return Err(GuestMemoryError::GuestAddressOverflow);
        }
        Ok(Slices { space: self, address: addr.0, left: count, access })
    }
}

/// The slices of a range, one for each map.
struct Slices<'a> {
    space: &'a DmaSpace,
    address: u64,
    left: usize,
    access: Permissions,
}

impl<'a> Iterator for Slices<'a> {
    type Item = MemoryResult<VolatileSlice<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let slice = self.space.slice(self.address, self.left, self.access);
        match &slice {
            Ok(slice) => {
                self.left -= slice.len();
                // Past the end of the address space nothing is left.
                self.address = self.address.wrapping_add(slice.len() as u64);
            }
            Err(_) => self.left = 0,
        }
        Some(slice)
    }
}

impl FusedIterator for Slices<'_> {}
impl<'a> GuestMemorySliceIterator<'a, ()> for Slices<'a> {}

#[cfg(test)]
mod tests;
