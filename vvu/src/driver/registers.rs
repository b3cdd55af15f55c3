//! Typed access to the registers of one structure.

use crate::pci::{DeviceError, PciDevice};
use crate::spec::pci::{Region, Structure};
use crate::spec::virtio::device_config;

/// The registers of one structure of a device.
pub(super) struct Registers<'d, D> {
    pub(super) device: &'d D,
    pub(super) at: Structure,
}

impl<D: PciDevice> Registers<'_, D> {
    fn read<const N: usize>(&self, offset: u64) -> Result<[u8; N], DeviceError> {
        let mut bytes = [0; N];
        self.check(offset, N)?;
        self.device.read(Region::Bar(self.at.bar), self.at.offset + offset, &mut bytes)?;
        Ok(bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.check(offset, bytes.len())?;
        self.device.write(Region::Bar(self.at.bar), self.at.offset + offset, bytes)
    }

    /// Checks an access against the structure, since the device chooses some of the offsets.
    fn check(&self, offset: u64, len: usize) -> Result<(), DeviceError> {
        let Structure { bar, offset: start, length } = self.at;
        let end = offset.checked_add(u64::try_from(len).unwrap_or(u64::MAX));
        if end.is_some_and(|end| end <= length) {
            return Ok(());
        }
        let offset = start.saturating_add(offset);
        Err(DeviceError::OutOfRange { region: Region::Bar(bar), offset, len, size: start + length })
    }

    pub(super) fn read8(&self, offset: u64) -> Result<u8, DeviceError> {
        self.read(offset).map(u8::from_le_bytes)
    }

    pub(super) fn read16(&self, offset: u64) -> Result<u16, DeviceError> {
        self.read(offset).map(u16::from_le_bytes)
    }

    pub(super) fn read32(&self, offset: u64) -> Result<u32, DeviceError> {
        self.read(offset).map(u32::from_le_bytes)
    }

    pub(super) fn write8(&self, offset: u64, value: u8) -> Result<(), DeviceError> {
        self.write(offset, &[value])
    }

    pub(super) fn write16(&self, offset: u64, value: u16) -> Result<(), DeviceError> {
        self.write(offset, &value.to_le_bytes())
    }

    pub(super) fn write32(&self, offset: u64, value: u32) -> Result<(), DeviceError> {
        self.write(offset, &value.to_le_bytes())
    }

    /// Writes a 64-bit field as two 32-bit accesses (virtio 1.2, 4.1.3.1).
    pub(super) fn write64(&self, offset: u64, value: u64) -> Result<(), DeviceError> {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        self.write(offset, &[a, b, c, d])?;
        self.write(offset + 4, &[e, f, g, h])
    }
}

/// Reads the UUID of a vvu device, whose device configuration `read` reads by le32.
pub(super) fn uuid<E>(read: impl Fn(u64) -> Result<u32, E>) -> Result<[u8; 16], E> {
    let mut uuid = [0; 16];
    for (at, word) in (device_config::UUID..).step_by(4).zip(uuid.chunks_exact_mut(4)) {
        word.copy_from_slice(&read(at)?.to_le_bytes());
    }
    Ok(uuid)
}
