//! The memory of the front-end's VM, mapped as the front-end describes it (vhost-user, "Memory regions description").

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap};

/// Regions that a front-end can add, as many as a vhost back-end in the kernel has by default.
pub(super) const REGIONS_MAX: u16 = 509;

/// Why memory cannot be had as the front-end describes it.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    #[error("cannot map {size:#x} bytes of the front-end's memory at guest address {guest:#x}: {source}")]
    Map { guest: u64, size: u64, source: vhost::vhost_user::Error },
    #[error("memory region at guest address {guest:#x} ends behind the address space")]
    Wraps { guest: u64 },
    #[error("memory regions: {0}; want regions that do not overlap, in the order of their guest addresses")]
    Layout(#[from] GuestRegionCollectionError),
    #[error("more than {REGIONS_MAX} memory regions")]
    Slots,
    #[error("no memory region has the front-end's address {0:#x}: want a memory table before ring addresses")]
    Unmapped(u64),
}

/// Mapped memory, and the addresses it has in the front-end's process.
#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    guest: Arc<GuestMemoryMmap>,
    places: Vec<Place>,
}

/// Where a region is, in bytes.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// First address in the front-end's process.
    user: u64,
    /// First guest address.
    guest: u64,
    size: u64,
}

impl Memory {
    /// Maps the regions of a `SET_MEM_TABLE` message; `files` has one file for each.
    pub(super) fn from_table(table: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<Self, MemoryError> {
        let regions: Result<Vec<_>, _> =
            table.iter().zip(files).map(|(region, file)| map(region, file)).collect();
        let guest = Arc::new(GuestMemoryMmap::from_regions(regions?)?);
        Ok(Self { guest, places: table.iter().map(Place::of).collect() })
    }

    /// Adds a region (`ADD_MEM_REG`).
    pub(super) fn with_region(
        &self,
        region: &VhostUserMemoryRegion,
        file: File,
    ) -> Result<Self, MemoryError> {
        if self.places.len() >= usize::from(REGIONS_MAX) {
            return Err(MemoryError::Slots);
        }
        let guest = Arc::new(self.guest.insert_region(Arc::new(map(region, file)?))?);
        let places = self.places.iter().copied().chain([Place::of(region)]).collect();
        Ok(Self { guest, places })
    }

    /// Takes a region away (`REM_MEM_REG`).
    pub(super) fn without_region(&self, region: &VhostUserMemoryRegion) -> Result<Self, MemoryError> {
        let guest = region.guest_phys_addr;
        let (rest, _) = self.guest.remove_region(GuestAddress(guest), region.memory_size)?;
        let places = self.places.iter().copied().filter(|place| place.guest != guest).collect();
        Ok(Self { guest: Arc::new(rest), places })
    }

    /// The mapped regions.
    pub(super) fn guest(&self) -> &Arc<GuestMemoryMmap> {
        &self.guest
    }

    /// Translates an address of the front-end's process into a guest address.
    pub(super) fn guest_address(&self, user: u64) -> Result<GuestAddress, MemoryError> {
        let inside = |place: &&Place| user.checked_sub(place.user).is_some_and(|offset| offset < place.size);
        let place = self.places.iter().find(inside).ok_or(MemoryError::Unmapped(user))?;
        Ok(GuestAddress(user - place.user + place.guest))
    }
}

impl Place {
    fn of(region: &VhostUserMemoryRegion) -> Self {
        Self { user: region.user_addr, guest: region.guest_phys_addr, size: region.memory_size }
    }
}

fn map(region: &VhostUserMemoryRegion, file: File) -> Result<GuestRegionMmap, MemoryError> {
    let (guest, size) = (region.guest_phys_addr, region.memory_size);
    let mapping = region.mmap_region(file).map_err(|source| MemoryError::Map { guest, size, source })?;
    GuestRegionMmap::new(mapping, GuestAddress(guest)).ok_or(MemoryError::Wraps { guest })
}
