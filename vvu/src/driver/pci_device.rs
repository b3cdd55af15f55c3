//! What the driver needs of a PCI device: VFIO gives it in the guest, a vfio-user client on a host.

use std::fs::File;
use std::io;

use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

use crate::spec::addr::Iova;
use crate::spec::pci::Region;

/// Memory that the device can read and write, for as long as this value lives.
#[derive(Debug)]
pub struct DmaBuffer {
    /// The memory in this process.
    pub memory: MmapRegion,
    /// Where the device finds its first byte.
    pub iova: Iova,
}

/// An operation on a PCI device that failed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A system call or the peer refused.
    #[error("{what}: {source}")]
    Io {
        /// The operation, with the values it was tried with.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// An access outside of a region.
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

/// A PCI device with regions, interrupts and DMA. Methods take `&self` since a driver uses them from
/// several threads.
pub trait PciDevice: Send + Sync {
    /// Size in bytes of `region`, 0 if there is none.
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

    /// A file of the size of BAR `bar` whose mapping at an offset is the BAR at that offset.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn bar_file(&self, bar: u8) -> Result<File, DeviceError>;

    /// Allocates `len` bytes, rounded up to whole pages and zeroed, that the device can reach.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn allocate_dma(&self, len: usize) -> Result<DmaBuffer, DeviceError>;

    /// Turns MSI-X on with one eventfd a vector from vector 0 on, in place of any set before.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn enable_msix(&self, vectors: &[&EventFd]) -> Result<(), DeviceError>;

    /// From now on each signal of `event` writes the le16 `value` at `offset` of BAR `bar`, without
    /// a thread of the caller.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn bind_doorbell(&self, bar: u8, offset: u64, value: u16, event: &EventFd) -> Result<(), DeviceError>;
}
