//! The vvu device: its registers and queues, and the connection to the sibling's front-end.

pub use crate::pci::Host;
pub use link::{LinkEvent, LinkState};
pub use sibling_memory::{OpenError, SiblingMemory};
pub use trace::Trace;
pub use vvu_device::{DeviceConfig, VvuDevice};

mod claim;
mod common_config;
mod config_space;
mod events;
mod frontend_connection;
mod link;
mod message_queues;
mod pci_function;
mod peer;
mod reconnects;
mod relay;
mod sibling_memory;
mod trace;
mod treatment;
mod vrings;
mod vvu_device;

#[cfg(test)]
mod hostile_tests;
#[cfg(any(test, fuzzing))]
pub mod rig;
#[cfg(test)]
mod tests;

/// Copies what `bytes` has at `offset`; zeroes after its end.
fn copy_at(bytes: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
    data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
}
