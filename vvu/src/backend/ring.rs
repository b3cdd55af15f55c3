//! A split virtqueue, seen from the device (virtio 1.2, 2.7).

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::chain::Chain;

/// Largest queue, in descriptors.
pub(super) const QUEUE_SIZE_MAX: u16 = 1024;

/// Bytes of the flags, which come first in the available and in the used ring; the index follows.
const FLAGS_SIZE: u64 = 2;
/// Bytes in front of the entries of the available and of the used ring: flags and index.
const HEADER_SIZE: u64 = 4;
const AVAILABLE_ENTRY_SIZE: u64 = 2;
const USED_ENTRY_SIZE: u64 = 8;

/// How the driver broke its queue.
#[derive(Debug, thiserror::Error)]
pub(super) enum RingError {
    #[error("the guest has no memory for a ring at guest address {0:#x}, or the address is not aligned")]
    Memory(u64),
    #[error("{got} requests are available in a queue of {size} descriptors")]
    Available { got: u16, size: u16 },
    #[error("request at descriptor {head}: the queue has {size}")]
    Head { head: u16, size: u16 },
}

/// Memory that a driver and a device share, as far as a ring needs it. Besides guest memory, a model of memory in which
/// every order of accesses is tried out.
pub(super) trait RingMemory {
    /// Reads a le16.
    fn load(&self, addr: GuestAddress, order: Ordering) -> Result<u16, RingError>;

    /// Writes a le16.
    fn store(&self, addr: GuestAddress, value: u16, order: Ordering) -> Result<(), RingError>;

    /// Writes an element of the used ring: a descriptor and a length.
    fn write(&self, addr: GuestAddress, element: [u32; 2]) -> Result<(), RingError>;

    /// Orders the accesses before it and those after it, for both sides.
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}

impl RingMemory for GuestMemoryMmap {
    fn load(&self, addr: GuestAddress, order: Ordering) -> Result<u16, RingError> {
        Bytes::load(self, addr, order).map(u16::from_le).map_err(|_| RingError::Memory(addr.0))
    }

    fn store(&self, addr: GuestAddress, value: u16, order: Ordering) -> Result<(), RingError> {
        Bytes::store(self, value.to_le(), addr, order).map_err(|_| RingError::Memory(addr.0))
    }

    fn write(&self, addr: GuestAddress, element: [u32; 2]) -> Result<(), RingError> {
        self.write_obj(element.map(u32::to_le), addr).map_err(|_| RingError::Memory(addr.0))
    }
}

/// A queue's place in guest memory and the device's position in it. Indices count without bound and wrap at 2^16.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SplitRing {
    /// Descriptors, a power of two.
    pub(super) size: u16,
    pub(super) descriptors: GuestAddress,
    pub(super) available: GuestAddress,
    pub(super) used: GuestAddress,
    /// Whether `VIRTIO_F_EVENT_IDX` was negotiated.
    pub(super) event_idx: bool,
    /// Available index of the next request to take.
    pub(super) next_available: u16,
    next_used: u16,
    /// Used index up to which the driver has been notified.
    announced: u16,
}

impl SplitRing {
    /// Continues behind the requests that were used so far, and returns their number (used index).
    pub(super) fn resume(&mut self, memory: &impl RingMemory) -> Result<u16, RingError> {
        let used = load(memory, self.used, FLAGS_SIZE, Ordering::Acquire)?;
        (self.next_used, self.announced) = (used, used);
        Ok(used)
    }

    /// The number of requests that the driver has made available so far (available index).
    pub(super) fn available_index(&self, memory: &impl RingMemory) -> Result<u16, RingError> {
        load(memory, self.available, FLAGS_SIZE, Ordering::Acquire)
    }

