#![doc = include_str!("../README.md")]

pub mod backend;
pub mod bridge;
pub mod device;
pub mod driver;
pub mod event;
pub mod pci;
pub mod spec;
pub mod vfio_user;
pub mod window;

// What the binary, the tests and the fuzz targets share with the library; no part of its interface.
#[doc(hidden)]
pub mod durable;
#[doc(hidden)]
pub mod framed_socket;
#[doc(hidden)]
pub mod listening_socket;
#[doc(hidden)]
pub mod message_socket;
#[doc(hidden)]
pub mod shortage;

#[cfg(test)]
mod express_model;
#[cfg(test)]
mod rig;
mod serve;

pub use event::StopToken;
pub use serve::{
    OpenError, ServeError, WindowUse, open_vfio, open_vfio_with, serve, serve_socket, serve_vfio,
};
pub use spec::addr::Bdf;

/// The line that `vvu proxy` writes to standard output when both of its sockets accept connections.
pub const PROXY_READY: &str = "vvu: proxy ready";
