//! The driver: brings a vvu device up, sends and receives its messages, watches its link.

use std::fs::File;
use std::thread;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::layout::{Layout, LayoutError};
use super::pci_device::{DeviceError, PciDevice};
use super::queue::{Queue, QueueError};
use super::registers::Registers;
use crate::message_socket::Message;
use crate::spec::addr::QueueIndex;
use crate::spec::pci::{Region, SHARED_MEMORY_BAR, Structure, config};
use crate::spec::vhost_user::{HEADER_SIZE, Header, MessageError};
use crate::spec::virtio::{
    NO_VECTOR, RX_QUEUE, TX_QUEUE, common, device_config, feature, status, vector_select,
};

/// Vector of configuration changes and of the receive queue.
const RX_VECTOR: u16 = 0;
/// Vector of the transmit queue.
const TX_VECTOR: u16 = 1;
/// Vector of kicks of vhost queue 0; those of the others follow.
const KICK_VECTOR: u16 = 2;
/// Most vhost queues driven: the messages hold an index of 8 bits.
const QUEUES_MAX: u16 = 256;
/// Descriptors of each virtqueue, if the device allows that many.
const QUEUE_SIZE: u16 = 64;
/// A reset takes the device no time, so this many looks at its status are ample.
const RESET_POLLS: u32 = 100;
const RESET_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A device that cannot be driven, or cannot be driven any longer.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// An access failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Not a vvu device.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The device broke the rules of a virtqueue.
    #[error("{queue} queue: {source}")]
    Queue {
        /// `receive` or `transmit`.
        queue: &'static str,
        /// What it did.
        source: QueueError,
    },
    /// The device did not reset.
    #[error("the device did not reset: its status is {status:#04x}, want 0")]
    Reset {
        /// Device status.
        status: u8,
    },
    /// The device lacks a feature.
    #[error("the device offers features {offered:#x}, without {missing}, which this driver needs")]
    Feature {
        /// Name of the feature.
        missing: &'static str,
        /// Feature bits.
        offered: u64,
    },
    /// The device turned down the features it had offered.
    #[error("the device turned down features {features:#x}, which it had offered")]
    FeaturesRefused {
        /// Feature bits.
        features: u64,
    },
    /// A queue is missing.
    #[error("the device has no {queue} queue")]
    NoQueue {
        /// `receive` or `transmit`.
        queue: &'static str,
    },
    /// No vhost queue can be served.
    #[error(
        "the device can carry no vhost queue: {queues} queues, {vectors} MSI-X vectors and {doorbells} doorbells"
    )]
    NoVhostQueue {
        /// Queues in its configuration.
        queues: u32,
        /// MSI-X vectors.
        vectors: u16,
        /// Doorbells that fit in the structure.
        doorbells: u64,
    },
    /// A register does not keep what is written to it.
    #[error("{what} reads {got:#x} after {want:#x} was written to it")]
    NotKept {
        /// The register.
        what: &'static str,
        /// Value written.
        want: u16,
        /// Value read.
        got: u16,
    },
    /// A vhost queue beyond those of the device.
    #[error("vhost queue {index}: the device has {queues}")]
    QueueIndex {
        /// Queue asked for.
        index: QueueIndex,
        /// Queues there are.
        queues: u16,
    },
    /// The device failed.
    #[error("the device needs a reset: its status is {status:#04x}")]
    NeedsReset {
        /// Device status.
        status: u8,
    },
    /// A received message is not as long as its header says.
    #[error("received {got} bytes that announce a message of {want}")]
    Length {
        /// Bytes received.
        got: usize,
        /// Bytes that the header announces, itself included.
        want: usize,
    },
    /// A received message is none.
    #[error("received: {0}")]
    Message(#[from] MessageError),
    /// An eventfd could not be made.
    #[error("eventfd: {0}")]
    EventFd(std::io::Error),
}

