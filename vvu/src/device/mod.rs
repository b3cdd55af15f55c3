//! The vvu device: its registers and queues, and the connection to the sibling's front-end.

use vm_memory::GuestMemory;

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

/// What the device needs from whatever connects it to the device VM.
///
/// The vfio-user server is one implementation, tests have another, and a VMM that embeds this crate
/// would be a third.
pub trait Host {
    /// Device-VM memory as the device reaches it: addresses are [`Iova`](crate::spec::addr::Iova)s.
    type Memory: GuestMemory;

    /// Memory that is mapped for the device at this moment.
    fn memory(&self) -> &Self::Memory;

    /// Sends MSI-X interrupt `vector`; one that is not enabled is lost, as on real hardware.
    fn signal(&self, vector: u16);
}

/// Copies what `bytes` has at `offset`; zeroes after its end.
fn copy_at(bytes: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
    data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
}
