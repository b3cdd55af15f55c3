//! Finds the structures of a vvu device through its PCI capabilities.

use crate::pci::{DeviceError, PciDevice};
use crate::spec::pci::{
    CONFIG_SPACE_SIZE, DEVICE_ID, Region, SHARED_MEMORY_BAR, Structure, VENDOR_ID, cap_id, cfg_type, config,
    msix, virtio_cap,
};
use crate::spec::virtio::{device_config, vector_select};

/// A PCI device is not a vvu device, or not one that can be driven.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// The configuration space cannot be read.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// There is no device, or it does not answer.
    #[error(
        "no PCI device answers: its configuration space reads all ones; if its proxy ended, start the proxy and \
         both VMs again"
    )]
    Gone,
    /// The device is not a vvu device.
    #[error(
        "not a vvu device: PCI id is {vendor:04x}:{device:04x}, want {VENDOR_ID:04x}:{DEVICE_ID:04x}; name \
         the address of the vvu device (`lspci -d {VENDOR_ID:04x}:{DEVICE_ID:04x}` lists them)"
    )]
    Identity {
        /// Vendor id of the device.
        vendor: u16,
        /// Device id of the device.
        device: u16,
    },
    /// The chain of capabilities is longer than the configuration space or leaves it.
    #[error("PCI capabilities are broken at offset {at:#04x}: the device or its VMM is faulty")]
    Chain {
        /// Offset at which the chain breaks.
        at: usize,
    },
    /// The device lacks a capability of vvu devices.
    #[error("no {what} among the PCI capabilities: the device is not a complete vvu device")]
    Missing {
        /// The capability.
        what: &'static str,
    },
    /// A structure is too small, or not inside its BAR.
    #[error(
        "{what} is at {offset:#x} of BAR {bar}, {length:#x} bytes, but the BAR has {size:#x} bytes and \
         {want:#x} are needed"
    )]
    Outside {
        /// The capability.
        what: &'static str,
        /// Number of the BAR.
        bar: u8,
        /// Offset in the BAR, in bytes.
        offset: u64,
        /// Length of the structure in bytes.
        length: u64,
        /// Size of the BAR in bytes.
        size: u64,
        /// Smallest length of the structure in bytes.
        want: u64,
    },
    /// The shared memory does not begin where its BAR does, so offsets in messages are no offsets in the BAR.
    #[error("shared memory starts at {offset:#x} of BAR {bar}: want the start of BAR {SHARED_MEMORY_BAR}")]
    SharedMemory {
        /// Number of the BAR.
        bar: u8,
        /// Offset in the BAR, in bytes.
        offset: u64,
    },
}

/// Places of a vvu device's structures, from its capabilities. Every structure is inside its BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) common: Structure,
    pub(super) notify: Structure,
    /// Bytes between the notify addresses of two queues.
    pub(super) notify_multiplier: u32,
    pub(super) device: Structure,
    pub(super) doorbells: Structure,
    /// Bytes between two doorbells.
    pub(super) doorbell_multiplier: u32,
    pub(super) vector_select: Structure,
    /// Bytes of the shared memory BAR; the 32-bit length in its capability may be cut off.
    pub(super) shared_memory: u64,
    /// MSI-X vectors.
    pub(super) vectors: u16,
}

