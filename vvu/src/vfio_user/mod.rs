//! vfio-user: the protocol by which one process serves a PCI function to another.
//!
//! [`server`] serves a function to an unpatched VMM, and [`client`] is a PCI device for a driver in a process that is
//! no VMM.

pub mod client;
#[doc(hidden)]
pub mod protocol;
pub mod server;
