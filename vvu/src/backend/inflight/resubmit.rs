//! Requests that are carried out again.

use std::sync::Arc;

use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryLoadGuard,
    GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

use crate::backend::server::Memory;
use crate::spec::PAGE_SIZE;

/// The chains that begin at `heads`, in that order.
///
/// virtio-queue gives out chains only as they stand in an available ring, and in the driver's own one
/// they may be overwritten by now. So there is one for this purpose, in a page that is added to the
/// guest's memory behind its end and that holds nothing but the heads.
///
/// # Errors
/// When no such page can be had, or the queue is broken.
pub(in crate::backend) fn chains(
    memory: &GuestMemoryMmap,
    queue: &Queue,
    heads: &[u16],
) -> Result<Vec<DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>>, Error> {
    let size = (2 * (3 + heads.len()) as u64).next_multiple_of(PAGE_SIZE);
    let page = memory.last_addr().checked_align_up(PAGE_SIZE).ok_or(Error::AddressOverflow)?;
    let region = usize::try_from(size).ok().and_then(|size| MmapRegion::new(size).ok());
    let region =
        region.and_then(|region| GuestRegionMmap::new(region, page)).ok_or(Error::AddressOverflow)?;
    let memory = memory.insert_region(Arc::new(region)).map_err(|_| Error::AddressOverflow)?;

    let count = u16::try_from(heads.len()).map_err(|_| Error::InvalidAvailRingIndex)?;
    let ring: Vec<u8> = [0, count].iter().chain(heads).flat_map(|value| value.to_le_bytes()).collect();
    memory.write_slice(&ring, page).map_err(Error::GuestMemory)?;

    let mut again = Queue::new(queue.max_size())?;
    again.try_set_size(queue.size())?;
    again.try_set_desc_table_address(GuestAddress(queue.desc_table()))?;
    again.try_set_avail_ring_address(page)?;
    again.try_set_used_ring_address(GuestAddress(queue.used_ring()))?;
    again.set_ready(true);
    Ok(again.iter(Memory::new(memory).memory())?.collect())
}