impl Layout {
    /// Checks that `device` is a vvu device, and finds its structures.
    pub(super) fn probe<D: PciDevice>(device: &D) -> Result<Self, LayoutError> {
        let space = read_config(device)?;
        check_identity(&space)?;
        let found = Found::walk(&space)?;
        let bar_size = |bar| device.region_size(Region::Bar(bar));
        let (common, device_cfg) = found.configuration(bar_size)?;
        let inside = |what, cfg_type, want| found.structure(bar_size, what, cfg_type, want);
        let notify = inside("notification structure", cfg_type::NOTIFY, 2)?;
        let doorbells = inside("doorbell structure", cfg_type::DOORBELL, 2)?;
        let vector_select =
            inside("vector select structure", cfg_type::VECTOR_SELECT, u64_of(vector_select::SIZE))?;
        let shared = found.first(cfg_type::SHARED_MEMORY, "shared memory")?;
        if (shared.bar, shared.offset) != (SHARED_MEMORY_BAR, 0) {
            return Err(LayoutError::SharedMemory { bar: shared.bar, offset: shared.offset });
        }
        Ok(Self {
            common,
            notify,
            notify_multiplier: found.first(cfg_type::NOTIFY, "notification structure")?.extension,
            device: device_cfg,
            doorbells,
            doorbell_multiplier: found.first(cfg_type::DOORBELL, "doorbell structure")?.extension,
            vector_select,
            shared_memory: device.region_size(Region::Bar(SHARED_MEMORY_BAR)),
            vectors: found.vectors.ok_or(LayoutError::Missing { what: "MSI-X" })?,
        })
    }
}

/// Finds the common and the device configuration by a configuration space and the sizes of the BARs.
pub(super) fn configuration(
    space: &[u8; CONFIG_SPACE_SIZE],
    bar_size: impl Fn(u8) -> u64 + Copy,
) -> Result<(Structure, Structure), LayoutError> {
    Found::walk(space)?.configuration(bar_size)
}

/// Checks that `space` is that of a vvu device.
pub(super) fn check_identity(space: &[u8; CONFIG_SPACE_SIZE]) -> Result<(), LayoutError> {
    match (get16(space, config::VENDOR_ID), get16(space, config::DEVICE_ID)) {
        (VENDOR_ID, DEVICE_ID) => Ok(()),
        (u16::MAX, u16::MAX) => Err(LayoutError::Gone),
        (vendor, device) => Err(LayoutError::Identity { vendor, device }),
    }
}

/// One virtio capability.
#[derive(Clone, Copy, Debug)]
pub(super) struct VirtioCap {
    pub(super) cfg_type: u8,
    pub(super) bar: u8,
    pub(super) offset: u64,
    pub(super) length: u64,
    /// le32 after the plain capability, 0 if it is not that long.
    pub(super) extension: u32,
}

/// The MSI-X capability.
#[derive(Clone, Copy, Debug)]
pub(super) struct MsixCap {
    pub(super) control: u16,
}

impl MsixCap {
    /// Returns the number of entries of the MSI-X table.
    pub(super) fn vectors(self) -> u16 {
        (self.control & 0x7ff) + 1
    }
}

/// A PCI capability.
#[derive(Clone, Copy, Debug)]
pub(super) enum Capability<'a> {
    /// A virtio structure, and the configuration space from the capability on.
    Virtio(VirtioCap, &'a [u8]),
    /// MSI-X.
    Msix(MsixCap),
    /// Another, with its id.
    Other(u8),
}

/// Lists the capabilities of `space` in the order of their chain.
pub(super) fn capabilities(space: &[u8; CONFIG_SPACE_SIZE]) -> Result<Vec<Capability<'_>>, LayoutError> {
    let mut found = Vec::new();
    if get16(space, config::STATUS) & config::STATUS_CAPABILITIES == 0 {
        return Ok(found);
    }
    let mut at = usize::from(space[config::CAPABILITIES] & !0b11);
    // A capability has at least four bytes, so a longer chain has a loop.
    for _ in 0..CONFIG_SPACE_SIZE / 4 {
        if at == 0 {
            return Ok(found);
        }
        let cap = space.get(at..).filter(|_| at >= config::HEADER_END).unwrap_or_default();
        let [id, next, ..] = *cap else { return Err(LayoutError::Chain { at }) };
        found.push(match id {
            cap_id::VENDOR => Capability::Virtio(parse_virtio(cap).ok_or(LayoutError::Chain { at })?, cap),
            cap_id::MSIX => {
                let control = cap.get(msix::CONTROL..msix::CONTROL + 2);
                control.ok_or(LayoutError::Chain { at })?;
                Capability::Msix(MsixCap { control: get16(cap, msix::CONTROL) })
            }
            id => Capability::Other(id),
        });
        at = usize::from(next & !0b11);
    }
    Err(LayoutError::Chain { at })
}

