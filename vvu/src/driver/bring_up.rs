//! Brings a vvu device up, step by step (virtio 1.2, 3.1).

use std::thread;
use std::time::Duration;

use crate::event::Event;

use super::error::DriverError;
use super::layout::Layout;
use super::queue::Queue;
use super::registers::Registers;
use crate::pci::PciDevice;
use crate::spec::pci::{Region, config};
use crate::spec::virtio::{
    NO_VECTOR, RX_QUEUE, TX_QUEUE, common, device_config, feature, status, vector_select,
};

/// Vector of configuration changes and of the receive queue.
const RX_VECTOR: u16 = 0;
/// Vector of the transmit queue.
const TX_VECTOR: u16 = 1;
/// Vector of kicks of vhost queue 0; the vectors of the other queues follow.
const KICK_VECTOR: u16 = 2;
/// Most vhost queues that this driver uses: the index in a message has 8 bits.
pub(super) const QUEUES_MAX: u16 = 256;
/// Most descriptors of a virtqueue that this driver uses.
const QUEUE_SIZE: u16 = 64;
/// Reads of the device status until a reset has failed. A reset of the vvu device takes no time.
const RESET_POLLS: u32 = 100;
const RESET_POLL_INTERVAL: Duration = Duration::from_millis(if cfg!(fuzzing) { 0 } else { 10 });
/// Offset of the command register in the configuration space.
const COMMAND: u64 = config::COMMAND as u64;

/// A virtqueue with its notify address and its event.
#[derive(Debug)]
pub(super) struct MessageQueue {
    pub(super) queue: Queue,
    /// Offset of its notify address in the notify structure.
    pub(super) notify: u64,
    /// Event that the vector of the queue signals.
    pub(super) event: Event,
}

/// A device up to `FEATURES_OK`: its queues and the events of its vectors.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) rx: MessageQueue,
    pub(super) tx: MessageQueue,
    /// For each vhost queue, the event that a kick of the sibling signals.
    pub(super) kicks: Vec<Event>,
    /// Doorbell of the first vhost queue's errors.
    pub(super) err_base: u16,
}

/// Number of vhost queues and place of their doorbells.
struct VhostQueues {
    /// Number of queues that have a vector and two doorbells each.
    served: u16,
    /// Doorbell of the first queue's errors.
    err_base: u16,
}

/// A device that is not up yet, or on its way down.
pub(super) struct BringUp<'d, D> {
    pub(super) device: &'d D,
    pub(super) layout: &'d Layout,
}

impl<'d, D: PciDevice> BringUp<'d, D> {
    /// Resets the device, negotiates the features, and sets queues and vectors up. Sets the status `FAILED` on failure.
    pub(super) fn prepare(&self) -> Result<Prepared, DriverError> {
        self.try_prepare().inspect_err(|_| {
            // The first failure is the one to report.
            let _ = self.set_status(status::FAILED);
        })
    }

    fn try_prepare(&self) -> Result<Prepared, DriverError> {
        self.turn_on()?;
        self.reset()?;
        self.set_status(status::ACKNOWLEDGE)?;
        self.set_status(status::ACKNOWLEDGE | status::DRIVER)?;
        self.negotiate()?;
        let VhostQueues { served, err_base } = self.vhost_queues()?;
        let rx = self.queue(RX_QUEUE, "receive")?;
        let tx = self.queue(TX_QUEUE, "transmit")?;
        let kicks =
            (0..served).map(|_| Event::new()).collect::<Result<Vec<_>, _>>().map_err(DriverError::Event)?;
        let vectors: Vec<_> = [&rx.event, &tx.event].into_iter().chain(&kicks).collect();
        self.device.enable_msix(&vectors)?;
        self.set_vectors(served)?;
        Ok(Prepared { rx, tx, kicks, err_base })
    }

