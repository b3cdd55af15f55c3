//! Errors of the guest driver.

use super::layout::LayoutError;
use super::queue::QueueError;
use crate::pci::DeviceError;
use crate::spec::addr::QueueIndex;
use crate::spec::vhost_user::MessageError;

/// The device cannot be driven, or not any longer.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// An access to the device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The device is not a vvu device.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The device broke the rules of a virtqueue.
    #[error("{queue} queue: {source}")]
    Queue {
        /// `receive` or `transmit`.
        queue: &'static str,
        /// The rule that it broke.
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
    /// The device rejects features that it offers.
    #[error("the device rejects features {features:#x}, which it offers")]
    FeaturesRefused {
        /// Feature bits.
        features: u64,
    },
    /// The device lacks one of its two virtqueues.
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
        /// Queues in the device configuration.
        queues: u32,
        /// MSI-X vectors of the device.
        vectors: u16,
        /// Doorbells that fit in the structure.
        doorbells: u64,
    },
    /// A register does not keep what is written to it.
    #[error("{what} reads {got:#x} after {want:#x} was written to it")]
    NotKept {
        /// The register.
        what: &'static str,
        /// Value that was written.
        want: u16,
        /// Value that was read.
        got: u16,
    },
    /// The device has no such vhost queue.
    #[error("vhost queue {index}: the device has {queues}")]
    QueueIndex {
        /// Queue that was asked for.
        index: QueueIndex,
        /// Queues of the device.
        queues: u16,
    },
    /// The device does not answer.
    #[error(
        "the device is gone: its registers read all ones; if its proxy ended, start the proxy and both VMs again"
    )]
    Gone,
    /// Somebody else reset the device.
    #[error(
        "somebody else reset the device, through sysfs or with a function level reset: its status is {status:#04x}; \
         start the back-end again"
    )]
    WasReset {
        /// Device status.
        status: u8,
    },
    /// The device reports a failure.
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
        /// Bytes that the header announces, including the header.
        want: usize,
    },
    /// Received bytes are not a vhost-user message.
    #[error("received: {0}")]
    Message(#[from] MessageError),
    /// There is no file descriptor left for an event.
    #[error("cannot make an event: {0}; check the limit on open files (`ulimit -n`)")]
    Event(#[source] std::io::Error),
}
