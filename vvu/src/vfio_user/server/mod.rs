//! Hosts the vvu device for an unpatched VMM: a vfio-user server, one client at a time.
//!
//! [`Server`] is the loop, `commands` answers one message, [`VmmHost`] is what the client lends the
//! device: memory for DMA ([`DmaSpace`]) and the eventfds of its MSI-X vectors.

pub use dma::{DmaError, DmaSpace};
pub use host::VmmHost;
pub use serve::{ServeError, Server};

mod commands;
mod dma;
mod host;
mod serve;
#[cfg(test)]
mod tests;
