//! PCI identity, BARs and capabilities of the vvu device.
//!
//! The layout is that of crosvm from 2021 to 2023, so that crosvm's guest driver drives this device
//! unmodified. Numbers are little-endian; offsets and lengths are in bytes.

use super::virtio;

/// PCI vendor id of every virtio device (virtio 1.2, 4.1.2).
pub const VENDOR_ID: u16 = 0x1af4;
/// PCI device id of a modern virtio device with id [`virtio::DEVICE_ID`] (virtio 1.2, 4.1.2).
pub const DEVICE_ID: u16 = 0x1040 + virtio::DEVICE_ID;
/// Revision of a non-transitional virtio device (virtio 1.2, 4.1.2.1).
pub const REVISION: u8 = 1;
/// Class 00, subclass ff, interface 00, which lspci calls "Unclassified device \[00ff\]".
pub const CLASS: [u8; 3] = [0x00, 0xff, 0x00];

/// Bytes of the configuration space. The vvu device is a conventional PCI device.
pub const CONFIG_SPACE_SIZE: usize = 256;

/// Offsets in the type 0 configuration header (PCI 3.0, 6.1).
pub mod config {
    /// le16: vendor id.
    pub const VENDOR_ID: usize = 0x00;
    /// le16: device id.
    pub const DEVICE_ID: usize = 0x02;
    /// le16: command register.
    pub const COMMAND: usize = 0x04;
    /// le16: status register.
    pub const STATUS: usize = 0x06;
    /// Revision, then interface, subclass and class, one byte each.
    pub const REVISION: usize = 0x08;
    /// Six le32 base address registers.
    pub const BAR0: usize = 0x10;
    /// le16: subsystem vendor id.
    pub const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
    /// le16: subsystem id.
    pub const SUBSYSTEM_ID: usize = 0x2e;
    /// Byte: offset of the first capability.
    pub const CAPABILITIES: usize = 0x34;
    /// First byte after the header: capabilities start here.
    pub const HEADER_END: usize = 0x40;

    /// Command: the device answers memory accesses.
    pub const COMMAND_MEMORY: u16 = 1 << 1;
    /// Command: the device may access memory and send interrupts.
    pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
    /// Command: pin interrupts are off.
    pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
    /// Status: the capabilities pointer is valid.
    pub const STATUS_CAPABILITIES: u16 = 1 << 4;

    /// Base address register: a 64-bit memory BAR.
    pub const BAR_64BIT: u32 = 1 << 2;
    /// Base address register: prefetchable, reads have no side effects.
    pub const BAR_PREFETCHABLE: u32 = 1 << 3;
}

/// PCI capability ids (PCI Code and ID Assignment).
pub mod cap_id {
    /// Vendor specific; each virtio structure has one.
    pub const VENDOR: u8 = 0x09;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
    /// Advanced Features: function level reset of a conventional PCI function.
    pub const AF: u8 = 0x13;
}

/// Advanced Features capability (PCI AF ECN, 6.x): offsets from its start and its bits.
pub mod af {
    /// Byte: capabilities.
    pub const CAPABILITIES: usize = 3;
    /// Byte: control.
    pub const CONTROL: usize = 4;
    /// Capabilities: the function has a transactions-pending bit and a function level reset.
    pub const TP_AND_FLR: u8 = 0b11;
    /// Control: start a function level reset.
    pub const INITIATE_FLR: u8 = 1;
    /// Length in bytes.
    pub const LENGTH: u8 = 6;
}

/// MSI-X capability (PCI 3.0, 6.8.2): offsets from its start.
pub mod msix {
    /// le16: message control; table size minus one in bits 10:0.
    pub const CONTROL: usize = 2;
    /// le32: table offset and BAR number (bits 2:0).
    pub const TABLE: usize = 4;
    /// le32: pending bit array offset and BAR number (bits 2:0).
    pub const PBA: usize = 8;
    /// Message control: MSI-X is on.
    pub const CONTROL_ENABLE: u16 = 1 << 15;
    /// Message control: every vector is masked.
    pub const CONTROL_MASK_ALL: u16 = 1 << 14;
    /// Bytes per table entry.
    pub const ENTRY_SIZE: u64 = 16;
}

/// A region of the device: a BAR or the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Region {
    /// Base address register 0 to 5.
    Bar(u8),
    /// The configuration space.
    Config,
}

/// Location of a virtio structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Structure {
    /// BAR number, 0 to 5.
    pub bar: u8,
    /// Offset in the BAR.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

impl Structure {
    /// Returns where in this structure an access of `len` bytes at `offset` of BAR `bar` begins; `None` if
    /// the access is not wholly inside.
    #[must_use]
    pub fn locate(&self, bar: u8, offset: u64, len: usize) -> Option<u64> {
        let start = offset.checked_sub(self.offset).filter(|_| bar == self.bar)?;
        let end = start.checked_add(u64::try_from(len).ok()?)?;
        (end <= self.length).then_some(start)
    }
}

