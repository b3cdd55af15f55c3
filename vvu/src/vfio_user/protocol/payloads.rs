//! Payloads of commands and replies; most mirror the structures of the kernel's VFIO.

use vfio_bindings::bindings::vfio;

use super::wire::{MessageError, REGION_ACCESS_SIZE, wire_struct};
use crate::spec::pci::Region;

/// Most DMA maps at one time; what a client assumes when the server names no limit.
pub const DMA_MAPS_MAX: usize = 65535;
/// Regions of a PCI device: six BARs, ROM, configuration space, VGA.
pub const REGION_COUNT: u32 = vfio::VFIO_PCI_NUM_REGIONS;
/// Kinds of interrupt of a PCI device: `INTx`, MSI, MSI-X, error, request.
pub const IRQ_COUNT: u32 = vfio::VFIO_PCI_NUM_IRQS;

wire_struct! {
    /// [`Command::DmaMap`](super::Command::DmaMap); the file, if the memory can be mapped, is attached.
    DmaMap, 32 {
        /// Bytes of this structure.
        argsz: u32,
        /// [`DMA_READ`], [`DMA_WRITE`].
        flags: u32,
        /// Offset in the attached file.
        offset: u64,
        /// First I/O virtual address.
        iova: u64,
        /// Bytes.
        size: u64,
    }
}

wire_struct! {
    /// [`Command::DmaUnmap`](super::Command::DmaUnmap) and its reply.
    DmaUnmap, 24 {
        /// Bytes of this structure.
        argsz: u32,
        /// [`DMA_UNMAP_ALL`] or none.
        flags: u32,
        /// First I/O virtual address.
        iova: u64,
        /// Bytes.
        size: u64,
    }
}

/// [`DmaMap`]: the device may read.
pub const DMA_READ: u32 = vfio::VFIO_DMA_MAP_FLAG_READ;
/// [`DmaMap`]: the device may write.
pub const DMA_WRITE: u32 = vfio::VFIO_DMA_MAP_FLAG_WRITE;
/// [`DmaUnmap`]: every map, whatever the range says.
pub const DMA_UNMAP_ALL: u32 = vfio::VFIO_DMA_UNMAP_FLAG_ALL;

wire_struct! {
    /// [`Command::DeviceGetInfo`](super::Command::DeviceGetInfo) and its reply.
    DeviceInfo, 16 {
        /// Bytes of the reply's payload: the most the client takes, then what there is.
        argsz: u32,
        /// [`DEVICE_RESET`], [`DEVICE_PCI`].
        flags: u32,
        /// Regions.
        num_regions: u32,
        /// Kinds of interrupt.
        num_irqs: u32,
    }
}

/// [`DeviceInfo`]: the device can be reset.
pub const DEVICE_RESET: u32 = vfio::VFIO_DEVICE_FLAGS_RESET;
/// [`DeviceInfo`]: a PCI device.
pub const DEVICE_PCI: u32 = vfio::VFIO_DEVICE_FLAGS_PCI;

wire_struct! {
    /// [`Command::DeviceGetRegionInfo`](super::Command::DeviceGetRegionInfo) and the start of its reply.
    RegionInfo, 32 {
        /// Bytes of the reply's payload: the most the client takes, then what there is.
        argsz: u32,
        /// `REGION_*` bits.
        flags: u32,
        /// Which region (see [`region_at`](super::region_at)).
        index: u32,
        /// Offset of the first capability from the start of this structure, in bytes.
        cap_offset: u32,
        /// Bytes of the region.
        size: u64,
        /// Offset of the region in the attached file, in bytes.
        offset: u64,
    }
}

/// [`RegionInfo`]: can be read and written.
pub const REGION_READ_WRITE: u32 = vfio::VFIO_REGION_INFO_FLAG_READ | vfio::VFIO_REGION_INFO_FLAG_WRITE;
/// [`RegionInfo`]: can be mapped from the attached file.
pub const REGION_MMAP: u32 = vfio::VFIO_REGION_INFO_FLAG_MMAP;
/// [`RegionInfo`]: capabilities follow.
pub const REGION_CAPS: u32 = vfio::VFIO_REGION_INFO_FLAG_CAPS;