/// What came from the device.
#[derive(Debug)]
pub enum Incoming {
    /// A message of the front-end; no file descriptors come with it.
    Message(Message),
    /// The front-end left; what comes next is from another one.
    FrontendLeft,
}

/// State of the link, from the device configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// The back-end waits for a front-end or has one. The device clears this when the front-end
    /// leaves.
    pub backend_up: bool,
    /// A front-end is connected.
    pub frontend_up: bool,
}

/// A vvu device that is up and running. Dropping it resets the device.
#[derive(Debug)]
pub struct Driver<D: PciDevice> {
    device: D,
    layout: Layout,
    rx: Queue,
    tx: Queue,
    rx_notify: u64,
    tx_notify: u64,
    /// Receive buffers were given back that the device has not been told about.
    rx_posted: bool,
    rx_event: EventFd,
    tx_event: EventFd,
    kicks: Vec<EventFd>,
    calls: Vec<Option<EventFd>>,
    errs: Vec<Option<EventFd>>,
    /// First doorbell of errors: the number of vhost queues of the device.
    err_base: u16,
}

impl<D: PciDevice> Driver<D> {
    /// Checks that `device` is a vvu device and brings it up to `DRIVER_OK`.
    ///
    /// # Errors
    /// Any [`DriverError`] but `Length`, `Message` and `QueueIndex`; the device is left reset.
    pub fn new(device: D) -> Result<Self, DriverError> {
        let layout = Layout::probe(&device)?;
        let mut command = [0; 2];
        let at = u64::from(COMMAND);
        device.read(Region::Config, at, &mut command)?;
        let command = u16::from_le_bytes(command) | config::COMMAND_MEMORY | config::COMMAND_BUS_MASTER;
        device.write(Region::Config, at, &command.to_le_bytes())?;

        let setup = Setup { device: &device, layout: &layout };
        setup.reset()?;
        setup.set_status(status::ACKNOWLEDGE)?;
        setup.set_status(status::ACKNOWLEDGE | status::DRIVER)?;
        setup.negotiate()?;
        let queues = setup.vhost_queues()?;
        let (rx, rx_notify) = setup.queue(RX_QUEUE, "receive")?;
        let (tx, tx_notify) = setup.queue(TX_QUEUE, "transmit")?;

        let rx_event = event()?;
        let tx_event = event()?;
        let kicks = (0..queues.served).map(|_| event()).collect::<Result<Vec<_>, _>>()?;
        let vectors: Vec<_> = [&rx_event, &tx_event].into_iter().chain(&kicks).collect();
        device.enable_msix(&vectors)?;
        setup.vectors(queues.served)?;

        let unbound = || (0..queues.served).map(|_| None).collect();
        let (calls, errs) = (unbound(), unbound());
        let mut driver = Self {
            device,
            layout,
            rx,
            tx,
            rx_notify,
            tx_notify,
            rx_posted: false,
            rx_event,
            tx_event,
            kicks,
            calls,
            errs,
            err_base: queues.err_base,
        };
        driver.start()?;
        Ok(driver)
    }

