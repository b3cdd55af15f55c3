//! A hostile driver of one queue, in every shape that a front-end can give it, for fuzz targets.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use vhost::vhost_user::message::VhostUserInflight;
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::config::Shape;
use super::device::BlockDevice;
use super::disk::Disk;
use super::faults::{Call, Fault};
use super::options::{BlockOptions, EngineKind};
use crate::backend::device::Device;
use crate::backend::inflight::{self, Limits, Region};
use crate::backend::queue::Queue;
use crate::backend::ring::{QUEUE_SIZE_MAX, SplitRing};
use crate::backend::serve::Service;
use crate::event::Event;

/// Sectors of the disk.
pub const SECTORS: u64 = 64;
/// Guest address of the descriptor table.
pub const DESCRIPTORS: u64 = 0;
/// Guest address of the available ring.
pub const AVAILABLE: u64 = 0x4000;
/// Guest address of the used ring.
pub const USED: u64 = 0x5000;
/// Guest address of what the driver uses for requests.
pub const BUFFERS: u64 = 0x8000;
/// Where the second of two memory regions begins. Both are one range of guest addresses.
pub const BOUNDARY: u64 = 0xa000;
/// Bytes of guest memory, which begins at 0.
pub const MEMORY: u64 = 0x10000;
/// Bytes of the region of in-flight requests.
const REGION: u64 = 16 + 16 * QUEUE_SIZE_MAX as u64;

const SHAPE: Shape = Shape { queues: 1, segments: 126, access_platform: false };
const LIMITS: Limits = Limits { queues: 1, queue_size: QUEUE_SIZE_MAX };

/// What front-end and driver agree on.
#[derive(Clone, Copy, Debug)]
pub struct Agreed {
    /// Descriptors of the queue.
    pub size: u16,
    /// `VIRTIO_F_EVENT_IDX`.
    pub event_idx: bool,
    /// The driver can flush. If not, each write has to be durable.
    pub flush: bool,
    /// The disk is read-only.
    pub read_only: bool,
    /// Memory has two regions instead of one.
    pub two_regions: bool,
    /// Requests in flight are tracked in a region for rings of so many descriptors; 0 turns that off.
    pub tracked: u16,
    /// Both ring indices start here.
    pub base: u16,
}

/// A call on the disk that fails.
#[derive(Clone, Copy, Debug)]
pub enum DiskFault {
    /// preadv fails.
    Read,
    /// pwritev fails.
    Write,
    /// pwritev transfers less than asked for.
    ShortWrite,
    /// preadv transfers less than asked for.
    ShortRead,
    /// fdatasync fails.
    Flush,
    /// fallocate fails.
    Allocate,
    /// The file system does not know fallocate.
    NoAllocate,
}

/// The parts that all executions of a process share.
#[derive(Debug)]
pub struct HostileDriver {
    disks: [Arc<Disk>; 2],
    memories: [GuestMemoryMmap; 2],
    inflight: File,
    wake_up: Arc<Event>,
    service: Service,
    available: u16,
    agreed: Agreed,
}

impl HostileDriver {
    /// A driver without a started queue.
    ///
    /// # Errors
    /// When the system has no memory or no file descriptors left.
    pub fn new() -> std::io::Result<Self> {
        let disk = |read_only| -> std::io::Result<Arc<Disk>> {
            let file = memfd_create("disk", MemfdFlags::CLOEXEC)?;
            ftruncate(&file, SECTORS * 512)?;
            let mut options = BlockOptions::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
            options.read_only = read_only;
            Disk::open(&options).map(Arc::new).map_err(std::io::Error::other)
        };
        let disks = [disk(false)?, disk(true)?];
        let memory = |regions: &[(u64, u64)]| {
            let ranges: Vec<_> = regions
                .iter()
                .map(|(at, size)| (GuestAddress(*at), usize::try_from(*size).unwrap_or(0)))
                .collect();
            GuestMemoryMmap::from_ranges(&ranges).map_err(std::io::Error::other)
        };
        let memories = [memory(&[(0, MEMORY)])?, memory(&[(0, BOUNDARY), (BOUNDARY, MEMORY - BOUNDARY)])?];
        let asked = VhostUserInflight { num_queues: 1, queue_size: QUEUE_SIZE_MAX, ..Default::default() };
        let (_, inflight) = inflight::create(&asked, LIMITS).map_err(std::io::Error::other)?;
        let agreed = Agreed {
            size: 16,
            event_idx: false,
            flush: true,
            read_only: false,
            two_regions: false,
            tracked: 0,
            base: 0,
        };
        let wake_up = Arc::new(Event::new()?);
        let service = service(&disks[0], true, &wake_up)?;
        Ok(Self { disks, memories, inflight, wake_up, service, available: 0, agreed })
    }

