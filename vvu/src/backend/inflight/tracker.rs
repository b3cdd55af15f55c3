//! What is written down of one split ring, and how it is read after a crash.

use std::fmt::Display;
use std::sync::atomic::Ordering;

use vm_memory::{AtomicAccess, Bytes, GuestAddress};

/// Bytes in front of the descriptors' entries (vhost-user, `QueueRegionSplit`).
pub(super) const HEADER_SIZE: u64 = 16;
/// Bytes of an entry (vhost-user, `DescStateSplit`).
pub(super) const ENTRY_SIZE: u64 = 16;

const FEATURES: u64 = 0;
const VERSION: u64 = 8;
const DESC_NUM: u64 = 10;
const LAST_BATCH_HEAD: u64 = 12;
const USED_IDX: u64 = 14;

const INFLIGHT: u64 = 0;
const NEXT: u64 = 6;
const COUNTER: u64 = 8;

/// The only version there is; 0 is memory nobody has used yet.
const THE_VERSION: u16 = 1;

/// Why the requests of a ring cannot be tracked.
#[derive(Debug, thiserror::Error)]
pub(in crate::backend) enum TrackerError {
    /// Made by a program that knows more than this one.
    #[error(
        "in-flight region of version {version} with features {features:#x}: want version {THE_VERSION} and none"
    )]
    Unknown {
        /// Its version.
        version: u16,
        /// Its feature bits.
        features: u64,
    },
    /// Made for rings of another size.
    #[error("in-flight region for {got} descriptors: want {want}")]
    Size {
        /// Descriptors it says it is for.
        got: u16,
        /// Descriptors it was handed in for.
        want: u16,
    },
    /// The ring never had what the region says is in flight.
    #[error(
        "the in-flight region has {inflight} requests at used index {region_used}, which the ring at \
         used index {ring_used} and available index {available} cannot have: it is another ring's"
    )]
    Foreign {
        /// Requests in flight.
        inflight: u16,
        /// Used index in the region.
        region_used: u16,
        /// Used index in the ring.
        ring_used: u16,
        /// Available index in the ring.
        available: u16,
    },
    /// No such descriptor.
    #[error("request at descriptor {head}: the queue has {size}")]
    Head {
        /// The descriptor.
        head: u16,
        /// Descriptors tracked.
        size: u16,
    },
    /// The region cannot be accessed.
    #[error("in-flight region: {0}")]
    Memory(String),
}

/// Writes down what is in flight in one ring.
///
/// The memory belongs to the front-end as well, so nothing that is read from it is trusted, and what
/// this side must know is not read from it twice. Stores are in program order, so that whatever is
/// there after a crash is what a prefix of them makes.
#[derive(Debug)]
pub(in crate::backend) struct Tracker<M> {
    memory: M,
    base: GuestAddress,
    size: u16,
    /// Of the next request to be taken.
    counter: u64,
    last_batch_head: u16,
    /// As in the ring.
    used_idx: u16,
}

