//! The PCI configuration space as the guest reads and writes it.

use super::copy_at;
use crate::spec::pci::{self, CONFIG_SPACE_SIZE, af, config, msix, virtio_cap};

/// What the device has to do after a write to the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing.
    None,
    /// Carry out a function level reset.
    Reset,
    /// Write `pci_cfg_data` to the BAR that the window selects.
    WindowWrite,
}

/// An access to a BAR through `VIRTIO_PCI_CAP_PCI_CFG` (virtio 1.2, 4.1.4.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) bar: u8,
    pub(crate) offset: u64,
    /// 1, 2 or 4 bytes.
    pub(crate) len: usize,
    /// Offset of `pci_cfg_data` in the configuration space.
    pub(crate) data: usize,
}

#[derive(Debug)]
pub(crate) struct ConfigSpace {
    initial: pci::ConfigSpace,
    bytes: [u8; CONFIG_SPACE_SIZE],
    /// Bits that the guest can change.
    writable: [u8; CONFIG_SPACE_SIZE],
}

impl ConfigSpace {
    /// A configuration space with the content `initial`. `bar_size` returns the size of a BAR in bytes: a
    /// power of two, or 0 if the BAR does not exist.
    pub(crate) fn new(initial: pci::ConfigSpace, bar_size: impl Fn(u8) -> u64) -> Self {
        let mut writable = [0; CONFIG_SPACE_SIZE];
        let command = config::COMMAND_MEMORY | config::COMMAND_BUS_MASTER | config::COMMAND_INTX_DISABLE;
        writable[config::COMMAND..][..2].copy_from_slice(&command.to_le_bytes());
        for bar in [pci::REGISTER_BAR, pci::NOTIFY_BAR, pci::SHARED_MEMORY_BAR] {
            let address = bar_size(bar).wrapping_neg() & !0xf;
            let width = if bar == pci::REGISTER_BAR { 4 } else { 8 };
            writable[pci::bar_register(bar)..][..width].copy_from_slice(&address.to_le_bytes()[..width]);
        }
        let control = msix::CONTROL_ENABLE | msix::CONTROL_MASK_ALL;
        writable[initial.msix + msix::CONTROL..][..2].copy_from_slice(&control.to_le_bytes());
        writable[initial.pci_cfg + virtio_cap::BAR] = 0xff;
        writable[initial.pci_cfg + virtio_cap::OFFSET..][..8].fill(0xff);
        writable[initial.pci_cfg + virtio_cap::EXTENSION..][..4].fill(0xff);
        Self { bytes: initial.bytes, initial, writable }
    }

    pub(crate) fn reset(&mut self) {
        self.bytes = self.initial.bytes;
    }