/// BAR with the registers of the virtio device and the MSI-X table (32-bit, not prefetchable).
pub const REGISTER_BAR: u8 = 0;
/// Size of [`REGISTER_BAR`].
pub const REGISTER_BAR_SIZE: u64 = 0x8000;
/// BAR with doorbells and vector select (64-bit, not prefetchable).
pub const NOTIFY_BAR: u8 = 2;
/// Size of [`NOTIFY_BAR`].
pub const NOTIFY_BAR_SIZE: u64 = 0x4000;
/// BAR that shows the sibling memory file (64-bit, prefetchable).
pub const SHARED_MEMORY_BAR: u8 = 4;

/// Virtio common configuration (virtio 1.2, 4.1.4.3).
pub const COMMON_CFG: Structure = Structure { bar: REGISTER_BAR, offset: 0x0000, length: 56 };
/// ISR status (virtio 1.2, 4.1.4.5).
pub const ISR_CFG: Structure = Structure { bar: REGISTER_BAR, offset: 0x1000, length: 1 };
/// Device configuration (see [`virtio::device_config`]).
pub const DEVICE_CFG: Structure = Structure { bar: REGISTER_BAR, offset: 0x2000, length: 0x1000 };
/// Queue notification (virtio 1.2, 4.1.4.4).
pub const NOTIFY_CFG: Structure = Structure { bar: REGISTER_BAR, offset: 0x3000, length: 0x1000 };
/// MSI-X table.
pub const MSIX_TABLE: Structure = Structure { bar: REGISTER_BAR, offset: 0x6000, length: 0x1000 };
/// MSI-X pending bits.
pub const MSIX_PBA: Structure = Structure { bar: REGISTER_BAR, offset: 0x7000, length: 0x1000 };
/// Doorbells: with N vhost queues, doorbell i < N is call i, N <= i < 2N is err i - N.
pub const DOORBELL_CFG: Structure = Structure { bar: NOTIFY_BAR, offset: 0, length: 0x2000 };
/// Vector select: le16 `select`, le16 `msix_vector`.
pub const VECTOR_SELECT_CFG: Structure = Structure { bar: NOTIFY_BAR, offset: 0x2000, length: 0x1000 };

/// Bytes between the notify addresses of two virtqueues, and between two doorbells.
pub const NOTIFY_MULTIPLIER: u32 = 4;

/// Types of virtio PCI capabilities (virtio 1.2, 4.1.4); 6 to 8 as in the virtio-vhost-user drafts.
pub mod cfg_type {
    /// Common configuration.
    pub const COMMON: u8 = 1;
    /// Notifications.
    pub const NOTIFY: u8 = 2;
    /// ISR status.
    pub const ISR: u8 = 3;
    /// Device specific configuration.
    pub const DEVICE: u8 = 4;
    /// Window to the BARs in the configuration space.
    pub const PCI: u8 = 5;
    /// Doorbells (`DOORBELL_CFG`).
    pub const DOORBELL: u8 = 6;
    /// Vector select (`NOTIFICATION_CFG`).
    pub const VECTOR_SELECT: u8 = 7;
    /// Shared memory (`SHARED_MEMORY_CFG`), a `virtio_pci_cap64`.
    pub const SHARED_MEMORY: u8 = 8;
}

/// Offsets in `struct virtio_pci_cap` (virtio 1.2, 4.1.4) and its extensions.
pub mod virtio_cap {
    /// Byte: capability length.
    pub const LENGTH: usize = 2;
    /// Byte: one of [`cfg_type`](super::cfg_type).
    pub const CFG_TYPE: usize = 3;
    /// Byte: BAR number.
    pub const BAR: usize = 4;
    /// Byte: number that distinguishes capabilities of one type.
    pub const ID: usize = 5;
    /// le32: offset in the BAR.
    pub const OFFSET: usize = 8;
    /// le32: length of the structure.
    pub const STRUCTURE_LENGTH: usize = 12;
    /// Bytes of the plain capability; extensions follow.
    pub const SIZE: usize = 16;
    /// le32 after the plain capability: multiplier of notify and doorbell capabilities, or
    /// `pci_cfg_data`.
    pub const EXTENSION: usize = 16;
    /// le32: high half of the offset in a `virtio_pci_cap64`.
    pub const OFFSET_HI: usize = 16;
    /// le32: high half of the length in a `virtio_pci_cap64`.
    pub const STRUCTURE_LENGTH_HI: usize = 20;
}