impl<M> Tracker<M>
where
    M: Bytes<GuestAddress>,
    M::E: Display,
{
    /// Tracks a ring of up to `size` descriptors in `memory` from `base` on. Before anything else it
    /// has to [`recover`](Self::recover).
    pub(super) fn new(memory: M, base: GuestAddress, size: u16) -> Self {
        Self { memory, base, size, counter: 0, last_batch_head: 0, used_idx: 0 }
    }

    /// Brings what is written down in line with the ring, whose indices in guest memory are these, and
    /// returns the heads of the requests that are in flight, in the order in which they were taken;
    /// nothing if no device has ever used the region.
    ///
    /// # Errors
    /// [`TrackerError`].
    pub(in crate::backend) fn recover(
        &mut self,
        ring_used: u16,
        available: u16,
    ) -> Result<Option<Vec<u16>>, TrackerError> {
        let (features, version) = (self.load(FEATURES)?, self.load(VERSION)?);
        self.used_idx = ring_used;
        if version == 0 {
            self.initialize()?;
            return Ok(None);
        }
        if version != THE_VERSION || features != 0 {
            return Err(TrackerError::Unknown { version, features });
        }
        let got = self.load(DESC_NUM)?;
        if got != self.size {
            return Err(TrackerError::Size { got, want: self.size });
        }

        // A batch that is in the ring may not be written off yet.
        let region_used = self.load::<u16>(USED_IDX)?;
        let batch = ring_used.wrapping_sub(region_used);
        let mut head = self.load::<u16>(LAST_BATCH_HEAD)?;
        self.last_batch_head = if head < self.size { head } else { 0 };
        if batch <= self.size {
            for _ in 0..batch {
                if head >= self.size {
                    break;
                }
                self.store_entry(head, INFLIGHT, 0u8)?;
                head = self.load_entry(head, NEXT)?;
            }
        }

        let mut inflight = Vec::new();
        for head in 0..self.size {
            if self.load_entry::<u8>(head, INFLIGHT)? != 0 {
                inflight.push((self.load_entry::<u64>(head, COUNTER)?, head));
            }
        }
        let count = u16::try_from(inflight.len()).unwrap_or(u16::MAX);
        let possible = available.wrapping_sub(ring_used);
        if count != 0 && (batch > self.size || count > possible || possible > self.size) {
            return Err(TrackerError::Foreign { inflight: count, region_used, ring_used, available });
        }
        self.store(USED_IDX, ring_used)?;
        inflight.sort_unstable();
        self.counter = inflight.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(Some(inflight.into_iter().map(|(_, head)| head).collect()))
    }

    fn initialize(&mut self) -> Result<(), TrackerError> {
        for head in 0..self.size {
            self.store_entry(head, INFLIGHT, 0u8)?;
        }
        self.store(FEATURES, 0u64)?;
        self.store(DESC_NUM, self.size)?;
        self.store(LAST_BATCH_HEAD, self.last_batch_head)?;
        self.store(USED_IDX, self.used_idx)?;
        self.store(VERSION, THE_VERSION)
    }

    /// The request at `head` is in flight; to be called before any of it is carried out.
    ///
    /// # Errors
    /// [`TrackerError::Head`].
    pub(in crate::backend) fn begin(&mut self, head: u16) -> Result<(), TrackerError> {
        self.check(head)?;
        self.store_entry(head, COUNTER, self.counter)?;
        self.counter = self.counter.wrapping_add(1);
        self.store_entry(head, INFLIGHT, 1u8)
    }

    /// The request at `head` is done; to be called before it goes into the used ring.
    ///
    /// # Errors
    /// [`TrackerError::Head`].
    pub(in crate::backend) fn finish(&mut self, head: u16) -> Result<(), TrackerError> {
        self.check(head)?;
        self.store_entry(head, NEXT, self.last_batch_head)?;
        self.last_batch_head = head;
        self.store(LAST_BATCH_HEAD, head)
    }

    /// The request that was [finished](Self::finish) last is in the used ring, and its index counts it.
    ///
    /// # Errors
    /// When the region cannot be accessed.
    pub(in crate::backend) fn forget(&mut self) -> Result<(), TrackerError> {
        self.store_entry(self.last_batch_head, INFLIGHT, 0u8)?;
        self.used_idx = self.used_idx.wrapping_add(1);
        self.store(USED_IDX, self.used_idx)
    }

    fn check(&self, head: u16) -> Result<(), TrackerError> {
        let size = self.size;
        if head < size { Ok(()) } else { Err(TrackerError::Head { head, size }) }
    }

    fn load_entry<T: AtomicAccess>(&self, head: u16, field: u64) -> Result<T, TrackerError> {
        self.load(HEADER_SIZE + u64::from(head) * ENTRY_SIZE + field)
    }

    fn store_entry<T: AtomicAccess>(&self, head: u16, field: u64, value: T) -> Result<(), TrackerError> {
        self.store(HEADER_SIZE + u64::from(head) * ENTRY_SIZE + field, value)
    }

    fn load<T: AtomicAccess>(&self, offset: u64) -> Result<T, TrackerError> {
        let at = GuestAddress(self.base.0 + offset);
        self.memory.load(at, Ordering::Acquire).map_err(|error| TrackerError::Memory(error.to_string()))
    }

    fn store<T: AtomicAccess>(&self, offset: u64, value: T) -> Result<(), TrackerError> {
        let at = GuestAddress(self.base.0 + offset);
        let stored = self.memory.store(value, at, Ordering::Release);
        stored.map_err(|error| TrackerError::Memory(error.to_string()))
    }
}

#[cfg(test)]
#[path = "tracker_test.rs"]
mod tests;
