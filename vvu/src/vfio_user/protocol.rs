//! vfio-user messages as stock QEMU speaks them (QEMU docs/interop/vfio-user.rst, protocol 0.0).
//!
//! Fields are in the byte order of the host, which is little-endian wherever this crate runs.
//! Constants that vfio-user shares with the kernel's VFIO come from the `vfio-bindings` crate.

pub use header::{Command, Header};
pub use payloads::*;
pub use version::{Capabilities, VERSION, Version};
pub use wire::{FDS_MAX, HEADER_SIZE, MESSAGE_SIZE_MAX, MessageError, TRANSFER_SIZE_MAX};

pub mod socket;

mod header;
mod payloads;
mod version;
mod wire;

#[cfg(test)]
mod tests;