/// The capabilities that this driver uses, in the order of their chain.
#[derive(Debug, Default)]
struct Found {
    virtio: Vec<VirtioCap>,
    vectors: Option<u16>,
}

impl Found {
    fn walk(space: &[u8; CONFIG_SPACE_SIZE]) -> Result<Self, LayoutError> {
        let mut found = Self::default();
        for cap in capabilities(space)? {
            match cap {
                Capability::Virtio(cap, _) => found.virtio.push(cap),
                Capability::Msix(cap) if found.vectors.is_none() => found.vectors = Some(cap.vectors()),
                _ => {}
            }
        }
        Ok(found)
    }

    /// The first capability of a type: a driver uses the first it understands (virtio 1.2, 4.1.4.1).
    fn first(&self, cfg_type: u8, what: &'static str) -> Result<VirtioCap, LayoutError> {
        let cap = self.virtio.iter().find(|cap| cap.cfg_type == cfg_type);
        cap.copied().ok_or(LayoutError::Missing { what })
    }

    /// Finds the common and the device configuration.
    fn configuration(
        &self,
        bar_size: impl Fn(u8) -> u64 + Copy,
    ) -> Result<(Structure, Structure), LayoutError> {
        let inside = |what, cfg_type, want| self.structure(bar_size, what, cfg_type, want);
        let common = inside("common configuration", cfg_type::COMMON, 56)?;
        let device = inside("device configuration", cfg_type::DEVICE, u64_of(device_config::SIZE))?;
        Ok((common, device))
    }

    /// The structure of a capability, at least `want` bytes and inside its BAR.
    fn structure(
        &self,
        bar_size: impl Fn(u8) -> u64,
        what: &'static str,
        cfg_type: u8,
        want: u64,
    ) -> Result<Structure, LayoutError> {
        let VirtioCap { bar, offset, length, .. } = self.first(cfg_type, what)?;
        let size = if bar < 6 { bar_size(bar) } else { 0 };
        // Both are 32 bits wide, so the sum cannot wrap.
        if length < want || offset + length > size {
            return Err(LayoutError::Outside { what, bar, offset, length, size, want });
        }
        Ok(Structure { bar, offset, length })
    }
}

fn parse_virtio(cap: &[u8]) -> Option<VirtioCap> {
    let length = usize::from(*cap.get(virtio_cap::LENGTH)?);
    let cap = cap.get(..length).filter(|cap| cap.len() >= virtio_cap::SIZE)?;
    let extension = cap.get(virtio_cap::EXTENSION..virtio_cap::EXTENSION + 4);
    Some(VirtioCap {
        cfg_type: cap[virtio_cap::CFG_TYPE],
        bar: cap[virtio_cap::BAR],
        offset: u64::from(get32(cap, virtio_cap::OFFSET)),
        length: u64::from(get32(cap, virtio_cap::STRUCTURE_LENGTH)),
        extension: extension.map_or(0, |_| get32(cap, virtio_cap::EXTENSION)),
    })
}

fn read_config<D: PciDevice>(device: &D) -> Result<[u8; CONFIG_SPACE_SIZE], DeviceError> {
    let mut space = [0; CONFIG_SPACE_SIZE];
    for (offset, word) in (0..).step_by(4).zip(space.chunks_exact_mut(4)) {
        device.read(Region::Config, offset, word)?;
    }
    Ok(space)
}

