//! A read-only view of a BAR of a device that another process drives.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;

use vm_memory::mmap::MmapRegionError;
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::sysfs::mapping_hint;
use crate::pci::DeviceError;
use crate::spec::pci::{Region, Structure};

/// A BAR mapped from its file in sysfs, for reading only.
#[derive(Debug)]
pub struct BarView {
    bar: u8,
    memory: MmapRegion,
}

impl BarView {
    /// Maps the BAR `bar` from its file, which has its size ([`PciSysfs::resource`](super::sysfs::PciSysfs::resource)).
    /// Memory access of the device has to be on, or else what is read means nothing.
    ///
    /// # Errors
    /// [`DeviceError::Io`], with a remedy where the kernel forbids the mapping.
    pub fn open(path: &Path, bar: u8) -> Result<Self, DeviceError> {
        let failed = |source: io::Error| {
            let what = format!("map {}{}", path.display(), mapping_hint(&source));
            DeviceError::Io { what, source }
        };
        let file = File::open(path).map_err(failed)?;
        let size = usize::try_from(file.metadata().map_err(failed)?.len());
        let size = size.map_err(|error| failed(io::Error::other(error)))?;
        let (file, flags) = (FileOffset::new(file, 0), libc::MAP_SHARED);
        let memory =
            MmapRegion::build(Some(file), size, libc::PROT_READ, flags).map_err(|error| match error {
                MmapRegionError::Mmap(source) => failed(source),
                error => failed(io::Error::other(error)),
            })?;
        Ok(Self { bar, memory })
    }

    /// Returns how many bytes of the BAR `bar` the view has.
    pub(super) fn size(&self, bar: u8) -> u64 {
        if bar == self.bar { u64::try_from(self.memory.size()).unwrap_or(0) } else { 0 }
    }

    /// Reads the register of `T`'s width at `offset` of the structure `at` in one access.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`] when the capabilities of the device place the register elsewhere.
    pub(super) fn read<T: AtomicAccess>(&self, at: Structure, offset: u64) -> Result<T, DeviceError> {
        let (region, len) = (Region::Bar(at.bar), size_of::<T>());
        let outside = |size| DeviceError::OutOfRange { region, offset: at.offset + offset, len, size };
        let inside = u64::try_from(len).is_ok_and(|len| offset + len <= at.length);
        let size = self.size(at.bar);
        let place = usize::try_from(at.offset + offset).ok().filter(|_| inside && size > 0);
        let place = place.ok_or_else(|| outside(size))?;
        self.memory.as_volatile_slice().load(place, Relaxed).map_err(|_| outside(size))
    }
}
