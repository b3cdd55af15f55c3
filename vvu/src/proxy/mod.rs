//! The vvu device: its registers and queues, and the connection to the sibling's front-end.

use vm_memory::GuestMemory;

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

pub use device::{Device, DeviceConfig};

mod device;
