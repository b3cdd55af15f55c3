//! A driver of one queue, for tests.

use std::io::Write;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tempfile::NamedTempFile;
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::config::Shape;
use super::device::BlockDevice;
use super::disk::{Disk, SECTOR_SIZE};
use super::options::{BlockOptions, EngineKind};
use crate::backend::device::Device;
use crate::backend::queue::Queue;
use crate::backend::ring::SplitRing;
use crate::backend::serve::Service;
use crate::event::Event;

/// Bytes of guest memory, which starts at address 0.
pub const MEMORY: usize = 1 << 20;
/// Sectors of the disk.
pub const SECTORS: u64 = 64;
/// Descriptors of the queue.
pub const QUEUE_SIZE: u16 = 16;
/// Guest address of the descriptor table.
pub const DESCRIPTORS: u64 = 0;
/// Guest address of the available ring.
pub const AVAILABLE: u64 = 0x1000;
/// Guest address of the used ring.
pub const USED: u64 = 0x2000;

const SHAPE: Shape = Shape { queues: 1, segments: 126, access_platform: false };

/// One descriptor as the driver writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub addr: u64,
    /// Length of the buffer in bytes.
    pub len: u32,
    /// 1: another follows, 2: the device writes, 4: indirect.
    pub flags: u16,
    /// Index of the descriptor that follows.
    pub next: u16,
}

/// How the device carries out requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// The engine.
    pub engine: EngineKind,
    /// Direct I/O on blocks of so many bytes; `None` is buffered I/O.
    pub blocks: Option<u32>,
}

impl Way {
    /// One request at a time through the page cache.
    pub const SYNC: Self = Self { engine: EngineKind::Sync, blocks: None };
    /// Many requests at a time through the page cache.
    pub const IO_URING: Self = Self { engine: EngineKind::IoUring, blocks: None };
    /// All ways that differ.
    pub const ALL: [Self; 6] = [
        Self::SYNC,
        Self::IO_URING,
        Self { blocks: Some(512), ..Self::SYNC },
        Self { blocks: Some(512), ..Self::IO_URING },
        Self { blocks: Some(4096), ..Self::SYNC },
        Self { blocks: Some(4096), ..Self::IO_URING },
    ];
}

/// A disk, its device, and one queue.
#[derive(Debug)]
pub struct Rig {
    /// How the device carries out requests.
    pub way: Way,
    disk: Arc<Disk>,
    device: Arc<BlockDevice>,
    service: Mutex<Service>,
    poll: Duration,
    /// Set to make the device give up the queue between two requests, as when the front-end is gone.
    pub interrupt: Arc<AtomicBool>,
    /// Memory of the guest.
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
    /// Starts a queue of a disk whose sectors are filled with their numbers.
    #[must_use]
    pub fn new() -> Self {
        Self::with(Way::SYNC, Duration::ZERO)
    }

    /// One for each way in which requests are carried out.
    pub fn all() -> impl Iterator<Item = Self> {
        Way::ALL.into_iter().map(|way| Self::with(way, Duration::ZERO))
    }

    /// One for each engine, with buffered I/O.
    pub fn engines() -> impl Iterator<Item = Self> {
        [Way::SYNC, Way::IO_URING].into_iter().map(|way| Self::with(way, Duration::ZERO))
    }

    /// The synchronous one with a poll window.
    #[must_use]
    pub fn with_poll(poll: Duration) -> Self {
        Self::with(Way::SYNC, poll)
    }

    /// One that carries out requests in this way.
    #[must_use]
    pub fn with(way: Way, poll: Duration) -> Self {
        let mut file = NamedTempFile::new().expect("file");
        let sector = |number: u64| vec![u8::try_from(number).expect("small"); SECTOR_SIZE.into()];
        file.write_all(&(0..SECTORS).flat_map(sector).collect::<Vec<_>>()).expect("content");
        let disk = open(&file, way);
        let (device, service) = connect(&disk, way, poll, 1 << VIRTIO_BLK_F_FLUSH);
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let interrupt = Arc::new(AtomicBool::new(false));
        let service = Mutex::new(service);
        let mut rig = Self { way, disk, device, service, poll, interrupt, memory, file, available: 0 };
        rig.restart();
        rig
    }

