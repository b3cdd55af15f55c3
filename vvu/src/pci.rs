//! The two sides of a PCI function: [`PciFunction`] is implemented by what is one, [`PciDevice`] is used by what
//! drives one.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vfio_bindings::bindings::vfio;
use vm_memory::{GuestMemory, MmapRegion};

pub use direct::DirectDoorbells;

use crate::durable::{Adopted, RestoreError};
use crate::event::{Event, EventSet};
use crate::spec::addr::Iova;
use crate::spec::pci::Region;

mod direct;

/// What a [`PciFunction`] needs from whatever connects it to a VM.
///
/// The vfio-user server is one implementation, tests have another, and a VMM that embeds this crate would be a third.
pub trait Host {
    /// Memory of the VM as the function reaches it: addresses are [`Iova`]s.
    type Memory: GuestMemory;

    /// Returns the memory that is mapped for the function at this moment.
    fn memory(&self) -> &Self::Memory;

    /// Sends MSI-X interrupt `vector`. A vector that is not enabled is lost, as on real hardware.
    fn signal(&self, vector: u16);
}

/// A BAR whose first bytes are those of a file, so that a VM can map it instead of trapping each access.
#[derive(Clone, Copy, Debug)]
pub struct MappableBar<'f> {
    /// Number of the BAR.
    pub bar: u8,
    /// The file; the BAR starts at its offset 0.
    pub file: BorrowedFd<'f>,
    /// Bytes that can be mapped, at most the size of the BAR.
    pub size: u64,
}

/// A PCI function that is served to a VM: [`VvuDevice`](crate::device::VvuDevice), or a liar in tests.
pub trait PciFunction {
    /// Returns the size of `region` in bytes: a power of two for a BAR, 0 if there is none.
    fn region_size(&self, region: Region) -> u64;

    /// Returns the number of MSI-X vectors.
    fn vector_count(&self) -> u16;

    /// Returns the BAR that a VM can map, if there is one.
    fn mappable_bar(&self) -> Option<MappableBar<'_>>;

    /// Returns the set of descriptors for which the function waits. Its host may add its own, waits for all of them, and
    /// passes those of the function that are ready to [`process`](Self::process).
    fn events(&self) -> &EventSet;

    /// Answers a read of the VM. What is not there reads as zeroes.
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]);

    /// Carries out a write of the VM. A write to what is not there changes nothing.
    fn write<H: Host>(&mut self, host: &H, region: Region, offset: u64, data: &[u8]);

    /// Deals with the descriptors of the function that are ready, by their numbers in [`events`](Self::events). The work of
    /// one call is bounded.
    fn process<H: Host>(&mut self, host: &H, ready: &[u32]);

    /// Puts the function into its state after power-on.
    fn reset(&mut self);

    /// Returns why the function is of no use to any VM from now on, if that is so. Its server ends then.
    fn failure(&self) -> Option<&str> {
        None
    }

    /// Returns the state for a successor in another process, if it has changed since the last call.
    #[doc(hidden)]
    fn save(&mut self) -> Option<Vec<u8>> {
        None
    }

    /// Drops what was kept for the last commit, and sends what had to wait for the new one.
    #[doc(hidden)]
    fn committed(&mut self, released: Vec<Box<dyn Send>>) {
        drop(released);
    }

    /// Takes over from a predecessor: what it saved, and the descriptors that it left. `saved` is empty if it saved nothing.
    ///
    /// # Errors
    /// [`RestoreError`].
    #[doc(hidden)]
    fn restore<H: Host>(&mut self, host: &H, saved: &[u8], left: &mut Adopted) -> Result<(), RestoreError> {
        let _ = (host, saved, left);
        Err(RestoreError::Value("this function saves nothing".to_owned()))
    }
}

/// A file that can be mapped for a BAR.
#[derive(Debug)]
pub struct BarFile {
    /// The file.
    pub file: File,
    /// Where the BAR begins in the file, in bytes.
    pub offset: u64,
}

/// Memory that the device can read and write, for as long as this value lives.
#[derive(Debug)]
pub struct DmaBuffer {
    /// The memory in this process.
    pub memory: MmapRegion,
    /// Address at which the device finds the first byte.
    pub iova: Iova,
}

