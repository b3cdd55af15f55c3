//! Descriptor chains of split virtqueues (virtio 1.2, 2.7.4 and 2.7.5).

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// Longest chain that is followed, in descriptors: the size of the largest queue.
pub(super) const CHAIN_MAX: u16 = 1024;
/// Bytes of a descriptor: address (8), length (4), flags (2), next (2).
const DESCRIPTOR_SIZE: u32 = 16;

/// Why a driver's descriptors cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChainError {
    /// A loop, an index outside of the table, more than 4 GiB of data, or an indirect table that is nested, not made
    /// of whole descriptors, or not in memory.
    #[error("descriptor chain that does not end")]
    Endless,
    #[error("descriptor chain of more than {CHAIN_MAX} descriptors")]
    TooLong,
    /// All readable descriptors come before all writable ones (virtio 1.2, 2.7.4.2).
    #[error("device-readable descriptor behind a device-writable one")]
    Order,
    #[error("memory at {0:#x} that the guest does not have")]
    Memory(u64),
}

/// Consecutive bytes of guest memory, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) addr: GuestAddress,
    pub(super) len: u32,
}

/// Pieces of guest memory that make up one run of bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Segments(pub(super) Vec<Segment>);

/// The buffers of one request. Only the shape of the chain has been checked; an address may be outside of memory.
#[derive(Debug)]
pub(super) struct Chain {
    /// What the device reads.
    pub(super) readable: Segments,
    /// What the device writes.
    pub(super) writable: Segments,
    /// Whether the chain is well formed. If not, the segments are those up to where it goes wrong.
    pub(super) shape: Result<(), ChainError>,
}

impl Chain {
    /// Follows the chain that starts at descriptor `head` of a table with `size` descriptors.
    pub(super) fn walk(memory: &GuestMemoryMmap, table: GuestAddress, size: u16, head: u16) -> Self {
        let mut chain = Self { readable: Segments::default(), writable: Segments::default(), shape: Ok(()) };
        chain.shape = chain.collect(memory, Table { addr: table, size: size.into(), indirect: false }, head);
        chain
    }

    /// Bytes of all buffers.
    pub(super) fn len(&self) -> u64 {
        self.readable.len() + self.writable.len()
    }

    fn collect(&mut self, memory: &GuestMemoryMmap, mut table: Table, head: u16) -> Result<(), ChainError> {
        let (mut next, mut left, mut total) = (head, table.size, 0u32);
        let mut count = 0;
        loop {
            // A chain has at most as many descriptors as its table: a longer one is a loop.
            left = left.checked_sub(1).ok_or(ChainError::Endless)?;
            let descriptor = table.load(memory, next).ok_or(ChainError::Endless)?;
            if descriptor.flag(VRING_DESC_F_INDIRECT) {
                table = table.indirect(&descriptor).ok_or(ChainError::Endless)?;
                (next, left) = (0, table.size);
                continue;
            }
            if count == CHAIN_MAX {
                return Err(ChainError::TooLong);
            }
            count += 1;
            let Descriptor { addr, len, .. } = descriptor;
            total = total.checked_add(len).ok_or(ChainError::Endless)?;
            let segment = (len != 0).then_some(Segment { addr: GuestAddress(addr), len });
            if descriptor.flag(VRING_DESC_F_WRITE) {
                self.writable.0.extend(segment);
            } else if self.writable.0.is_empty() {
                self.readable.0.extend(segment);
            } else {
                return Err(ChainError::Order);
            }
            if !descriptor.flag(VRING_DESC_F_NEXT) {
                return Ok(());
            }
            next = descriptor.next;
        }
    }
}

/// A table of descriptors in guest memory: the queue's own, or an indirect one.
struct Table {
    addr: GuestAddress,
    /// In descriptors.
    size: u32,
    indirect: bool,
}

struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Table {
    fn load(&self, memory: &GuestMemoryMmap, index: u16) -> Option<Descriptor> {
        if u32::from(index) >= self.size {
            return None;
        }
        let addr = self.addr.0.checked_add(u64::from(index) * u64::from(DESCRIPTOR_SIZE))?;
        let [low, high]: [u64; 2] = memory.read_obj(GuestAddress(addr)).ok()?;
        let (low, [a, b, c, d, e, f, g, h]) = (u64::from_le(low), high.to_ne_bytes());
        let (len, flags, next) =
            (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        Some(Descriptor { addr: low, len, flags, next })
    }

    /// The table that `descriptor` refers to; tables do not nest.
    fn indirect(&self, descriptor: &Descriptor) -> Option<Self> {
        let size = descriptor.len / DESCRIPTOR_SIZE;
        let valid = !self.indirect
            && descriptor.len.is_multiple_of(DESCRIPTOR_SIZE)
            && (1..=u32::from(u16::MAX)).contains(&size);
        valid.then_some(Self { addr: GuestAddress(descriptor.addr), size, indirect: true })
    }
}

impl Descriptor {
    fn flag(&self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }
}

impl Segments {
    /// Bytes in all. Cannot overflow, since there are at most [`CHAIN_MAX`] segments.
    pub(super) fn len(&self) -> u64 {
        self.0.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Removes the first `count` bytes and returns them, or all bytes if there are fewer.
    pub(super) fn split_front(&mut self, count: usize) -> Self {
        let mut front = Self::default();
        let mut missing = u32::try_from(count).unwrap_or(u32::MAX);
        self.0.retain_mut(|segment| {
            let len = segment.len.min(missing);
            if len != 0 {
                front.0.push(Segment { addr: segment.addr, len });
                segment.addr = GuestAddress(segment.addr.0.wrapping_add(len.into()));
                segment.len -= len;
                missing -= len;
            }
            segment.len != 0
        });
        front
    }

    /// Removes the last byte and returns its address, `None` if there is none or it is outside of the address space.
    pub(super) fn split_last(&mut self) -> Option<GuestAddress> {
        let last = self.0.last_mut()?;
        last.len -= 1;
        let addr = last.addr.0.checked_add(last.len.into());
        if last.len == 0 {
            self.0.pop();
        }
        addr.map(GuestAddress)
    }

    /// The mapped memory of all segments.
    ///
    /// # Errors
    /// [`ChainError::Memory`] when the guest has no such memory.
    pub(super) fn slices<'m>(
        &self,
        memory: &'m GuestMemoryMmap,
        access: Permissions,
    ) -> Result<Vec<VolatileSlice<'m>>, ChainError> {
        let mut slices = Vec::with_capacity(self.0.len());
        for Segment { addr, len } in &self.0 {
            let unknown = |_| ChainError::Memory(addr.0);
            let len = usize::try_from(*len).map_err(|_| ChainError::Memory(addr.0))?;
            for slice in GuestMemory::get_slices(memory, *addr, len, access).map_err(unknown)? {
                slices.push(slice.map_err(unknown)?);
            }
        }
        Ok(slices)
    }

    /// Copies the first bytes to `data`. What of `data` is longer than the segments stays as it is.
    ///
    /// # Errors
    /// As [`slices`](Self::slices).
    pub(super) fn read(&self, memory: &GuestMemoryMmap, data: &mut [u8]) -> Result<(), ChainError> {
        let mut rest = data;
        for slice in self.slices(memory, Permissions::Read)? {
            let count = slice.len().min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            slice.copy_to(now);
            rest = later;
        }
        Ok(())
    }

    /// Copies as much of `data` to the segments as they have room for, and returns the number of bytes.
    ///
    /// # Errors
    /// As [`slices`](Self::slices).
    pub(super) fn write(&self, memory: &GuestMemoryMmap, data: &[u8]) -> Result<usize, ChainError> {
        let mut rest = data;
        for slice in self.slices(memory, Permissions::Write)? {
            let (now, later) = rest.split_at(slice.len().min(rest.len()));
            slice.copy_from(now);
            rest = later;
        }
        Ok(data.len() - rest.len())
    }
}
