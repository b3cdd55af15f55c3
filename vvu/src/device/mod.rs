//! The vvu device: a virtio PCI device whose registers and queues face the guest driver, and whose socket
//! faces the sibling's front-end.
//!
//! [`VvuDevice`] has the registers and hands the rest to the relay, which accepts front-ends
//! and moves messages: it asks the table of requests what to do with each, keeps the link's
//! state, and ties the front-end's eventfds to the device's vectors and doorbells. The device does not
//! know its VMM: that is a [`Host`].

pub use crate::pci::Host;
pub use link::{LinkEvent, LinkState};
pub use sibling_memory::{MemoryOptions, OpenError, SiblingMemory};
pub use trace::Trace;
pub use vvu_device::{DeviceConfig, VvuDevice};

mod claim;
mod closer;
mod common_config;
mod config_space;
mod events;
pub(crate) mod express;
mod frontend_connection;
mod link;
mod message_queues;
mod peer;
mod reconnects;
mod relay;
mod resources;
mod sibling_memory;
mod trace;
mod treatment;
mod vrings;
mod vvu_device;

#[cfg(any(test, fuzzing))]
pub mod rig;

/// Fills `data` with the bytes at `offset` of `bytes`, and with zeroes after their end.
fn copy_at(bytes: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
    data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
}
