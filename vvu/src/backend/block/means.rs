//! What the requests of one queue use on their way.

use std::sync::{Arc, Weak};

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use super::buffers::Buffers;
use super::device::{BlockDevice, Path};
use super::disk::Disk;
use super::pieces::Pieces;
use crate::event::Event;

/// What the requests of one queue use on their way.
#[derive(Debug)]
pub(super) struct Means {
    pub(super) device: Arc<BlockDevice>,
    pub(super) buffers: Buffers,
    /// Signalled when a request that could not go on should try again; `None` if whoever carries it out waits for that.
    pub(super) waiter: Option<Arc<Event>>,
    unpinnable: Unpinnable,
}

/// Memory that the kernel cannot pin for direct I/O, as the region of a PCI device.
#[derive(Debug, Default)]
struct Unpinnable {
    memory: Weak<GuestMemoryMmap>,
    /// Address of the first byte of each such region of `memory` in this process, and of the one behind its last.
    regions: Vec<(usize, usize)>,
}

impl Means {
    pub(super) fn new(device: Arc<BlockDevice>, waiter: Option<Arc<Event>>) -> Self {
        Self { device, buffers: Buffers::default(), waiter, unpinnable: Unpinnable::default() }
    }

    pub(super) fn disk(&self) -> &Disk {
        self.device.disk()
    }

    /// The kernel has used `pieces` for direct I/O.
    pub(super) fn learn_pinnable(&self, pieces: &Pieces) {
        if pieces.memory().is_some() {
            self.device.log_path(Path::Straight);
        }
    }

    /// Whether a part of `pieces` is in memory that could not be pinned.
    pub(super) fn cannot_pin(&self, pieces: &Pieces) -> bool {
        self.unpinnable.is_of(pieces) && self.unpinnable.regions.iter().any(|region| pieces.touches(*region))
    }

    /// The kernel could not pin `pieces`. If all are in one region of memory, nothing of that can be pinned.
    pub(super) fn learn_unpinnable(&mut self, pieces: &Pieces) {
        let Some(memory) = pieces.memory() else { return };
        if !self.unpinnable.is_of(pieces) {
            self.unpinnable = Unpinnable { memory: Arc::downgrade(memory), regions: Vec::new() };
        }
        for region in memory.iter() {
            let start = region.as_ptr().addr();
            let range = (start, start + region.size());
            if pieces.are_inside(range) && !self.unpinnable.regions.contains(&range) {
                self.unpinnable.regions.push(range);
                self.device.log_path(Path::Buffers);
            }
        }
    }
}

impl Unpinnable {
    fn is_of(&self, pieces: &Pieces) -> bool {
        pieces.memory().is_some_and(|memory| std::ptr::eq(Arc::as_ptr(memory), self.memory.as_ptr()))
    }
}