    /// The memory that driver and device share.
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memories[usize::from(self.agreed.two_regions)]
    }

    /// Starts anew with a front-end and a driver that agree on this, and with empty rings.
    pub fn restart(&mut self, agreed: Agreed) {
        self.agreed = agreed;
        let disk = &self.disks[usize::from(agreed.read_only)];
        disk.faults.clear();
        disk.gate.forget_failure();
        if let Ok(service) = service(disk, agreed.flush, &self.wake_up) {
            self.service = service;
        }
        let rings = usize::try_from(BUFFERS).unwrap_or(0);
        let _ = self.memory().write_slice(&vec![0; rings], GuestAddress(0));
        for index in [AVAILABLE + 2, USED + 2] {
            self.write(index, &agreed.base.to_le_bytes());
        }
        self.available = agreed.base;
        if agreed.tracked != 0 {
            self.write_region(0, &[0; REGION as usize]);
        }
        self.resume();
    }

    /// Lets another back-end take the queue over, as after a crash of the one before.
    pub fn resume(&mut self) {
        let agreed = self.agreed;
        let (memory, region) = (Arc::new(self.memory().clone()), self.region(agreed.tracked));
        let queue = &mut self.service.queue;
        queue.stop();
        queue.memory = memory;
        let ring = &mut queue.ring;
        *ring = SplitRing::default();
        (ring.size, ring.event_idx, ring.next_available) = (agreed.size, agreed.event_idx, agreed.base);
        ring.descriptors = GuestAddress(DESCRIPTORS);
        (ring.available, ring.used) = (GuestAddress(AVAILABLE), GuestAddress(USED));
        queue.region = region;
        queue.enabled = true;
        queue.start();
    }

    fn region(&self, queue_size: u16) -> Option<Arc<Region>> {
        let description =
            VhostUserInflight { mmap_size: REGION, num_queues: 1, queue_size, ..Default::default() };
        Region::open(&description, self.inflight.try_clone().ok()?, LIMITS, None).ok().map(Arc::new)
    }

    /// Overwrites guest memory. What lies outside of it is left out.
    pub fn write(&self, at: u64, data: &[u8]) {
        let _ = self.memory().write_slice(data, GuestAddress(at));
    }

    /// Overwrites the region of in-flight requests, as the front-end may.
    pub fn write_region(&self, at: u16, data: &[u8]) {
        let end = usize::try_from(REGION).unwrap_or(0);
        let len = data.len().min(end.saturating_sub(at.into()));
        let _ = rustix::io::pwrite(&self.inflight, &data[..len], at.into());
    }

    /// Writes descriptor `index` of the table.
    pub fn describe(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.write(DESCRIPTORS + 16 * u64::from(index), &descriptor(addr, len, flags, next));
    }

    /// Makes the chain that starts at descriptor `head` available.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % self.agreed.size);
        self.write(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.write(AVAILABLE + 2, &self.available.to_le_bytes());
    }

    /// Lets a later call on the disk fail.
    pub fn inject(&self, fault: DiskFault) {
        let (call, fault) = match fault {
            DiskFault::Read => (Call::Read, Fault::Error(Errno::IO.raw_os_error())),
            DiskFault::Write => (Call::Write, Fault::Error(Errno::NOSPC.raw_os_error())),
            DiskFault::ShortWrite => (Call::Write, Fault::Short),
            DiskFault::ShortRead => (Call::Read, Fault::Short),
            DiskFault::Flush => (Call::Flush, Fault::Error(Errno::IO.raw_os_error())),
            DiskFault::Allocate => (Call::Allocate, Fault::Error(Errno::NOSPC.raw_os_error())),
            DiskFault::NoAllocate => (Call::Allocate, Fault::Error(Errno::OPNOTSUPP.raw_os_error())),
        };
        self.disks[usize::from(self.agreed.read_only)].faults.inject(call, fault);
    }

    /// Lets the device carry out all requests that are available. Returns whether it has not given the queue up.
    pub fn process(&mut self) -> bool {
        self.service.serve(&AtomicBool::new(false));
        self.service.queue.is_running()
    }

    /// The used index, and the last element of the used ring.
    #[must_use]
    pub fn used(&self) -> (u16, [u32; 2]) {
        let index: u16 = self.memory().read_obj(GuestAddress(USED + 2)).unwrap_or(0);
        let slot = u64::from(index.wrapping_sub(1) % self.agreed.size);
        (index, self.memory().read_obj(GuestAddress(USED + 4 + 8 * slot)).unwrap_or_default())
    }
}

/// The service of a queue whose driver can flush or cannot.
fn service(disk: &Arc<Disk>, flush: bool, wake_up: &Arc<Event>) -> std::io::Result<Service> {
    let device = Arc::new(BlockDevice::new(Arc::clone(disk), SHAPE, EngineKind::Sync));
    device.set_features(if flush { 1 << VIRTIO_BLK_F_FLUSH } else { 0 });
    Ok(Service::new(Queue::new(0, Duration::ZERO), device.engine(wake_up)?))
}

/// A descriptor as it is in memory (virtio 1.2, 2.7.5).
#[must_use]
pub fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
