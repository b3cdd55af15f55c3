//! The doorbells of a vvu device.

use super::error::DriverError;
use super::layout::Layout;
use crate::event::Event;
use crate::pci::{Doorbell, DoorbellValue, PciDevice};
use crate::spec::pci::Structure;

/// The doorbells, by index.
pub(super) struct Doorbells<'d, D> {
    pub(super) device: &'d D,
    pub(super) layout: &'d Layout,
}

impl<D: PciDevice> Doorbells<'_, D> {
    fn get(&self, index: u16) -> Doorbell {
        let Structure { bar, offset, .. } = self.layout.doorbells;
        let offset = offset + u64::from(index) * u64::from(self.layout.doorbell_multiplier);
        Doorbell { bar, offset, value: DoorbellValue::Le16(index) }
    }

    /// Makes each further signal of `event` ring doorbell `index`.
    pub(super) fn bind(&self, index: u16, event: &Event) -> Result<(), DriverError> {
        Ok(self.device.bind_doorbell(self.get(index), event)?)
    }

    /// Undoes [`bind`](Self::bind).
    pub(super) fn unbind(&self, index: u16) -> Result<(), DriverError> {
        Ok(self.device.unbind_doorbell(self.get(index))?)
    }

    /// Rings doorbell `index` once.
    pub(super) fn ring(&self, index: u16) -> Result<(), DriverError> {
        Ok(self.get(index).ring(|region, offset, data| self.device.write(region, offset, data))?)
    }
}