    /// All bytes, as they are saved.
    pub(crate) fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Restores what [`save`](Self::save) returned; false if it did not.
    pub(crate) fn restore(&mut self, saved: &[u8]) -> bool {
        saved.try_into().map(|bytes| self.bytes = bytes).is_ok()
    }

    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        copy_at(&self.bytes, offset, data);
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let Some(start) = usize::try_from(offset).ok().filter(|at| *at < CONFIG_SPACE_SIZE) else {
            return Effect::None;
        };
        for (at, value) in (start..CONFIG_SPACE_SIZE).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | value & mask;
        }
        let written = |at: usize| at.checked_sub(start).and_then(|i| data.get(i)).copied();
        if written(self.initial.af + af::CONTROL).is_some_and(|control| control & af::INITIATE_FLR != 0) {
            Effect::Reset
        } else if start == self.initial.pci_cfg + virtio_cap::EXTENSION {
            Effect::WindowWrite
        } else {
            Effect::None
        }
    }

    /// Returns the access that the guest has selected in the window; `None` if it is not valid.
    pub(crate) fn window(&self) -> Option<Window> {
        let cap = self.initial.pci_cfg;
        let word = |at: usize| {
            let field = &self.bytes[cap + at..][..4];
            field.iter().rev().fold(0u32, |value, byte| value << 8 | u32::from(*byte))
        };
        let len = usize::try_from(word(virtio_cap::STRUCTURE_LENGTH)).ok()?;
        let offset = u64::from(word(virtio_cap::OFFSET));
        let aligned =
            matches!(len, 1 | 2 | 4) && offset.is_multiple_of(u64::from(word(virtio_cap::STRUCTURE_LENGTH)));
        let bar = self.bytes[cap + virtio_cap::BAR];
        let data = cap + virtio_cap::EXTENSION;
        (aligned && bar <= pci::NOTIFY_BAR).then_some(Window { bar, offset, len, data })
    }

    /// Whether a read of `len` bytes at `offset` reads `pci_cfg_data`.
    pub(crate) fn is_window(&self, offset: u64, len: usize) -> bool {
        let data = self.initial.pci_cfg + virtio_cap::EXTENSION;
        usize::try_from(offset).is_ok_and(|at| at == data) && len <= 4
    }

    /// Stores the bytes that a read through the window returned.
    pub(crate) fn set_window_data(&mut self, window: Window, data: &[u8]) {
        self.bytes[window.data..][..window.len].copy_from_slice(data);
    }

    /// Returns the bytes that a write through the window writes.
    pub(crate) fn window_data(&self, window: Window) -> [u8; 4] {
        let mut data = [0; 4];
        data.copy_from_slice(&self.bytes[window.data..][..4]);
        data
    }

    /// Whether the bus master bit is set: the device may access memory and send interrupts.
    pub(crate) fn bus_master(&self) -> bool {
        let [command, _] = config::COMMAND_BUS_MASTER.to_le_bytes();
        self.bytes[config::COMMAND] & command != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(pci::ConfigSpace::new(19, 1 << 20), |bar| match bar {
            pci::REGISTER_BAR => pci::REGISTER_BAR_SIZE,
            pci::NOTIFY_BAR => pci::NOTIFY_BAR_SIZE,
            _ => 1 << 36,
        })
    }

    fn read32(space: &ConfigSpace, offset: u64) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn bars_size_themselves() {
        let mut space = space();
        for register in 0..6 {
            assert_eq!(space.write(0x10 + 4 * register, &[0xff; 4]), Effect::None);
        }
        let sizes: Vec<_> = (0..6).map(|register| read32(&space, 0x10 + 4 * register)).collect();
        assert_eq!(sizes, [0xffff_8000, 0, 0xffff_c004, 0xffff_ffff, 0x0000_000c, 0xffff_fff0]);
    }

    #[test]
    fn only_what_is_writable_changes_and_reset_undoes_it() {
        let mut space = space();
        for offset in 0..256 {
            space.write(offset, &[0xff]);
        }
        assert_eq!(read32(&space, 0), 0x107d_1af4);
        assert_eq!(read32(&space, 4), 0x0010_0406);
        assert!(space.bus_master());
        space.reset();
        assert_eq!(space.bytes, space.initial.bytes);
        assert!(!space.bus_master());
    }

    #[test]
    fn accesses_beyond_the_end_are_harmless() {
        let mut space = space();
        assert_eq!(space.write(254, &[1; 8]), Effect::None);
        assert_eq!(space.write(u64::MAX, &[1; 8]), Effect::None);
        let mut data = [7; 8];
        space.read(252, &mut data);
        assert_eq!(data, [0; 8]);
        space.read(u64::MAX - 1, &mut data);
    }

    #[test]
    fn function_level_reset_is_asked_for_by_any_write_that_covers_the_control_byte() {
        let mut space = space();
        let control = u64::try_from(space.initial.af + af::CONTROL).expect("small");
        assert_eq!(space.write(control, &[1]), Effect::Reset);
        assert_eq!(space.write(control - 4, &[0, 0, 0, 0, 1]), Effect::Reset);
        assert_eq!(space.write(control, &[2]), Effect::None);
    }

    /// Every write of a byte, and writes of up to eight bytes, at every offset, from the state after a reset and from one in which all bits that
    /// can be are set.
    #[test]
    fn any_write_changes_writable_bits_only_and_says_what_follows() {
        let mut full = space();
        for offset in 0..256 {
            full.write(offset, &[0xff]);
        }
        for start in [space().bytes, full.bytes] {
            let mut space = space();
            let (control, window) =
                (space.initial.af + af::CONTROL, space.initial.pci_cfg + virtio_cap::EXTENSION);
            for (offset, len) in
                (0..CONFIG_SPACE_SIZE + 8).flat_map(|offset| (0..=8).map(move |len| (offset, len)))
            {
                let some = [0, 1, 0x55, 0xff].into_iter();
                for value in some.chain(2..if len == 1 { 0xff } else { 2 }) {
                    space.bytes = start;
                    let effect = space.write(offset as u64, &[value; 8][..len]);
                    let written = offset..offset + len;
                    let mut expected = start;
                    for at in offset..written.end.min(CONFIG_SPACE_SIZE) {
                        let mask = space.writable[at];
                        expected[at] = start[at] & !mask | value & mask;
                    }
                    assert_eq!(space.bytes, expected, "{offset} {len} {value}");
                    let want = match offset {
                        _ if written.contains(&control) && value & af::INITIATE_FLR != 0 => Effect::Reset,
                        _ if offset == window => Effect::WindowWrite,
                        _ => Effect::None,
                    };
                    assert_eq!(effect, want, "{offset} {len} {value}");
                }
            }
        }
    }

    /// Every BAR number with lengths and offsets at the edges.
    #[test]
    fn the_window_opens_to_aligned_accesses_of_existing_bars_only() {
        let mut space = space();
        let cap = space.initial.pci_cfg;
        for bar in 0..=u8::MAX {
            for len in [0, 1, 2, 3, 4, 5, 8, 1 << 31, u32::MAX] {
                for offset in (0..9).chain([u32::MAX - 3, u32::MAX - 1, u32::MAX]) {
                    space.bytes[cap + virtio_cap::BAR] = bar;
                    space.bytes[cap + virtio_cap::OFFSET..][..4].copy_from_slice(&offset.to_le_bytes());
                    space.bytes[cap + virtio_cap::STRUCTURE_LENGTH..][..4]
                        .copy_from_slice(&len.to_le_bytes());
                    let want = bar <= 2 && matches!(len, 1 | 2 | 4) && offset % len == 0;
                    let got = space.window();
                    assert_eq!(got.is_some(), want, "{bar} {len} {offset}");
                    if let Some(window) = got {
                        assert_eq!((window.bar, window.offset), (bar, offset.into()));
                        assert!(window.len <= 4 && window.data + 4 <= CONFIG_SPACE_SIZE);
                    }
                }
            }
        }
    }
}