    /// Enables the queues and sets `DRIVER_OK`.
    pub(super) fn start(&self) -> Result<(), DriverError> {
        let common = self.common();
        for queue in [RX_QUEUE, TX_QUEUE] {
            common.write16(common::QUEUE_SELECT, queue)?;
            common.write16(common::QUEUE_ENABLE, 1)?;
        }
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK)
    }

    /// Turns memory access and bus mastering on.
    fn turn_on(&self) -> Result<(), DriverError> {
        let mut command = [0; 2];
        self.device.read(Region::Config, COMMAND, &mut command)?;
        let command = u16::from_le_bytes(command) | config::COMMAND_MEMORY | config::COMMAND_BUS_MASTER;
        Ok(self.device.write(Region::Config, COMMAND, &command.to_le_bytes())?)
    }

    pub(super) fn common(&self) -> Registers<'d, D> {
        Registers { device: self.device, at: self.layout.common }
    }

    pub(super) fn device_config(&self) -> Registers<'d, D> {
        Registers { device: self.device, at: self.layout.device }
    }

    fn set_status(&self, status: u8) -> Result<(), DriverError> {
        Ok(self.common().write8(common::DEVICE_STATUS, status)?)
    }

    pub(super) fn reset(&self) -> Result<(), DriverError> {
        self.set_status(0)?;
        let mut status = 0;
        for _ in 0..RESET_POLLS {
            status = self.common().read8(common::DEVICE_STATUS)?;
            if status == 0 {
                return Ok(());
            }
            thread::sleep(RESET_POLL_INTERVAL);
        }
        Err(DriverError::Reset { status })
    }

    fn negotiate(&self) -> Result<(), DriverError> {
        let common = self.common();
        let mut offered = 0;
        for half in [1, 0] {
            common.write32(common::DEVICE_FEATURE_SELECT, half)?;
            offered = offered << 32 | u64::from(common.read32(common::DEVICE_FEATURE)?);
        }
        // A device without ACCESS_PLATFORM takes IOVAs for physical addresses.
        for (bit, missing) in
            [(feature::VERSION_1, "VERSION_1"), (feature::ACCESS_PLATFORM, "ACCESS_PLATFORM")]
        {
            if offered & bit == 0 {
                return Err(DriverError::Feature { missing, offered });
            }
        }
        let features = feature::VERSION_1 | feature::ACCESS_PLATFORM;
        for (half, bits) in [(0, features), (1, features >> 32)] {
            common.write32(common::DRIVER_FEATURE_SELECT, half)?;
            let bits = u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(0);
            common.write32(common::DRIVER_FEATURE, bits)?;
        }
        let wanted = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.set_status(wanted)?;
        if common.read8(common::DEVICE_STATUS)? & status::FEATURES_OK == 0 {
            return Err(DriverError::FeaturesRefused { features });
        }
        Ok(())
    }

    fn vhost_queues(&self) -> Result<VhostQueues, DriverError> {
        let queues = self.device_config().read32(device_config::MAX_VHOST_QUEUES)?;
        let err_base = u16::try_from(queues).unwrap_or(u16::MAX).min(QUEUES_MAX);
        let vectors = self.layout.vectors;
        let doorbells = match u64::from(self.layout.doorbell_multiplier) {
            0 => u64::MAX,
            multiplier => (self.layout.doorbells.length - 2) / multiplier + 1,
        };
        let with_doorbell = doorbells.saturating_sub(u64::from(err_base));
        let served = err_base
            .min(vectors.saturating_sub(KICK_VECTOR))
            .min(u16::try_from(with_doorbell).unwrap_or(u16::MAX));
        if served == 0 {
            return Err(DriverError::NoVhostQueue { queues, vectors, doorbells });
        }
        Ok(VhostQueues { served, err_base })
    }

    /// Sets a virtqueue up, except for its vector.
    fn queue(&self, index: u16, name: &'static str) -> Result<MessageQueue, DriverError> {
        let common = self.common();
        common.write16(common::QUEUE_SELECT, index)?;
        let max = common.read16(common::QUEUE_SIZE)?;
        // The largest power of two that both sides allow.
        let size = max.min(QUEUE_SIZE).checked_ilog2().ok_or(DriverError::NoQueue { queue: name })?;
        let queue = Queue::new(self.device, 1 << size)?;
        common.write16(common::QUEUE_SIZE, queue.size())?;
        let [descriptors, available, used] = queue.addresses();
        common.write64(common::QUEUE_DESC, descriptors.0)?;
        common.write64(common::QUEUE_DRIVER, available.0)?;
        common.write64(common::QUEUE_DEVICE, used.0)?;
        let notify = u64::from(common.read16(common::QUEUE_NOTIFY_OFF)?);
        let notify = notify * u64::from(self.layout.notify_multiplier);
        Ok(MessageQueue { queue, notify, event: Event::new().map_err(DriverError::Event)? })
    }

    /// Gives every source of interrupts its vector, and checks that the device keeps it.
    fn set_vectors(&self, queues: u16) -> Result<(), DriverError> {
        let common = self.common();
        keep16(&common, common::CONFIG_MSIX_VECTOR, RX_VECTOR, "config_msix_vector")?;
        for (queue, vector) in [(RX_QUEUE, RX_VECTOR), (TX_QUEUE, TX_VECTOR)] {
            common.write16(common::QUEUE_SELECT, queue)?;
            keep16(&common, common::QUEUE_MSIX_VECTOR, vector, "queue_msix_vector")?;
        }
        let select = Registers { device: self.device, at: self.layout.vector_select };
        for queue in 0..queues {
            keep16(&select, vector_select::SELECT, queue, "select of vector select")?;
            keep16(&select, vector_select::MSIX_VECTOR, KICK_VECTOR + queue, "vector of vector select")?;
        }
        Ok(())
    }
}

/// Writes a register and checks that it reads back.
fn keep16<D: PciDevice>(
    at: &Registers<'_, D>,
    offset: u64,
    want: u16,
    what: &'static str,
) -> Result<(), DriverError> {
    debug_assert_ne!(want, NO_VECTOR);
    at.write16(offset, want)?;
    let got = at.read16(offset)?;
    if got == want { Ok(()) } else { Err(DriverError::NotKept { what, want, got }) }
}
