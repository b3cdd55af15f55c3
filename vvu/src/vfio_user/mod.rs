//! The vvu device for an unpatched VMM: a vfio-user server, one client at a time.
//!
//! [`Server`] is the loop, `commands` answers one message, [`VmmHost`] is what the client lends the
//! device: memory for DMA ([`DmaSpace`]) and the eventfds of its MSI-X vectors.

pub use dma::{DmaError, DmaSpace};
pub use host::VmmHost;
pub use server::{ServeError, Server};
pub use socket::{Message, MessageSocket, SocketError};

mod commands;
mod dma;
mod host;
mod server;
mod socket;
#[cfg(test)]
mod tests;