/// An operation on a PCI device failed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A system call failed, or the peer refused a command.
    #[error("{what}: {source}")]
    Io {
        /// The operation, with the values it was tried with.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// The access does not lie inside its region.
    #[error("access of {len} bytes at {offset:#x} of {region:?}, which has {size:#x} bytes")]
    OutOfRange {
        /// The region.
        region: Region,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: usize,
        /// Bytes that the region has.
        size: u64,
    },
}

impl DeviceError {
    /// An operation that failed with an error of any kind.
    pub(crate) fn other(
        what: impl Into<String>,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Io { what: what.into(), source: io::Error::other(cause) }
    }
}

/// Checks that `len` bytes at `offset` lie inside a region of `size` bytes.
///
/// # Errors
/// [`DeviceError::OutOfRange`].
pub(crate) fn check_access(region: Region, offset: u64, len: usize, size: u64) -> Result<(), DeviceError> {
    let end = u64::try_from(len).ok().and_then(|len| offset.checked_add(len));
    if end.is_some_and(|end| end <= size) {
        return Ok(());
    }
    Err(DeviceError::OutOfRange { region, offset, len, size })
}

/// A PCI device with regions, interrupts and DMA, as its driver sees it. Methods take `&self` since a driver uses
/// them from several threads.
///
/// Inside a VM it is [`VfioDevice`](crate::driver::vfio::VfioDevice), on a host without a VM
/// [`VfioUserDevice`](crate::vfio_user::client::VfioUserDevice).
pub trait PciDevice: Send + Sync {
    /// Returns the size of `region` in bytes, 0 if there is none.
    fn region_size(&self, region: Region) -> u64;

    /// Reads `data.len()` bytes at `offset` of `region`; 1, 2, 4 and 8 bytes are one access.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), DeviceError>;

    /// Writes `data` at `offset` of `region`; 1, 2, 4 and 8 bytes are one access.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), DeviceError>;

    /// Returns a file that can be mapped for BAR `bar`.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn bar_file(&self, bar: u8) -> Result<BarFile, DeviceError>;

    /// Maps the first page of BAR `bar`, whose registers a store writes then. `None` if it cannot be mapped.
    fn map_registers(&self, bar: u8) -> Option<Arc<MmapRegion>>;

    /// Allocates `len` bytes, rounded up to whole pages and zeroed, that the device can reach.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn allocate_dma(&self, len: usize) -> Result<DmaBuffer, DeviceError>;

    /// Turns MSI-X on: vector i signals `vectors[i]`. Vectors set before are replaced.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn enable_msix(&self, vectors: &[&Event]) -> Result<(), DeviceError>;

    /// Makes each further signal of `event` ring `doorbell`, without a thread of the caller.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn bind_doorbell(&self, doorbell: Doorbell, event: &Event) -> Result<(), DeviceError>;

    /// Undoes [`bind_doorbell`](Self::bind_doorbell). Each signal from before the call rings `doorbell`, or another
    /// doorbell that its event is bound to.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn unbind_doorbell(&self, doorbell: Doorbell) -> Result<(), DeviceError>;
}

/// A register write that rings a doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// Number of the BAR.
    pub bar: u8,
    /// Offset in the BAR.
    pub offset: u64,
    /// What is written.
    pub value: DoorbellValue,
}

/// A number that is written to a doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DoorbellValue {
    /// An le16.
    Le16(u16),
    /// An le32.
    Le32(u32),
}

impl Doorbell {
    /// Returns the number of bytes that are written.
    #[must_use]
    pub(crate) fn width(self) -> usize {
        match self.value {
            DoorbellValue::Le16(_) => 2,
            DoorbellValue::Le32(_) => 4,
        }
    }

    /// Writes to the doorbell with `write`, which gets region, offset and bytes.
    pub(crate) fn ring<T>(self, write: impl FnOnce(Region, u64, &[u8]) -> T) -> T {
        let region = Region::Bar(self.bar);
        match self.value {
            DoorbellValue::Le16(value) => write(region, self.offset, &value.to_le_bytes()),
            DoorbellValue::Le32(value) => write(region, self.offset, &value.to_le_bytes()),
        }
    }
}

/// Returns the index of a region in VFIO and vfio-user.
#[must_use]
pub(crate) fn vfio_region_index(region: Region) -> u32 {
    match region {
        Region::Bar(bar) => bar.into(),
        Region::Config => vfio::VFIO_PCI_CONFIG_REGION_INDEX,
    }
}
