//! Doorbells that a back-end in the driver's process rings itself: by a store to a register that is mapped into the
//! process, without an eventfd and a system call.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use vm_memory::{Bytes, MmapRegion, VolatileMemory};

/// What a queue has instead of a value while it has no doorbell of this kind.
const NONE: u32 = 0;

/// A doorbell register, and the value that each vhost queue writes to it.
///
/// The driver changes the values, the threads of the back-end ring. If a thread rings with a value that the driver
/// replaces at the same moment, the driver repeats the notification with the new one.
#[derive(Debug)]
pub struct DirectDoorbells {
    registers: Arc<MmapRegion>,
    /// Offset of the register, an le32, in bytes.
    offset: usize,
    values: Vec<AtomicU32>,
}

impl DirectDoorbells {
    /// Doorbells of `queues` queues, none of which has a value yet. The register is at `offset` of `registers`, in bytes.
    pub(crate) fn new(registers: Arc<MmapRegion>, offset: usize, queues: u16) -> Self {
        let values = (0..queues).map(|_| AtomicU32::new(NONE)).collect();
        Self { registers, offset, values }
    }

    /// Sets the value that `queue` writes from now on. A thread that still rings with the value before has made visible, before
    /// this call returns, what it notifies of: so the caller repeats the notification after this call.
    pub(crate) fn set(&self, queue: u16, value: u32) {
        if let Some(slot) = self.values.get(usize::from(queue)) {
            slot.store(value, Ordering::SeqCst);
            fence(Ordering::SeqCst);
        }
    }

    /// Takes the value of `queue` away if it is still `value`.
    pub(crate) fn clear(&self, queue: u16, value: u32) {
        if let Some(slot) = self.values.get(usize::from(queue)) {
            // It fails if another value has replaced this one.
            let _ = slot.compare_exchange(value, NONE, Ordering::SeqCst, Ordering::SeqCst);
            fence(Ordering::SeqCst);
        }
    }

    /// Takes the values of all queues away.
    pub(crate) fn clear_all(&self) {
        self.values.iter().for_each(|slot| slot.store(NONE, Ordering::SeqCst));
        fence(Ordering::SeqCst);
    }

    /// Whether `queue` has a doorbell of this kind.
    pub(crate) fn has(&self, queue: u16) -> bool {
        self.values.get(usize::from(queue)).is_some_and(|slot| slot.load(Ordering::Relaxed) != NONE)
    }

    /// Rings for `queue`, and returns whether it has a doorbell of this kind.
    pub(crate) fn ring(&self, queue: u16) -> bool {
        // What the notification is about has to be visible before the value is read.
        fence(Ordering::SeqCst);
        let value = self.values.get(usize::from(queue)).map_or(NONE, |slot| slot.load(Ordering::SeqCst));
        value != NONE
            && self.registers.as_volatile_slice().store(value.to_le(), self.offset, Ordering::Release).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_writes_the_value_that_it_has() {
        let doorbells = DirectDoorbells::new(Arc::new(MmapRegion::new(4096).expect("memory")), 12, 2);
        let register = || -> u32 {
            u32::from_le(
                doorbells.registers.as_volatile_slice().load(12, Ordering::Relaxed).expect("register"),
            )
        };
        assert!(!doorbells.ring(1), "no value yet");
        doorbells.set(1, 0x1_0000);
        assert!(doorbells.ring(1) && !doorbells.ring(0) && !doorbells.ring(2));
        assert_eq!(register(), 0x1_0000);
        doorbells.set(1, 0x2_0000);
        doorbells.clear(1, 0x1_0000);
        assert!(doorbells.ring(1), "the value that was taken away has been replaced");
        assert_eq!(register(), 0x2_0000);
        doorbells.clear(1, 0x2_0000);
        assert!(!doorbells.ring(1));
        doorbells.set(9, 1);
    }

    #[test]
    fn a_register_outside_of_the_mapping_is_not_rung() {
        let doorbells = DirectDoorbells::new(Arc::new(MmapRegion::new(4096).expect("memory")), 4096, 1);
        doorbells.set(0, 1);
        assert!(!doorbells.ring(0));
    }
}
