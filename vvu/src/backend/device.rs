//! What the queue engine and the vhost-user handler need to know of a device.

use std::io;
use std::sync::Arc;

use super::engine::Engine;
use crate::event::Event;

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

    /// What carries out the requests of one queue. It signals `wake_up` when there is something to do for it although its
    /// [event](Engine::event) is quiet.
    ///
    /// # Errors
    /// When the process or the system is short of something that the engine needs.
    fn engine(self: Arc<Self>, wake_up: &Arc<Event>) -> io::Result<Box<dyn Engine>>;
}
