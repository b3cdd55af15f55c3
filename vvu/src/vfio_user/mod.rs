//! vfio-user: the protocol by which one process hosts a PCI device for another.
//!
//! [`protocol`] is what is on the wire, [`server`] hosts a device for an unpatched VMM, and [`client`] drives a
//! hosted device from a process that is no VMM.

pub mod client;
pub mod protocol;
pub mod server;