    /// Takes the next request that the driver has made available, and returns its first descriptor.
    pub(super) fn pop(&mut self, memory: &impl RingMemory) -> Result<Option<u16>, RingError> {
        let size = self.size;
        let got = self.available_index(memory)?.wrapping_sub(self.next_available);
        if got == 0 {
            return Ok(None);
        }
        if got > size {
            return Err(RingError::Available { got, size });
        }
        let entry = u64::from(self.next_available % size);
        let head =
            load(memory, self.available, HEADER_SIZE + entry * AVAILABLE_ENTRY_SIZE, Ordering::Acquire)?;
        if head >= size {
            return Err(RingError::Head { head, size });
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    /// The descriptor chain that starts at `head`.
    pub(super) fn chain(&self, memory: &GuestMemoryMmap, head: u16) -> Chain {
        Chain::walk(memory, self.descriptors, self.size, head)
    }

    /// Gives the chain that starts at `head` back to the driver, with `len` bytes written to it.
    pub(super) fn push(&mut self, memory: &impl RingMemory, head: u16, len: u32) -> Result<(), RingError> {
        let size = self.size;
        if head >= size {
            return Err(RingError::Head { head, size });
        }
        let entry = u64::from(self.next_used % size);
        let addr = offset(self.used, HEADER_SIZE + entry * USED_ENTRY_SIZE)?;
        memory.write(addr, [u32::from(head), len])?;
        self.next_used = self.next_used.wrapping_add(1);
        store(memory, self.used, FLAGS_SIZE, self.next_used, Ordering::Release)
    }

    /// Whether the driver wants a notification of the requests that were used since this was asked last
    /// (virtio 1.2, 2.7.7 and 2.7.10).
    pub(super) fn needs_notification(&mut self, memory: &impl RingMemory) -> Result<bool, RingError> {
        // The used index has to be visible before the driver's wish is read: the driver states its wish, then looks
        // at the used index again.
        memory.fence();
        let before = std::mem::replace(&mut self.announced, self.next_used);
        if !self.event_idx {
            let flags = load(memory, self.available, 0, Ordering::Relaxed)?;
            return Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let used_event = HEADER_SIZE + u64::from(self.size) * AVAILABLE_ENTRY_SIZE;
        let event = load(memory, self.available, used_event, Ordering::Relaxed)?;
        let behind_event = self.next_used.wrapping_sub(event).wrapping_sub(1);
        Ok(behind_event < self.next_used.wrapping_sub(before))
    }

    /// Asks the driver for a kick with its next request. Returns true if there is a request already, for which it may
    /// not kick.
    pub(super) fn enable_kicks(&self, memory: &impl RingMemory) -> Result<bool, RingError> {
        if self.event_idx {
            let available_event = HEADER_SIZE + u64::from(self.size) * USED_ENTRY_SIZE;
            store(memory, self.used, available_event, self.next_available, Ordering::Relaxed)?;
        } else {
            store(memory, self.used, 0, 0, Ordering::Relaxed)?;
        }
        // The wish has to be visible before the index is read: the driver writes the index, then reads the wish.
        memory.fence();
        Ok(self.available_index(memory)? != self.next_available)
    }

    /// Asks the driver for no kicks. With event indices it sends none until it reaches the one last asked for.
    pub(super) fn disable_kicks(&self, memory: &impl RingMemory) -> Result<(), RingError> {
        if self.event_idx {
            return Ok(());
        }
        let no_notify = u16::try_from(VRING_USED_F_NO_NOTIFY).unwrap_or(1);
        store(memory, self.used, 0, no_notify, Ordering::Relaxed)
    }
}

fn offset(base: GuestAddress, offset: u64) -> Result<GuestAddress, RingError> {
    base.0.checked_add(offset).map(GuestAddress).ok_or(RingError::Memory(base.0))
}

fn load(memory: &impl RingMemory, base: GuestAddress, at: u64, order: Ordering) -> Result<u16, RingError> {
    memory.load(offset(base, at)?, order)
}

fn store(
    memory: &impl RingMemory,
    base: GuestAddress,
    at: u64,
    value: u16,
    order: Ordering,
) -> Result<(), RingError> {
    memory.store(offset(base, at)?, value, order)
}

#[cfg(test)]
#[path = "ring_model.rs"]
mod model;