    fn setup(&self) -> Setup<'_, D> {
        Setup { device: &self.device, layout: &self.layout }
    }

    fn start(&mut self) -> Result<(), DriverError> {
        let common = self.setup().common();
        for queue in [RX_QUEUE, TX_QUEUE] {
            common.write16(common::QUEUE_SELECT, queue)?;
            common.write16(common::QUEUE_ENABLE, 1)?;
        }
        self.setup()
            .set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK)?;
        self.rx.post_all().map_err(rx_error)?;
        self.notify(self.rx_notify, RX_QUEUE)
    }

    /// vhost queues that can be served.
    #[must_use]
    pub fn queues(&self) -> u16 {
        u16::try_from(self.kicks.len()).unwrap_or(QUEUES_MAX)
    }

    /// Bytes of sibling memory that the shared memory BAR shows.
    #[must_use]
    pub fn shared_memory_size(&self) -> u64 {
        self.layout.shared_memory
    }

    /// The sibling's memory: offsets are those of the memory regions in messages.
    ///
    /// # Errors
    /// [`DriverError::Device`].
    pub fn shared_memory(&self) -> Result<File, DriverError> {
        Ok(self.device.bar_file(SHARED_MEMORY_BAR)?)
    }

    /// Signalled when something was received or the link changed.
    #[must_use]
    pub fn rx_event(&self) -> &EventFd {
        &self.rx_event
    }

    /// Signalled when something was sent, so that there is room again.
    #[must_use]
    pub fn tx_event(&self) -> &EventFd {
        &self.tx_event
    }

    /// Signalled when the sibling kicks vhost queue `index`.
    ///
    /// # Errors
    /// [`DriverError::QueueIndex`].
    pub fn kick(&self, index: QueueIndex) -> Result<&EventFd, DriverError> {
        self.kicks.get(usize::from(index.0)).ok_or(self.no_queue(index))
    }

    /// Signal this to interrupt the sibling on behalf of vhost queue `index`.
    ///
    /// # Errors
    /// [`DriverError::QueueIndex`], [`DriverError::Device`].
    pub fn call(&mut self, index: QueueIndex) -> Result<&EventFd, DriverError> {
        let missing = self.no_queue(index);
        let call = self.calls.get_mut(usize::from(index.0)).ok_or(missing)?;
        bind(&self.device, &self.layout, index.0, call)
    }

    /// Signal this to tell the sibling's VMM of an error of vhost queue `index`.
    ///
    /// # Errors
    /// [`DriverError::QueueIndex`], [`DriverError::Device`].
    pub fn err(&mut self, index: QueueIndex) -> Result<&EventFd, DriverError> {
        let missing = self.no_queue(index);
        let err = self.errs.get_mut(usize::from(index.0)).ok_or(missing)?;
        bind(&self.device, &self.layout, self.err_base + index.0, err)
    }

    fn no_queue(&self, index: QueueIndex) -> DriverError {
        DriverError::QueueIndex { index, queues: self.queues() }
    }

    /// Lets a front-end connect, or with `false` disconnects the one that is connected.
    ///
    /// # Errors
    /// [`DriverError::Device`].
    pub fn set_backend_up(&self, up: bool) -> Result<(), DriverError> {
        let value = if up { device_config::BACKEND_UP } else { 0 };
        Ok(self.setup().device_config().write32(device_config::STATUS, value)?)
    }

    /// Reads the state of the link.
    ///
    /// # Errors
    /// [`DriverError::Device`], [`DriverError::NeedsReset`].
    pub fn link(&self) -> Result<Link, DriverError> {
        let status = self.setup().common().read8(common::DEVICE_STATUS)?;
        if status & status::NEEDS_RESET != 0 {
            return Err(DriverError::NeedsReset { status });
        }
        let link = self.setup().device_config().read32(device_config::STATUS)?;
        Ok(Link {
            backend_up: link & device_config::BACKEND_UP != 0,
            frontend_up: link & device_config::FRONTEND_UP != 0,
        })
    }

    /// The next message of the front-end, or `None` if none is there now.
    ///
    /// # Errors
    /// [`DriverError::Queue`], [`DriverError::Length`], [`DriverError::Message`],
    /// [`DriverError::Device`]; the device cannot be trusted any longer.
    pub fn receive(&mut self) -> Result<Option<Incoming>, DriverError> {
        let Some(used) = self.rx.pop().map_err(rx_error)? else {
            // One notification for all buffers given back since the last: each is a trap.
            if std::mem::take(&mut self.rx_posted) {
                self.notify(self.rx_notify, RX_QUEUE)?;
            }
            return Ok(None);
        };
        let bytes = self.rx.read(used).map_err(rx_error)?;
        self.rx.post_all().map_err(rx_error)?;
        self.rx_posted = true;
        if bytes.is_empty() {
            return Ok(Some(Incoming::FrontendLeft));
        }
        let header = Header::parse(&bytes)?;
        let want = HEADER_SIZE + header.payload_size();
        if bytes.len() != want {
            return Err(DriverError::Length { got: bytes.len(), want });
        }
        Ok(Some(Incoming::Message(Message { header, bytes, fds: Vec::new() })))
    }

    /// Whether [`send`](Self::send) would take a message.
    ///
    /// # Errors
    /// [`DriverError::Queue`].
    pub fn can_send(&mut self) -> Result<bool, DriverError> {
        while self.tx.pop().map_err(tx_error)?.is_some() {}
        Ok(self.tx.has_free())
    }

    /// Sends a whole message towards the front-end; false if there is no room now.
    ///
    /// # Errors
    /// [`DriverError::Queue`], [`DriverError::Device`].
    pub fn send(&mut self, message: &[u8]) -> Result<bool, DriverError> {
        let sent = self.can_send()? && self.tx.push(message).map_err(tx_error)?;
        if sent {
            self.notify(self.tx_notify, TX_QUEUE)?;
        }
        Ok(sent)
    }

    fn notify(&self, offset: u64, queue: u16) -> Result<(), DriverError> {
        let at = Registers { device: &self.device, at: self.layout.notify };
        Ok(at.write16(offset, queue)?)
    }
}