    /// Makes the poll window as long as it may be.
    pub fn widen_window(&self) {
        self.service().queue.widen_window();
    }

    fn service(&self) -> MutexGuard<'_, Service> {
        self.service.lock().expect("no panic before")
    }

    /// Starts the queue anew with empty rings.
    pub fn restart(&mut self) {
        self.memory.write_slice(&[0; 0x3000], GuestAddress(0)).expect("rings");
        self.available = 0;
        let mut service = self.service();
        let queue = &mut service.queue;
        queue.stop();
        queue.memory = Arc::new(self.memory.clone());
        queue.ring = SplitRing::default();
        queue.ring.size = QUEUE_SIZE;
        queue.ring.descriptors = GuestAddress(DESCRIPTORS);
        queue.ring.available = GuestAddress(AVAILABLE);
        queue.ring.used = GuestAddress(USED);
        queue.enabled = true;
        queue.start();
    }

    /// Whether the device has not given the queue up.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.service().queue.is_running()
    }

    /// Writes descriptors, from index 0 on, and makes the chain that starts at index 0 available.
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

    /// Lets the device carry out all requests that are available.
    pub fn process(&self) {
        let mut service = self.service();
        service.serve(&self.interrupt);
        service.drain();
    }

    /// Returns the number of chains that were used, and the length of the last one.
    #[must_use]
    pub fn used(&self) -> (u16, u32) {
        let index: u16 = self.memory.read_obj(GuestAddress(USED + 2)).expect("used index");
        let last = u64::from(index.wrapping_sub(1) % QUEUE_SIZE);
        let length = self.memory.read_obj(GuestAddress(USED + 8 + 8 * last)).expect("used ring");
        (index, length)
    }

    /// The content of the disk.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).expect("file")
    }
}

/// What tests do to the disk.
impl Rig {
    pub(super) fn faults(&self) -> &super::faults::Faults {
        &self.disk.faults
    }

    /// Begins with a new front-end, whose driver accepts `features`.
    pub(super) fn reconnect(&mut self, features: u64) {
        let (device, service) = connect(&self.disk, self.way, self.poll, features);
        (self.device, self.service) = (device, Mutex::new(service));
        self.restart();
    }

    /// Begins with a new back-end.
    pub(super) fn reopen(&mut self) {
        // The last owner of the disk gives up the lock on it.
        let mut other = NamedTempFile::new().expect("file");
        other.write_all(&[0; 4096]).expect("content");
        self.disk = open(&other, self.way);
        self.reconnect(0);
        self.disk = open(&self.file, self.way);
        self.reconnect(1 << VIRTIO_BLK_F_FLUSH);
    }

    pub(super) fn resize(&self, len: u64) {
        self.file.as_file().set_len(len).expect("size");
    }

    pub(super) fn set_content(&self, content: &[u8]) {
        std::fs::write(self.file.path(), content).expect("content");
    }
}

fn open(file: &NamedTempFile, way: Way) -> Arc<Disk> {
    let options = BlockOptions { direct: way.blocks.is_some(), ..BlockOptions::new(file.path()) };
    let mut disk = Disk::open(&options).expect("disk");
    if let Some(blocks) = way.blocks {
        disk.set_alignment(512, blocks);
    }
    Arc::new(disk)
}

/// A device for a front-end whose driver accepts `features`, and the service of its queue.
fn connect(disk: &Arc<Disk>, way: Way, poll: Duration, features: u64) -> (Arc<BlockDevice>, Service) {
    let device = Arc::new(BlockDevice::new(Arc::clone(disk), SHAPE, way.engine));
    device.set_features(features);
    let wake_up = Arc::new(Event::new().expect("event"));
    let engine = Arc::clone(&device).engine(&wake_up).expect("engine");
    (device, Service::new(Queue::new(0, poll), engine))
}
