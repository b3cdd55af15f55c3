//! What the queue engine and the vhost-user handler need to know of a device.

use vm_memory::GuestMemoryMmap;

use super::chain::Chain;

/// A virtio device for one front-end. Its queues call it from a thread each.
pub(super) trait Device: Send + Sync {
    /// Number of queues.
    fn queues(&self) -> u16;

    /// The device's own feature bits, without those of the rings and the transport.
    fn features(&self) -> u64;

    /// Most descriptors of a request, by what the configuration space says.
    fn descriptors_max(&self) -> u16;

    /// Takes over the features that the driver accepted; 0 when the device is reset.
    fn set_features(&self, features: u64);

    /// `size` bytes at `offset` of the configuration space, empty if the space does not have them.
    fn config(&self, offset: u32, size: u32) -> Vec<u8>;

    /// Carries out one request and returns the number of bytes that were written to the guest.
    ///
    /// A device that is about to do something slow calls `announce` first, so that the driver learns of the
    /// requests that are done already.
    fn handle(&self, memory: &GuestMemoryMmap, chain: Chain, announce: &mut dyn FnMut()) -> u32;
}