fn u64_of(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

pub(super) fn get16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn get32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rig::{Liar, LocalDevice};
    use crate::spec::pci::{self, ConfigSpace};
    use proptest::prelude::*;

    const FIRST_VIRTIO: usize = 0x54;

    /// Size of the shared memory BAR: the sibling's memory and the in-flight regions, rounded up to a power of two.
    const SHARED_MEMORY: u64 = 64 << 20;

    thread_local! {
        static DEVICE: LocalDevice<Liar> = LocalDevice::liar(16);
    }

    fn probe(change: impl FnOnce(&mut [u8])) -> Result<Layout, LayoutError> {
        let mut space = ConfigSpace::new(19, SHARED_MEMORY).bytes;
        change(&mut space);
        DEVICE.with(|device| {
            device.lie(|liar| liar.pretend(Region::Config, 0, &space));
            Layout::probe(device)
        })
    }

    #[test]
    fn the_golden_configuration_space_gives_the_layout_of_the_spec() {
        let want = Layout {
            common: pci::COMMON_CFG,
            notify: pci::NOTIFY_CFG,
            notify_multiplier: 4,
            device: pci::DEVICE_CFG,
            doorbells: pci::DOORBELL_CFG,
            doorbell_multiplier: 4,
            vector_select: pci::VECTOR_SELECT_CFG,
            shared_memory: SHARED_MEMORY,
            vectors: 19,
        };
        assert_eq!(probe(|_| {}).expect("layout"), want);
    }

    #[test]
    fn another_device_is_named_as_such() {
        let error = probe(|space| space[config::DEVICE_ID] = 0x41).expect_err("virtio-net");
        assert!(error.to_string().starts_with("not a vvu device: PCI id is 1af4:1041, want 1af4:107d"));
        assert!(matches!(probe(|space| space.fill(0xff)), Err(LayoutError::Gone)));
    }

    #[test]
    fn loops_and_pointers_into_the_header_end_the_walk() {
        let to_itself = probe(|space| space[FIRST_VIRTIO + 1] = 0x54);
        assert!(matches!(to_itself, Err(LayoutError::Chain { at: FIRST_VIRTIO })));
        let into_header = probe(|space| space[config::CAPABILITIES] = 0x10);
        assert!(matches!(into_header, Err(LayoutError::Chain { at: 0x10 })));
        let cut_off = probe(|space| {
            space[0xfc] = cap_id::VENDOR;
            space[config::CAPABILITIES] = 0xfc;
        });
        assert!(matches!(cut_off, Err(LayoutError::Chain { at: 0xfc })));
    }

    #[test]
    fn structures_outside_of_their_bar_are_refused() {
        for change in [
            (FIRST_VIRTIO + virtio_cap::BAR, 5),
            (FIRST_VIRTIO + virtio_cap::BAR, 200),
            (FIRST_VIRTIO + virtio_cap::OFFSET + 1, 0x80),
            (FIRST_VIRTIO + virtio_cap::OFFSET + 3, 0xff),
            (FIRST_VIRTIO + virtio_cap::STRUCTURE_LENGTH, 55),
            (FIRST_VIRTIO + virtio_cap::STRUCTURE_LENGTH + 3, 0xff),
        ] {
            let error = probe(|space| space[change.0] = change.1).expect_err("outside");
            assert!(matches!(error, LayoutError::Outside { what: "common configuration", .. }), "{change:?}");
        }
        let absent = probe(|space| space[FIRST_VIRTIO + virtio_cap::CFG_TYPE] = 99);
        assert!(matches!(absent, Err(LayoutError::Missing { what: "common configuration" })));
        let no_list = probe(|space| space[config::STATUS] = 0);
        assert!(matches!(no_list, Err(LayoutError::Missing { .. })));
    }

    proptest! {
        #[test]
        fn no_configuration_space_panics_the_walk(
            changes in proptest::collection::vec((0x34..0x100usize, any::<u8>()), 1..40)
        ) {
            if let Ok(layout) = probe(|space| changes.iter().for_each(|(at, value)| space[*at] = *value)) {
                let size = DEVICE.with(|device| device.region_size(Region::Bar(layout.common.bar)));
                prop_assert!(layout.common.offset + layout.common.length <= size);
            }
        }
    }
}
