//! The driver of a vvu device that is up: sends and receives its messages, watches its link.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use crate::event::Event;

use super::bring_up::{BringUp, MessageQueue, Prepared, QUEUES_MAX};
use super::calls::Calls;
use super::doorbells::Doorbells;
use super::error::DriverError;
use super::express::{ExpressDevice, ExpressError};
use super::layout::Layout;
use super::queue::QueueError;
use super::registers::{self, Registers};
use crate::message_socket::Message;
use crate::pci::{BarFile, DeviceError, DirectDoorbells, PciDevice};
use crate::spec::addr::QueueIndex;
use crate::spec::pci::{Region, SHARED_MEMORY_BAR};
use crate::spec::vhost_user::{HEADER_SIZE, Header};
use crate::spec::virtio::{RX_QUEUE, TX_QUEUE, common, device_config, status};

/// A message or an event from the device.
#[derive(Debug)]
pub enum Incoming {
    /// A message of the front-end, without file descriptors.
    Message(Message),
    /// The front-end left; the next message is from another front-end.
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
    rx: MessageQueue,
    tx: MessageQueue,
    /// The device has yet to be notified of receive buffers that it got back.
    rx_posted: bool,
    kicks: Vec<Event>,
    calls: Calls,
    errs: Vec<Option<Event>>,
    /// Doorbell of the first vhost queue's errors.
    err_base: u16,
    window: Option<Window>,
}

/// A file that has the content of the shared memory BAR.
#[derive(Debug)]
struct Window {
    /// Name of the persistent memory.
    name: String,
    file: File,
    /// Bytes.
    size: u64,
}

/// Sizes of a device's memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSizes {
    /// What is in front of the sibling's RAM and no part of it; 0 if there is none, so that there must be no window.
    pub header: u64,
    /// All of it.
    pub size: u64,
}

impl<D: PciDevice> Driver<D> {
    /// Checks that `device` is a vvu device and brings it up to `DRIVER_OK`.
    ///
    /// # Errors
    /// Any [`DriverError`] about the device. A device that is no vvu device is not written to.
    pub fn new(device: D) -> Result<Self, DriverError> {
        let layout = Layout::probe(&device)?;
        let Prepared { rx, tx, kicks, err_base } = BringUp { device: &device, layout: &layout }.prepare()?;
        let errs: Vec<_> = kicks.iter().map(|_| None).collect();
        let calls = Calls::new(u16::try_from(errs.len()).unwrap_or(QUEUES_MAX));
        let mut driver =
            Self { device, layout, rx, tx, rx_posted: false, kicks, calls, errs, err_base, window: None };
        driver.registers().start()?;
        driver.rx.queue.post_all().map_err(rx_error)?;
        driver.notify(RX_QUEUE, driver.rx.notify)?;
        Ok(driver)
    }