/// Number of MSI-X vectors of a device with `queues` vhost queues: by convention configuration changes
/// and the receive queue share one, the transmit queue has one, and so has each vhost queue. crosvm's
/// table has one more, and so has this one.
#[must_use]
pub fn vector_count(queues: u16) -> u16 {
    queues + 3
}

/// The initial configuration space, and the offsets of the capabilities that the guest can write.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    /// Content after reset.
    pub bytes: [u8; CONFIG_SPACE_SIZE],
    /// Offset of the MSI-X capability.
    pub msix: usize,
    /// Offset of the Advanced Features capability.
    pub af: usize,
    /// Offset of the capability that is the window to the BARs.
    pub pci_cfg: usize,
}

impl ConfigSpace {
    /// Lays out the configuration space of a device with `vectors` MSI-X vectors (1 to 256) and a
    /// shared memory BAR whose sibling memory is `memory` bytes long.
    #[must_use]
    pub fn new(vectors: u16, memory: u64) -> Self {
        let mut bytes = [0; CONFIG_SPACE_SIZE];
        put16(&mut bytes, config::VENDOR_ID, VENDOR_ID);
        put16(&mut bytes, config::DEVICE_ID, DEVICE_ID);
        put16(&mut bytes, config::STATUS, config::STATUS_CAPABILITIES);
        bytes[config::REVISION] = REVISION;
        let [class, subclass, interface] = CLASS;
        bytes[config::REVISION + 1..][..3].copy_from_slice(&[interface, subclass, class]);
        put32(&mut bytes, bar_register(NOTIFY_BAR), config::BAR_64BIT);
        put32(&mut bytes, bar_register(SHARED_MEMORY_BAR), config::BAR_64BIT | config::BAR_PREFETCHABLE);
        put16(&mut bytes, config::SUBSYSTEM_VENDOR_ID, VENDOR_ID);
        put16(&mut bytes, config::SUBSYSTEM_ID, DEVICE_ID);

        let mut caps = Capabilities { bytes, link: config::CAPABILITIES, end: config::HEADER_END };
        let mut msix = [0; 10];
        put16(&mut msix, msix::CONTROL - 2, (vectors - 1) & 0x7ff);
        put32(&mut msix, msix::TABLE - 2, low32(MSIX_TABLE.offset) | u32::from(MSIX_TABLE.bar));
        put32(&mut msix, msix::PBA - 2, low32(MSIX_PBA.offset) | u32::from(MSIX_PBA.bar));
        let msix = caps.add(cap_id::MSIX, &msix);
        let af = caps.add(cap_id::AF, &[af::LENGTH, af::TP_AND_FLR, 0, 0]);
        caps.add_virtio(cfg_type::COMMON, COMMON_CFG, &[]);
        caps.add_virtio(cfg_type::ISR, ISR_CFG, &[]);
        caps.add_virtio(cfg_type::DEVICE, DEVICE_CFG, &[]);
        caps.add_virtio(cfg_type::NOTIFY, NOTIFY_CFG, &[NOTIFY_MULTIPLIER]);
        let none = Structure { bar: 0, offset: 0, length: 0 };
        let pci_cfg = caps.add_virtio(cfg_type::PCI, none, &[0]);
        caps.add_virtio(cfg_type::DOORBELL, DOORBELL_CFG, &[NOTIFY_MULTIPLIER]);
        caps.add_virtio(cfg_type::VECTOR_SELECT, VECTOR_SELECT_CFG, &[]);
        let shared = Structure { bar: SHARED_MEMORY_BAR, offset: 0, length: memory };
        caps.add_virtio(cfg_type::SHARED_MEMORY, shared, &[0, low32(memory >> 32)]);
        Self { bytes: caps.bytes, msix, af, pci_cfg }
    }
}

/// Offset in the configuration space of the register of `bar`.
#[must_use]
pub const fn bar_register(bar: u8) -> usize {
    config::BAR0 + 4 * bar as usize
}

/// Appends capabilities to a configuration space and links them.
struct Capabilities {
    bytes: [u8; CONFIG_SPACE_SIZE],
    /// Offset of the byte that links to the next capability.
    link: usize,
    /// Offset of the first free byte.
    end: usize,
}

impl Capabilities {
    /// Adds a capability with `body` after its two header bytes; returns its offset.
    fn add(&mut self, id: u8, body: &[u8]) -> usize {
        let start = self.end;
        self.bytes[start] = id;
        self.bytes[start + 2..][..body.len()].copy_from_slice(body);
        self.bytes[self.link] = start.to_le_bytes()[0];
        self.link = start + 1;
        self.end = (start + 2 + body.len()).next_multiple_of(4);
        start
    }

