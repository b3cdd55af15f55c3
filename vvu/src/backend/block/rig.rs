//! A driver of one queue, played for tests and fuzz targets.

use std::io::Write;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tempfile::NamedTempFile;
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::device::Device;
use super::disk::{Disk, SECTOR_SIZE};
use super::{Arc, Options};
use crate::backend::inflight::{Inflight, Limits};
use crate::backend::vring::Vring;

/// Bytes of sibling memory, which starts at address 0.
pub const MEMORY: usize = 1 << 20;
/// Sectors of the disk.
pub const SECTORS: u64 = 64;
/// Descriptors of the queue.
pub const QUEUE_SIZE: u16 = 16;
/// Where the descriptors are.
pub const DESCRIPTORS: u64 = 0;
/// Where the available ring is.
pub const AVAILABLE: u64 = 0x1000;
/// Where the used ring is.
pub const USED: u64 = 0x2000;

/// One descriptor as the driver writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Address of the buffer.
    pub addr: u64,
    /// Bytes of the buffer.
    pub len: u32,
    /// 1: another follows, 2: the device writes, 4: indirect.
    pub flags: u16,
    /// The one that follows.
    pub next: u16,
}

/// A disk, its device, and one queue.
pub struct Rig {
    device: Device,
    /// Set to tell the device that there is no front-end any longer.
    pub gone: Arc<AtomicBool>,
    vring: Vring,
    /// Sibling memory.
    pub memory: GuestMemoryMmap,
    file: NamedTempFile,
    available: u16,
}

impl Default for Rig {
    fn default() -> Self {
        Self::new()
    }
}

impl Rig {
    /// A queue that runs, of a disk in which each sector is filled with its number.
    #[must_use]
    pub fn new() -> Self {
        Self::with_poll(Duration::ZERO)
    }

    /// The same, polled for so long.
    #[must_use]
    pub fn with_poll(poll: Duration) -> Self {
        let mut file = NamedTempFile::new().expect("file");
        let sector = |number: u64| vec![u8::try_from(number).expect("small"); SECTOR_SIZE.into()];
        file.write_all(&(0..SECTORS).flat_map(sector).collect::<Vec<_>>()).expect("content");
        let options =
            Options { path: file.path().to_owned(), read_only: false, queues: 1, serial: None, poll };
        let disk = Arc::new(Disk::open(&options).expect("disk"));
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let shared = GuestMemoryAtomic::new(memory.clone());
        let inflight = Inflight::new(Limits { queues: 1, queue_size: QUEUE_SIZE });
        let gone = Arc::new(AtomicBool::new(false));
        let device = Device::new(disk, 1, poll, shared.clone(), Arc::new(inflight), gone.clone());
        device.acked_features(1 << VIRTIO_BLK_F_FLUSH);
        let vring = Vring::new(shared, QUEUE_SIZE).expect("queue");
        let mut rig = Self { device, gone, vring, memory, file, available: 0 };
        rig.restart();
        rig
    }

    /// Starts the queue anew with empty rings.
    pub fn restart(&mut self) {
        self.memory.write_slice(&[0; 0x3000], GuestAddress(0)).expect("rings");
        self.available = 0;
        self.vring.set_queue_size(QUEUE_SIZE);
        self.vring.set_queue_info(DESCRIPTORS, AVAILABLE, USED).expect("addresses");
        self.vring.set_queue_next_avail(0);
        self.vring.set_queue_next_used(0);
        self.vring.set_queue_ready(true);
        self.vring.set_enabled(true);
    }

    /// Whether the device has not given the queue up.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.vring.get_ref().get_queue().ready()
    }

    /// Writes descriptors from the first on and makes the chain of the first available.
    pub fn offer(&mut self, chain: &[Descriptor]) {
        for (index, descriptor) in (0..).zip(chain) {
            let Descriptor { addr, len, flags, next } = *descriptor;
            let at = GuestAddress(DESCRIPTORS + 16 * index);
            self.memory
                .write_obj([addr, u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48], at)
                .expect("descriptor");
        }
        let entry = AVAILABLE + 4 + 2 * u64::from(self.available % QUEUE_SIZE);
        self.memory.write_obj(0u16, GuestAddress(entry)).expect("available ring");
        self.available = self.available.wrapping_add(1);
        self.memory.write_obj(self.available, GuestAddress(AVAILABLE + 2)).expect("available index");
    }

    /// Lets the device carry out what is available.
    pub fn process(&self) {
        let vrings = std::slice::from_ref(&self.vring);
        self.device.handle_event(0, EventSet::IN, vrings, 0).expect("no error ends the thread");
    }

    /// How many chains were used, and the length of the last one.
    #[must_use]
    pub fn used(&self) -> (u16, u32) {
        let index: u16 = self.memory.read_obj(GuestAddress(USED + 2)).expect("used index");
        let last = u64::from(index.wrapping_sub(1) % QUEUE_SIZE);
        let length = self.memory.read_obj(GuestAddress(USED + 8 + 8 * last)).expect("used ring");
        (index, length)
    }

    /// What is on the disk.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).expect("file")
    }
}