impl<D: PciDevice> Drop for Driver<D> {
    fn drop(&mut self) {
        // The device must not touch memory that is about to be freed; nobody is left to be told.
        if let Err(error) = self.setup().reset() {
            log::warn!("resetting the device at the end: {error}");
        }
    }
}

/// Offset of the command register as a region offset.
const COMMAND: u8 = 0x04;
const _: () = assert!(COMMAND as usize == config::COMMAND);

fn rx_error(source: QueueError) -> DriverError {
    DriverError::Queue { queue: "receive", source }
}

fn tx_error(source: QueueError) -> DriverError {
    DriverError::Queue { queue: "transmit", source }
}

fn event() -> Result<EventFd, DriverError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(DriverError::EventFd)
}

/// The eventfd in `slot`, tied to doorbell `index` on its first use.
fn bind<'s, D: PciDevice>(
    device: &D,
    layout: &Layout,
    index: u16,
    slot: &'s mut Option<EventFd>,
) -> Result<&'s EventFd, DriverError> {
    if slot.is_none() {
        let event = event()?;
        let Structure { bar, offset, .. } = layout.doorbells;
        let offset = offset + u64::from(index) * u64::from(layout.doorbell_multiplier);
        device.bind_doorbell(bar, offset, index, &event)?;
        *slot = Some(event);
    }
    slot.as_ref().ok_or(DriverError::NoQueue { queue: "call" })
}

/// How many vhost queues there are.
struct VhostQueues {
    /// Queues that have a vector and two doorbells each.
    served: u16,
    /// Doorbell of the first queue's errors.
    err_base: u16,
}

/// The steps of bringing a device up (virtio 1.2, 3.1).
struct Setup<'d, D> {
    device: &'d D,
    layout: &'d Layout,
}

impl<'d, D: PciDevice> Setup<'d, D> {
    fn common(&self) -> Registers<'d, D> {
        Registers { device: self.device, at: self.layout.common }
    }

    fn device_config(&self) -> Registers<'d, D> {
        Registers { device: self.device, at: self.layout.device }
    }

    fn set_status(&self, status: u8) -> Result<(), DriverError> {
        Ok(self.common().write8(common::DEVICE_STATUS, status)?)
    }

    fn reset(&self) -> Result<(), DriverError> {
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
        // Without ACCESS_PLATFORM the device would take IOVAs for physical addresses.
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

    /// Sets a virtqueue up but for its vector; returns it with its offset in the notify structure.
    fn queue(&self, index: u16, name: &'static str) -> Result<(Queue, u64), DriverError> {
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
        Ok((queue, notify * u64::from(self.layout.notify_multiplier)))
    }

    /// Gives every source of interrupts its vector; each must be kept.
    fn vectors(&self, queues: u16) -> Result<(), DriverError> {
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
