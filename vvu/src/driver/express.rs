//! The express device as the guest driver uses it.

use crate::event::Event;
use crate::pci::{DeviceError, DirectDoorbells, Doorbell, DoorbellValue, PciDevice};
use crate::spec::addr::QueueIndex;
use crate::spec::express::page::{Entry, HEADER_SIZE, Header};
use crate::spec::express::{DOORBELL, PAGE_BAR, PeerId, REGISTER_BAR};
use crate::spec::pci::{Region, config};

pub mod find;
pub(crate) mod switch;

const PAGE: Region = Region::Bar(PAGE_BAR);
/// Offset of the command register in the configuration space.
const COMMAND: u64 = config::COMMAND as u64;

/// A device is not the express device of a vvu device.
#[derive(Debug, thiserror::Error)]
pub enum ExpressError {
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The page of the device is of another kind, or of another version.
    #[error("its shared page is none of this version of vvu: use the same vvu in the VM as on its host")]
    Page,
    /// The device belongs to another vvu device.
    #[error("it belongs to another vvu device")]
    Foreign,
    /// The device has fewer queues than the vvu device.
    #[error("it has {got} queues, the vvu device has {want}")]
    Queues {
        /// Queues of the express device.
        got: u16,
        /// Queues of the vvu device.
        want: u16,
    },
}

/// The express device of the vvu device that is driven.
pub(super) struct ExpressDevice(Box<dyn PciDevice>);

impl std::fmt::Debug for ExpressDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExpressDevice").finish_non_exhaustive()
    }
}

impl ExpressDevice {
    /// Turns `device` on, and checks that it belongs to the vvu device with this `uuid` and number of queues.
    pub(super) fn new(device: Box<dyn PciDevice>, uuid: [u8; 16], queues: u16) -> Result<Self, ExpressError> {
        let mut command = [0; 2];
        device.read(Region::Config, COMMAND, &mut command)?;
        let command = u16::from_le_bytes(command) | config::COMMAND_MEMORY;
        device.write(Region::Config, COMMAND, &command.to_le_bytes())?;
        let mut bytes = [0; HEADER_SIZE];
        device.read(PAGE, 0, &mut bytes)?;
        let header = Header::parse(&bytes).ok_or(ExpressError::Page)?;
        if header.uuid != uuid {
            return Err(ExpressError::Foreign);
        }
        if header.queues < queues {
            return Err(ExpressError::Queues { got: header.queues, want: queues });
        }
        Ok(Self(device))
    }

    /// Maps the doorbell register for `queues` queues; `None` if it cannot be mapped.
    pub(super) fn direct_doorbells(&self, queues: u16) -> Option<DirectDoorbells> {
        let registers = self.0.map_registers(REGISTER_BAR)?;
        Some(DirectDoorbells::new(registers, usize::try_from(DOORBELL).ok()?, queues))
    }

    /// Reads what the page says about a queue.
    pub(super) fn entry(&self, queue: QueueIndex) -> Result<Entry, DeviceError> {
        let read = |offset| {
            let mut bytes = [0; 4];
            self.0.read(PAGE, offset, &mut bytes).map(|()| u32::from_le_bytes(bytes))
        };
        let call = read(Entry::call_offset(queue))?;
        Ok(Entry::from_values([call, read(Entry::registered_offset(queue))?]))
    }

    /// Makes each further signal of `event` signal the call eventfd of `peer`.
    pub(super) fn bind(&self, peer: PeerId, event: &Event) -> Result<(), DeviceError> {
        self.0.bind_doorbell(doorbell(peer.call()), event)
    }

    /// Undoes [`bind`](Self::bind).
    pub(super) fn unbind(&self, peer: PeerId) -> Result<(), DeviceError> {
        self.0.unbind_doorbell(doorbell(peer.call()))
    }

    /// Asks whether the VMM knows the call eventfd of `peer`. The answer comes through the page.
    pub(super) fn confirm(&self, peer: PeerId) -> Result<(), DeviceError> {
        doorbell(peer.confirm()).ring(|region, offset, data| self.0.write(region, offset, data))
    }
}

fn doorbell(value: u32) -> Doorbell {
    Doorbell { bar: REGISTER_BAR, offset: DOORBELL, value: DoorbellValue::Le32(value) }
}
