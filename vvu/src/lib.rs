//! virtio-vhost-user (VVU): a vhost-user back-end inside one VM, the device VM, serves a virtio
//! device of another, the sibling VM.
//!
//! [`device`] is the virtio PCI device that the device VM sees, [`vfio_user`] hosts it for an
//! unpatched VMM, [`driver`] drives it from inside the device VM, [`bridge`] turns its messages
//! into an ordinary vhost-user socket, and [`backend`] holds back-ends that serve such a socket.

pub mod backend;
pub mod bridge;
pub mod device;
pub mod driver;
pub mod event;
pub mod framed_socket;
pub mod listening_socket;
pub mod message_socket;
pub mod pci;
pub mod spec;
pub mod vfio_user;

#[cfg(test)]
mod rig;
mod serve;

pub use event::StopToken;
pub use serve::{OpenError, ServeError, open_vfio, serve, serve_socket, serve_vfio};
pub use spec::addr::Bdf;