    fn registers(&self) -> BringUp<'_, D> {
        BringUp { device: &self.device, layout: &self.layout }
    }

    /// Returns the number of vhost queues that can be served.
    #[must_use]
    pub fn queues(&self) -> u16 {
        u16::try_from(self.kicks.len()).unwrap_or(QUEUES_MAX)
    }

    /// Returns the size of the file of the sibling's memory in bytes.
    #[must_use]
    pub fn shared_memory_size(&self) -> u64 {
        self.window.as_ref().map_or(self.layout.shared_memory, |window| window.size)
    }

    /// Returns the file of the sibling's memory: the window, or else the shared memory BAR. Offsets in messages count from
    /// the start of the shared memory BAR.
    ///
    /// # Errors
    /// [`DriverError::Device`].
    pub fn shared_memory(&self) -> Result<BarFile, DriverError> {
        let Some(window) = &self.window else { return Ok(self.device.bar_file(SHARED_MEMORY_BAR)?) };
        let file = window.file.try_clone().map_err(|source| DeviceError::Io {
            what: "duplicate the descriptor of the window".to_owned(),
            source,
        })?;
        Ok(BarFile { file, offset: 0 })
    }

    /// Returns the file of the window, if there is one. Nobody can make it shorter but root in this machine: no path leads
    /// to it.
    #[must_use]
    pub fn window(&self) -> Option<&File> {
        self.window.as_ref().map(|window| &window.file)
    }

    /// Returns the sizes of the device's memory if it can be a window, `None` if the device offers none.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn window_sizes(&self) -> Result<Option<WindowSizes>, DeviceError> {
        let config = self.registers().device_config();
        let has_window = usize::try_from(self.layout.device.length)
            .is_ok_and(|length| length >= device_config::SIZE_WITH_WINDOW);
        if !has_window {
            return Ok(None);
        }
        let read = |at| {
            Ok::<_, DeviceError>(u64::from(config.read32(at + 4)?) << 32 | u64::from(config.read32(at)?))
        };
        let (header, size) = (read(device_config::WINDOW_HEADER)?, read(device_config::WINDOW_SIZE)?);
        Ok((size <= self.layout.shared_memory).then_some(WindowSizes { header, size }))
    }

    /// Writes to the shared memory BAR.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub(crate) fn write_shared_memory(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.device.write(Region::Bar(SHARED_MEMORY_BAR), offset, bytes)
    }

    /// Returns the name of the persistent memory that the window is on, such as `pmem0`; `None` without a window.
    #[must_use]
    pub fn window_name(&self) -> Option<&str> {
        self.window.as_ref().map(|window| window.name.as_str())
    }

    /// Hands out `file`, of `size` bytes, on the persistent memory `name`, in place of the shared memory BAR's file. It has the same content at the same
    /// offsets.
    pub(crate) fn use_window(&mut self, name: String, file: File, size: u64) {
        self.window = Some(Window { name, file, size });
    }

    /// Returns the event that is signalled when a message was received or the link changed.
    #[must_use]
    pub fn rx_event(&self) -> &Event {
        &self.rx.event
    }

    /// Returns the event that is signalled when a message was sent, so that there is room again.
    #[must_use]
    pub fn tx_event(&self) -> &Event {
        &self.tx.event
    }

    /// Returns the event that is signalled when the sibling kicks vhost queue `index`.
    ///
    /// # Errors
    /// [`DriverError::QueueIndex`].
    pub fn kick(&self, index: QueueIndex) -> Result<&Event, DriverError> {
        self.kicks.get(usize::from(index.0)).ok_or(self.no_queue(index))
    }

    /// Returns the event whose signals interrupt the sibling on behalf of vhost queue `index`. Call this for each
    /// `SET_VRING_CALL` with an eventfd before the back-end gets the message: from then on, signals reach the eventfd that
    /// the front-end set.
    ///
    /// # Errors
    /// [`DriverError::QueueIndex`], [`DriverError::Device`].
    pub fn call(&mut self, index: QueueIndex) -> Result<&Event, DriverError> {
        let missing = self.no_queue(index);
        let doorbells = Doorbells { device: &self.device, layout: &self.layout };
        self.calls.renew(&doorbells, index)?.ok_or(missing)
    }

    /// Uses `device` as the express device of this vvu device: calls reach the front-end without the proxy.
    ///
    /// # Errors
    /// [`ExpressError`]; calls then go through the proxy as before.
    pub fn use_express(&mut self, device: Box<dyn PciDevice>) -> Result<(), ExpressError> {
        let uuid = self.uuid()?;
        self.calls.set_express(ExpressDevice::new(device, uuid, self.queues())?);
        Ok(())
    }

    /// Returns the doorbells that a back-end in this process rings without a system call, in place of the events that
    /// [`call`](Self::call) returns. `None` without an express device, or if its register cannot be mapped.
    #[must_use]
    pub fn direct_doorbells(&self) -> Option<Arc<DirectDoorbells>> {
        self.calls.direct_doorbells()
    }

    /// Whether there is an express device that works.
    #[must_use]
    pub fn has_express(&self) -> bool {
        self.calls.has_express()
    }

    /// Checks whether calls can take a better way to the front-end, or have to take another one. To be called when
    /// nothing else happens, at the latest after [`next_check`](Self::next_check).
    ///
    /// # Errors
    /// [`DriverError::Device`].
    pub fn check_calls(&mut self) -> Result<(), DriverError> {
        self.calls.check(&Doorbells { device: &self.device, layout: &self.layout })
    }

    /// Returns when [`check_calls`](Self::check_calls) has something to do, `None` if there is no hurry.
    #[must_use]
    pub fn next_check(&self) -> Option<Duration> {
        self.calls.next_check()
    }

    /// Reads the UUID of the device.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn uuid(&self) -> Result<[u8; 16], DeviceError> {
        let config = self.registers().device_config();
        registers::uuid(|at| config.read32(at))
    }

    /// Returns the event whose signals report an error of vhost queue `index` to the sibling's VMM.
    ///
    /// # Errors
    /// [`DriverError::QueueIndex`], [`DriverError::Device`].
    pub fn err(&mut self, index: QueueIndex) -> Result<&Event, DriverError> {
        let missing = self.no_queue(index);
        let err = self.errs.get_mut(usize::from(index.0)).ok_or(missing)?;
        let event = match err.take() {
            Some(event) => event,
            None => {
                let event = Event::new().map_err(DriverError::Event)?;
                let doorbells = Doorbells { device: &self.device, layout: &self.layout };
                doorbells.bind(self.err_base + index.0, &event)?;
                event
            }
        };
        Ok(err.insert(event))
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
        Ok(self.registers().device_config().write32(device_config::STATUS, value)?)
    }

    /// Reads the state of the link.
    ///
    /// # Errors
    /// [`DriverError::Device`], [`DriverError::Gone`], [`DriverError::WasReset`], [`DriverError::NeedsReset`].
    pub fn link(&self) -> Result<Link, DriverError> {
        let status = self.registers().common().read8(common::DEVICE_STATUS)?;
        if status == ALL_ONES {
            return Err(DriverError::Gone);
        }
        if status & status::NEEDS_RESET != 0 {
            return Err(DriverError::NeedsReset { status });
        }
        if status & status::DRIVER_OK == 0 {
            return Err(DriverError::WasReset { status });
        }
        let link = self.registers().device_config().read32(device_config::STATUS)?;
        Ok(Link {
            backend_up: link & device_config::BACKEND_UP != 0,
            frontend_up: link & device_config::FRONTEND_UP != 0,
        })
    }

    /// Takes the next message of the front-end, or `None` if there is none now.
    ///
    /// # Errors
    /// [`DriverError::Queue`], [`DriverError::Length`], [`DriverError::Message`],
    /// [`DriverError::Device`]; the device cannot be trusted any longer.
    pub fn receive(&mut self) -> Result<Option<Incoming>, DriverError> {
        let Some(used) = self.rx.queue.pop().map_err(rx_error)? else {
            // Each notification is a trap, so one serves for all buffers given back since the last.
            if std::mem::take(&mut self.rx_posted) {
                self.notify(RX_QUEUE, self.rx.notify)?;
            }
            return Ok(None);
        };
        let bytes = self.rx.queue.read(used).map_err(rx_error)?;
        self.rx.queue.post_all().map_err(rx_error)?;
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

    /// Returns whether [`send`](Self::send) has room for a message.
    ///
    /// # Errors
    /// [`DriverError::Queue`].
    pub fn can_send(&mut self) -> Result<bool, DriverError> {
        while self.tx.queue.pop().map_err(tx_error)?.is_some() {}
        Ok(self.tx.queue.has_free())
    }

    /// Sends a whole message towards the front-end; false if there is no room now.
    ///
    /// # Errors
    /// [`DriverError::Queue`], [`DriverError::Device`].
    pub fn send(&mut self, message: &[u8]) -> Result<bool, DriverError> {
        let sent = self.can_send()? && self.tx.queue.push(message).map_err(tx_error)?;
        if sent {
            self.notify(TX_QUEUE, self.tx.notify)?;
        }
        Ok(sent)
    }

    fn notify(&self, queue: u16, offset: u64) -> Result<(), DriverError> {
        let at = Registers { device: &self.device, at: self.layout.notify };
        Ok(at.write16(offset, queue)?)
    }
}

impl<D: PciDevice> Drop for Driver<D> {
    fn drop(&mut self) {
        // The device must not touch memory that is about to be freed. There is no caller to return an error to.
        if let Err(error) = self.registers().reset() {
            log::warn!("cannot reset the device at the end: {error}");
        }
    }
}

/// Value of every byte that is read from a device that does not answer.
const ALL_ONES: u8 = 0xff;

fn rx_error(source: QueueError) -> DriverError {
    DriverError::Queue { queue: "receive", source }
}

fn tx_error(source: QueueError) -> DriverError {
    DriverError::Queue { queue: "transmit", source }
}
