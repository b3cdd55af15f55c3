//! vfio-user: the protocol by which one process serves a PCI function to another.
//!
//! [`protocol`] is what is on the wire, [`server`] serves a function to an unpatched VMM, and [`client`] is a PCI
//! device for a driver in a process that is no VMM.

pub mod client;
pub mod protocol;
pub mod server;