    /// Adds a virtio capability for `structure` followed by the le32 values of `extension`.
    fn add_virtio(&mut self, cfg_type: u8, structure: Structure, extension: &[u32]) -> usize {
        let length = virtio_cap::SIZE + 4 * extension.len();
        let mut cap = vec![0; length];
        cap[virtio_cap::LENGTH] = length.to_le_bytes()[0];
        cap[virtio_cap::CFG_TYPE] = cfg_type;
        cap[virtio_cap::BAR] = structure.bar;
        put32(&mut cap, virtio_cap::OFFSET, low32(structure.offset));
        put32(&mut cap, virtio_cap::STRUCTURE_LENGTH, low32(structure.length));
        for (i, value) in extension.iter().enumerate() {
            put32(&mut cap, virtio_cap::EXTENSION + 4 * i, *value);
        }
        self.add(cap_id::VENDOR, &cap[2..])
    }
}

/// Returns the low 32 bits.
fn low32(value: u64) -> u32 {
    u32::try_from(value & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

fn put16(bytes: &mut [u8], offset: usize, value: u16) {
    bytes[offset..][..2].copy_from_slice(&value.to_le_bytes());
}

fn put32(bytes: &mut [u8], offset: usize, value: u32) {
    bytes[offset..][..4].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The chain of capabilities, each as its offset and its id.
    fn walk(bytes: &[u8]) -> Vec<(usize, u8)> {
        let mut found = Vec::new();
        let mut at = usize::from(bytes[config::CAPABILITIES]);
        while at != 0 {
            found.push((at, bytes[at]));
            at = usize::from(bytes[at + 1]);
        }
        found
    }

    #[test]
    fn header_is_byte_for_byte_that_of_the_facts() {
        let space = ConfigSpace::new(19, 512 << 20);
        #[rustfmt::skip]
        let want: [u8; 0x40] = [
            0xf4, 0x1a, 0x7d, 0x10, 0x00, 0x00, 0x10, 0x00, 0x01, 0x00, 0xff, 0x00, 0x00, 0x00, 0x00, 0x00,
            0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x04, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
            0x0c, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xf4, 0x1a, 0x7d, 0x10,
            0x00, 0x00, 0x00, 0x00, 0x40, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
        ];
        assert_eq!(space.bytes[..0x40], want);
    }

    #[test]
    fn capabilities_are_byte_for_byte_those_of_the_facts() {
        let space = ConfigSpace::new(19, 0x1_4000_0000);
        #[rustfmt::skip]
        let want: &[&[u8]] = &[
            &[0x11, 0x4c, 18, 0, 0x00, 0x60, 0, 0, 0x00, 0x70, 0, 0],
            &[0x13, 0x54, 6, 3, 0, 0, 0, 0],
            &[0x09, 0x64, 16, 1, 0, 0, 0, 0, 0, 0x00, 0, 0, 56, 0x00, 0, 0],
            &[0x09, 0x74, 16, 3, 0, 0, 0, 0, 0, 0x10, 0, 0, 1, 0x00, 0, 0],
            &[0x09, 0x84, 16, 4, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0x10, 0, 0],
            &[0x09, 0x98, 20, 2, 0, 0, 0, 0, 0, 0x30, 0, 0, 0, 0x10, 0, 0, 4, 0, 0, 0],
            &[0x09, 0xac, 20, 5, 0, 0, 0, 0, 0, 0x00, 0, 0, 0, 0x00, 0, 0, 0, 0, 0, 0],
            &[0x09, 0xc0, 20, 6, 2, 0, 0, 0, 0, 0x00, 0, 0, 0, 0x20, 0, 0, 4, 0, 0, 0],
            &[0x09, 0xd0, 16, 7, 2, 0, 0, 0, 0, 0x20, 0, 0, 0, 0x10, 0, 0],
            &[0x09, 0x00, 24, 8, 4, 0, 0, 0, 0, 0x00, 0, 0, 0, 0x00, 0, 0x40, 0, 0, 0, 0, 1, 0, 0, 0],
        ];
        assert_eq!(space.bytes[0x40..0xe8], want.concat());
        assert!(space.bytes[0xe8..].iter().all(|b| *b == 0));
        assert_eq!((space.msix, space.af, space.pci_cfg), (0x40, 0x4c, 0x98));
        assert_eq!(walk(&space.bytes).len(), want.len());
    }

    #[test]
    fn an_access_is_inside_a_structure_or_not() {
        assert_eq!(ISR_CFG.locate(0, 0x1000, 1), Some(0));
        assert_eq!(ISR_CFG.locate(0, 0x1000, 2), None);
        assert_eq!(ISR_CFG.locate(2, 0x1000, 1), None);
        assert_eq!(DEVICE_CFG.locate(0, 0x2fff, 1), Some(0xfff));
        assert_eq!(DEVICE_CFG.locate(0, u64::MAX, 8), None);
        assert_eq!(DEVICE_CFG.locate(0, 0x1fff, 1), None);
    }
}
