//! The guest driver: brings the vvu device up and moves vhost-user messages through its queues.
//!
//! [`Driver`] works on any [`PciDevice`](crate::pci::PciDevice). In the guest that is
//! [`VfioDevice`](vfio::VfioDevice), which [`PciSysfs`](sysfs::PciSysfs) finds and checks; on a host
//! without a VM it is [`VfioUserDevice`](crate::vfio_user::client::VfioUserDevice).

#[doc(hidden)]
pub mod bar_view;
#[doc(hidden)]
pub mod inspect;
pub mod sysfs;
pub mod vfio;

pub use device::{Driver, Incoming, Link, WindowSizes};
pub use error::DriverError;
pub use express::ExpressError;
pub use layout::LayoutError;
pub use queue::QueueError;

#[doc(inline)]
pub use crate::message_socket::Message;

mod bring_up;
mod calls;
mod device;
mod doorbells;
mod error;
pub mod express;
mod layout;
mod queue;
mod registers;
#[cfg(test)]
mod tests;