wire_struct! {
    /// Capability of [`RegionInfo`]: the one area of a region that can be mapped.
    SparseArea, 32 {
        /// [`SparseArea::ID`].
        id: u16,
        /// [`SparseArea::VERSION`].
        version: u16,
        /// Offset of the next capability in bytes, 0 after the last.
        next: u32,
        /// Areas: 1.
        count: u32,
        /// Zero.
        reserved: u32,
        /// Offset of the area in the region, in bytes.
        offset: u64,
        /// Bytes of the area.
        size: u64,
    }
}

impl SparseArea {
    /// Capability id.
    #[expect(clippy::cast_possible_truncation, reason = "the id is 1")]
    pub const ID: u16 = vfio::VFIO_REGION_INFO_CAP_SPARSE_MMAP as u16;
    /// Capability version.
    pub const VERSION: u16 = 1;

    /// The last capability of a region whose first `size` bytes can be mapped.
    #[must_use]
    pub fn from_start(size: u64) -> Self {
        Self { id: Self::ID, version: Self::VERSION, count: 1, size, ..Self::default() }
    }
}

wire_struct! {
    /// [`Command::DeviceGetIrqInfo`](super::Command::DeviceGetIrqInfo) and its reply.
    IrqInfo, 16 {
        /// Bytes of this structure.
        argsz: u32,
        /// [`IRQ_EVENTFD`] or none.
        flags: u32,
        /// Which kind of interrupt.
        index: u32,
        /// Interrupts of that kind.
        count: u32,
    }
}

/// [`IrqInfo`]: signalled through eventfds.
pub const IRQ_EVENTFD: u32 = vfio::VFIO_IRQ_INFO_EVENTFD;
/// [`IrqInfo`], [`SetIrqs`]: index of MSI-X.
pub const IRQ_MSIX: u32 = vfio::VFIO_PCI_MSIX_IRQ_INDEX;
/// [`IrqInfo`], [`SetIrqs`]: index of errors of a PCI Express device.
pub const IRQ_ERR: u32 = vfio::VFIO_PCI_ERR_IRQ_INDEX;

wire_struct! {
    /// [`Command::DeviceSetIrqs`](super::Command::DeviceSetIrqs).
    SetIrqs, 20 {
        /// Bytes of this structure and its data.
        argsz: u32,
        /// [`IRQ_DATA_NONE`] or [`IRQ_DATA_EVENTFD`], and [`IRQ_TRIGGER`].
        flags: u32,
        /// Which kind of interrupt.
        index: u32,
        /// First interrupt.
        start: u32,
        /// Interrupts; none of them with [`IRQ_DATA_NONE`] means to disable all.
        count: u32,
    }
}

/// [`SetIrqs`]: fire the interrupts.
pub const IRQ_DATA_NONE: u32 = vfio::VFIO_IRQ_SET_DATA_NONE;
/// [`SetIrqs`]: one eventfd an interrupt is attached, or none at all to detach them.
pub const IRQ_DATA_EVENTFD: u32 = vfio::VFIO_IRQ_SET_DATA_EVENTFD;
/// [`SetIrqs`]: about signalling, as opposed to masking.
pub const IRQ_TRIGGER: u32 = vfio::VFIO_IRQ_SET_ACTION_TRIGGER;

wire_struct! {
    /// [`Command::RegionRead`](super::Command::RegionRead), [`Command::RegionWrite`](super::Command::RegionWrite) and their replies; data may follow.
    RegionAccess, 16 {
        /// First byte in the region.
        offset: u64,
        /// Which region (see [`region_at`](super::region_at)).
        region: u32,
        /// Bytes.
        count: u32,
    }
}

const _: () = assert!(RegionAccess::SIZE == REGION_ACCESS_SIZE);

/// Returns the region at an index of the PCI layout; the ROM and VGA regions are never there.
#[must_use]
pub fn region_at(index: u32) -> Option<Region> {
    match index {
        vfio::VFIO_PCI_CONFIG_REGION_INDEX => Some(Region::Config),
        0..=vfio::VFIO_PCI_BAR5_REGION_INDEX => u8::try_from(index).ok().map(Region::Bar),
        _ => None,
    }
}
