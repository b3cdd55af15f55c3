//! The record of the requests in flight in one split ring, and how it is read after a crash.

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

/// The only version there is. 0 means that the memory has not been used yet.
const THE_VERSION: u16 = 1;

/// Requests of a ring cannot be tracked.
#[derive(Debug, thiserror::Error)]
pub(in crate::backend) enum TrackerError {
    /// A program with another format has written the record.
    #[error(
        "in-flight region of version {version} with features {features:#x}: want version {THE_VERSION} and none"
    )]
    Unknown { version: u16, features: u64 },
    /// The record is of a ring of another size.
    #[error("in-flight region for {got} descriptors: want {want}")]
    Size { got: u16, want: u16 },
    /// The record contradicts the ring's indices.
    #[error(
        "the in-flight region has {inflight} requests at used index {region_used}, which the ring at \
         used index {ring_used} and available index {available} cannot have: it is another ring's"
    )]
    Foreign { inflight: u16, region_used: u16, ring_used: u16, available: u16 },
    /// The queue has no such descriptor.
    #[error("request at descriptor {head}: the queue has {size}")]
    Head { head: u16, size: u16 },
    /// The region cannot be accessed.
    #[error("in-flight region: {0}")]
    Memory(String),
}

/// Records which requests of one ring are in flight.
///
/// The front-end shares the memory and may change it, so values from it are checked, and none is read twice. Stores are
/// in program order: after a crash at any point, the memory holds the result of the stores up to that point.
#[derive(Debug)]
pub(in crate::backend) struct Tracker<M> {
    memory: M,
    base: GuestAddress,
    size: u16,
    /// Number of the next request to be taken.
    counter: u64,
    last_batch_head: u16,
    /// The ring's used index.
    used_idx: u16,
}

impl<M> Tracker<M>
where
    M: Bytes<GuestAddress>,
    M::E: Display,
{
    /// A tracker of a ring of up to `size` descriptors, with its record in `memory` from `base` on. Call
    /// [`recover`](Self::recover) first.
    pub(super) fn new(memory: M, base: GuestAddress, size: u16) -> Self {
        Self { memory, base, size, counter: 0, last_batch_head: 0, used_idx: 0 }
    }

    /// Brings the record in line with the ring, whose used and available indices are these, and returns the first
    /// descriptors of the requests in flight, in the order in which they were taken. `None` if the record is new.
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

        // The last batch may be in the used ring and still marked as in flight.
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

    /// Marks the request at `head` as in flight. Call it before any part of the request is carried out.
    ///
    /// # Errors
    /// [`TrackerError::Head`].
    pub(in crate::backend) fn begin(&mut self, head: u16) -> Result<(), TrackerError> {
        self.check(head)?;
        self.store_entry(head, COUNTER, self.counter)?;
        self.counter = self.counter.wrapping_add(1);
        self.store_entry(head, INFLIGHT, 1u8)
    }

    /// Makes the request at `head` the last batch. Call it when the request is done, before it goes into the used ring.
    ///
    /// # Errors
    /// [`TrackerError::Head`].
    pub(in crate::backend) fn finish(&mut self, head: u16) -> Result<(), TrackerError> {
        self.check(head)?;
        self.store_entry(head, NEXT, self.last_batch_head)?;
        self.last_batch_head = head;
        self.store(LAST_BATCH_HEAD, head)
    }

    /// Removes the mark of the request that was [finished](Self::finish) last. Call it when the used index counts it.
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
