//! A request as the driver put it into the queue, taken apart and checked.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use super::config::QUEUE_SIZE_MAX;

/// Bytes of `struct virtio_blk_req` in front of the data: type, reserved, sector.
const HEADER_SIZE: usize = 16;

/// Why a chain of descriptors is not a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    /// A loop, an invalid index, or an indirect table out of place or out of memory.
    #[error("descriptor chain that does not end")]
    Endless,
    /// More descriptors than any queue has.
    #[error("descriptor chain of more than {QUEUE_SIZE_MAX} descriptors")]
    TooLong,
    /// The device may not read what follows something that it may write (virtio 1.2, 2.7.4.2).
    #[error("readable descriptor behind a writable one")]
    Order,
    /// Fewer readable bytes than a header.
    #[error("no request header")]
    Header,
    /// No writable byte.
    #[error("no status byte")]
    Status,
    /// Memory that the guest does not have.
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
pub(super) struct Segments(Vec<Segment>);

/// A request; only its shape is checked, not what it asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// One of `VIRTIO_BLK_T_*`, or anything else.
    pub(super) kind: u32,
    /// First sector.
    pub(super) sector: u64,
    /// What the device reads, behind the header.
    pub(super) input: Segments,
    /// What the device writes, in front of the status.
    pub(super) output: Segments,
    /// Where the status goes.
    pub(super) status: GuestAddress,
}

/// A chain that is not a request, and where the driver might look for a status all the same.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rejected {
    pub(super) reason: Malformed,
    pub(super) status: Option<GuestAddress>,
}

impl Segments {
    /// Bytes in all. Cannot overflow, since there are at most [`QUEUE_SIZE_MAX`] segments.
    pub(super) fn len(&self) -> u64 {
        self.0.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Takes the first `count` bytes off into segments of their own, or all of them if there are
    /// fewer.
    fn split_front(&mut self, count: usize) -> Self {
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

    /// Takes the last byte off.
    fn split_last(&mut self) -> Option<GuestAddress> {
        let last = self.0.last_mut()?;
        last.len -= 1;
        let addr = last.addr.0.checked_add(last.len.into());
        if last.len == 0 {
            self.0.pop();
        }
        addr.map(GuestAddress)
    }

    /// The memory itself, for as long as `memory` is borrowed.
    pub(super) fn slices<'m>(
        &self,
        memory: &'m GuestMemoryMmap,
        access: Permissions,
    ) -> Result<Vec<VolatileSlice<'m>>, Malformed> {
        let mut slices = Vec::with_capacity(self.0.len());
        for Segment { addr, len } in &self.0 {
            let unknown = |_| Malformed::Memory(addr.0);
            let len = usize::try_from(*len).map_err(|_| Malformed::Memory(addr.0))?;
            for slice in GuestMemory::get_slices(memory, *addr, len, access).map_err(unknown)? {
                slices.push(slice.map_err(unknown)?);
            }
        }
        Ok(slices)
    }

    /// Fills `data` with the first bytes; there must be that many.
    pub(super) fn read(&self, memory: &GuestMemoryMmap, data: &mut [u8]) -> Result<(), Malformed> {
        let mut rest = data;
        for slice in self.slices(memory, Permissions::Read)? {
            let count = slice.len().min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            slice.copy_to(now);
            rest = later;
        }
        Ok(())
    }

    /// Writes as much of `data` as there is room for, and returns how much that was.
    pub(super) fn write(&self, memory: &GuestMemoryMmap, data: &[u8]) -> Result<usize, Malformed> {
        let mut rest = data;
        for slice in self.slices(memory, Permissions::Write)? {
            let (now, later) = rest.split_at(slice.len().min(rest.len()));
            slice.copy_from(now);
            rest = later;
        }
        Ok(data.len() - rest.len())
    }
}

impl Request {
    /// Takes `chain` apart.
    pub(super) fn parse<M>(chain: DescriptorChain<M>) -> Result<Self, Rejected>
    where
        M: Deref<Target = GuestMemoryMmap> + Clone,
    {
        let memory = chain.clone();
        let memory = memory.memory();
        let (mut input, mut output) = (Segments::default(), Segments::default());
        let shape = collect(chain, &mut input, &mut output);
        let status = output.split_last();
        let reject = |reason| Rejected { reason, status };
        shape.map_err(reject)?;

        let header = input.split_front(HEADER_SIZE);
        if header.len() != HEADER_SIZE as u64 {
            return Err(reject(Malformed::Header));
        }
        let mut bytes = [0; HEADER_SIZE];
        header.read(memory, &mut bytes).map_err(reject)?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = bytes;
        let Some(status) = status else { return Err(reject(Malformed::Status)) };
        Ok(Self {
            kind: u32::from_le_bytes([a, b, c, d]),
            sector: u64::from_le_bytes(sector),
            input,
            output,
            status,
        })
    }
}

/// Sorts the descriptors of `chain`, up to where it goes wrong.
fn collect<M>(chain: DescriptorChain<M>, input: &mut Segments, output: &mut Segments) -> Result<(), Malformed>
where
    M: Deref<Target = GuestMemoryMmap>,
{
    let mut ended = false;
    for (count, descriptor) in chain.enumerate() {
        if count == usize::from(QUEUE_SIZE_MAX) {
            return Err(Malformed::TooLong);
        }
        ended = !descriptor.has_next();
        let segment = Segment { addr: descriptor.addr(), len: descriptor.len() };
        if descriptor.is_write_only() {
            output.0.extend((segment.len != 0).then_some(segment));
        } else if output.0.is_empty() {
            input.0.extend((segment.len != 0).then_some(segment));
        } else {
            return Err(Malformed::Order);
        }
    }
    if ended { Ok(()) } else { Err(Malformed::Endless) }
}

#[cfg(test)]
#[path = "request_test.rs"]
mod tests;
