//! What carries out the requests of a queue: one at a time, or several at a time that end in any order.

use std::fmt::Debug;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::queue::Taken;

/// A request that an engine has carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Finished {
    /// First descriptor of its chain.
    pub(super) head: u16,
    /// Bytes that were written to the guest.
    pub(super) written: u32,
    /// Bytes of all its buffers.
    pub(super) size: u64,
}

/// Carries out the requests of one queue.
///
/// The methods that are written out here are those of an engine that carries out each request as it begins it.
pub(super) trait Engine: Debug + Send {
    /// Begins a request, and returns it if it is finished already. `memory` stays mapped until it is.
    ///
    /// An engine that is about to let this thread wait for something slow calls `announce` first, so that the driver
    /// learns of the requests that are done already.
    fn begin(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        taken: Taken,
        announce: &mut dyn FnMut(),
    ) -> Option<Finished>;

    /// Whether another request can be begun.
    fn has_room(&self) -> bool {
        true
    }

    /// Requests that were begun and not yet returned as finished.
    fn in_flight(&self) -> usize {
        0
    }

    /// Hands over to the kernel what was begun since the last call.
    fn submit(&mut self) {}

    /// Returns one of the requests that have been finished meanwhile, without waiting.
    fn next_finished(&mut self) -> Option<Finished> {
        None
    }

    /// Waits until there may be a finished request. Call it only while a request is in flight.
    fn wait(&mut self) {}

    /// A descriptor that is readable when there may be a finished request.
    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
