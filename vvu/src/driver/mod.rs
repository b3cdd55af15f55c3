//! The guest driver: brings the vvu device up and moves vhost-user messages through its queues.
//!
//! [`Driver`] works on any [`PciDevice`](pci_device::PciDevice). In the guest that is
//! [`VfioDevice`](vfio::VfioDevice), which [`PciSysfs`](sysfs::PciSysfs) finds and checks.

pub mod eventfd;
pub mod pci_device;
pub mod sysfs;
pub mod vfio;

pub use device::{Driver, DriverError, Incoming, Link};
pub use layout::LayoutError;
pub use queue::QueueError;

mod device;
#[cfg(test)]
pub(crate) mod fake;
mod layout;
mod queue;
mod registers;
#[cfg(test)]
mod tests;
