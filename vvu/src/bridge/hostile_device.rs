//! A vvu device that answers as a fuzz target says, and a session of the bridge over it.
//!
//! Its registers are memory: a driver reads what it wrote, or what the target put there.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::session::FrontendSession;
use crate::driver::Driver;
use crate::event::Event;
use crate::message_socket::MessageSocket;
use crate::pci::{BarFile, DeviceError, DmaBuffer, Doorbell, PciDevice, check_access};
use crate::spec::addr::Iova;
use crate::spec::express::page;
use crate::spec::pci::{self, COMMON_CFG, DEVICE_CFG, Region};
use crate::spec::virtio::{common, device_config};

/// vhost queues that an honest device has.
pub const QUEUES: u16 = 2;
/// The UUID of the device and its express device.
pub const UUID: [u8; 16] = [7; 16];
/// Bytes of the shared memory BAR.
pub const MEMORY: u64 = 0x10000;
/// Descriptors of a virtqueue of an honest device.
const QUEUE_SIZE: u16 = 8;
/// Bytes of memory for a virtqueue: rings of up to 64 descriptors, and their buffers.
const QUEUE_MEMORY: u64 = 0x42000;
/// Bytes at the start of that memory in which the rings are.
const RINGS: usize = 0x1000;
const BUFFER: usize = 4096;

/// A device. Clones are the same device.
#[derive(Clone, Debug)]
pub struct HostileDevice(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    config: [u8; pci::CONFIG_SPACE_SIZE],
    bars: [Vec<u8>; 6],
    /// What reads give in place of what is there: bytes at an offset of a region.
    lies: Vec<(Region, u64, Vec<u8>)>,
    /// Accesses that succeed until all others fail.
    accesses_left: usize,
    memory: OwnedFd,
    /// The memory of the receive and of the transmit queue.
    queues: [OwnedFd; 2],
    allocated: usize,
    vectors: Vec<OwnedFd>,
    /// Used indices of the receive and of the transmit queue.
    used: [u16; 2],
}

/// The offsets of the rings of a queue with so many descriptors, in its memory.
struct Layout {
    available: u64,
    used: u64,
    buffers: u64,
}

impl Layout {
    fn of(size: u64) -> Self {
        let available = 16 * size;
        let used = (available + 6 + 2 * size).next_multiple_of(4);
        Self { available, used, buffers: (used + 6 + 8 * size).next_multiple_of(BUFFER as u64) }
    }
}

impl HostileDevice {
    /// An honest vvu device.
    ///
    /// # Errors
    /// When the system has no memory or no file descriptors left.
    pub fn new() -> std::io::Result<Self> {
        let file = |size| -> std::io::Result<OwnedFd> {
            let file = memfd_create("dma", MemfdFlags::CLOEXEC)?;
            ftruncate(&file, size)?;
            Ok(file)
        };
        let state = State {
            config: [0; pci::CONFIG_SPACE_SIZE],
            bars: Default::default(),
            lies: Vec::new(),
            accesses_left: 0,
            memory: file(MEMORY)?,
            queues: [file(QUEUE_MEMORY)?, file(QUEUE_MEMORY)?],
            allocated: 0,
            vectors: Vec::new(),
            used: [0; 2],
        };
        let device = Self(Arc::new(Mutex::new(state)));
        device.restart();
        Ok(device)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes it an honest vvu device after power-on.
    pub fn restart(&self) {
        let mut state = self.lock();
        state.config = pci::ConfigSpace::new(pci::vector_count(QUEUES), MEMORY).bytes;
        state.bars[0].clear();
        state.bars[0].resize(0x8000, 0);
        state.bars[2].clear();
        state.bars[2].resize(0x4000, 0);
        state.bars[4].resize(0x10000, 0);
        let common = usize::try_from(COMMON_CFG.offset).unwrap_or(0);
        let config = usize::try_from(DEVICE_CFG.offset).unwrap_or(0);
        let at = |start: usize, offset: u64| start + usize::try_from(offset).unwrap_or(0);
        let mut put = |at: usize, bytes: &[u8]| state.bars[0][at..at + bytes.len()].copy_from_slice(bytes);
        put(at(common, common::DEVICE_FEATURE), &[0xff; 4]);
        put(at(common, common::QUEUE_SIZE), &QUEUE_SIZE.to_le_bytes());
        put(at(config, device_config::MAX_VHOST_QUEUES), &u32::from(QUEUES).to_le_bytes());
        put(at(config, device_config::UUID), &UUID);
        (state.accesses_left, state.allocated, state.used) = (usize::MAX, 0, [0; 2]);
        state.lies.clear();
        state.vectors.clear();
        for queue in &state.queues {
            let _ = rustix::io::pwrite(queue, &[0; RINGS], 0);
        }
    }

    /// Makes it the express device of an honest vvu device.
    pub fn restart_express(&self) {
        self.restart();
        let header = page::Header { queues: QUEUES, uuid: UUID }.to_bytes();
        self.put(Region::Bar(crate::spec::express::PAGE_BAR), 0, &header);
    }

    /// Changes the content of a region, as if the driver had written it.
    pub fn put(&self, region: Region, offset: u64, bytes: &[u8]) {
        let mut state = self.lock();
        let region = state.region(region);
        let Some(at) = usize::try_from(offset).ok().filter(|at| *at < region.len()) else { return };
        region[at..].iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    }

    /// From now on, reads at `offset` of `region` give `bytes`.
    pub fn lie(&self, region: Region, offset: u64, bytes: &[u8]) {
        self.lock().lies.push((region, offset, bytes.to_vec()));
    }

    /// Lets accesses fail after so many.
    pub fn fail_after(&self, accesses: usize) {
        self.lock().accesses_left = accesses;
    }

    /// Uses the next buffer of queue 0 (receive) or 1 (transmit) as an honest device does, with `bytes` written to it.
    /// Nothing happens if there is none.
    pub fn use_buffer(&self, queue: usize, bytes: &[u8]) {
        let state = &mut *self.lock();
        let size = state.queue_size();
        let layout = Layout::of(size);
        let file = &state.queues[queue];
        let mut word = [0; 2];
        let _ = rustix::io::pread(file, &mut word, layout.available + 2);
        let used = &mut state.used[queue];
        if u16::from_le_bytes(word) == *used {
            return;
        }
        let slot = u64::from(*used) % size;
        let _ = rustix::io::pread(file, &mut word, layout.available + 4 + 2 * slot);
        let id = u16::from_le_bytes(word);
        let len = bytes.len().min(BUFFER);
        let _ = rustix::io::pwrite(file, &bytes[..len], layout.buffers + BUFFER as u64 * u64::from(id));
        let len = u32::try_from(len).unwrap_or(0);
        let element = [u32::from(id).to_le_bytes(), len.to_le_bytes()].concat();
        let _ = rustix::io::pwrite(file, &element, layout.used + 4 + 8 * slot);
        *used = used.wrapping_add(1);
        let _ = rustix::io::pwrite(file, &used.to_le_bytes(), layout.used + 2);
        state.signal(queue);
    }

    /// Writes an element of the used ring and the used index, true or not.
    pub fn claim(&self, queue: usize, slot: u16, id: u32, len: u32, index: u16) {
        let state = &mut *self.lock();
        let size = state.queue_size();
        let layout = Layout::of(size);
        let element = [id.to_le_bytes(), len.to_le_bytes()].concat();
        let at = layout.used + 4 + 8 * (u64::from(slot) % size);
        let _ = rustix::io::pwrite(&state.queues[queue], &element, at);
        let _ = rustix::io::pwrite(&state.queues[queue], &index.to_le_bytes(), layout.used + 2);
        state.used[queue] = index;
        state.signal(queue);
    }

    /// Overwrites a queue's rings.
    pub fn overwrite(&self, queue: usize, offset: u16, bytes: &[u8]) {
        let _ = rustix::io::pwrite(&self.lock().queues[queue], bytes, u64::from(offset) % RINGS as u64);
    }
}

impl State {
    fn region(&mut self, region: Region) -> &mut [u8] {
        match region {
            Region::Config => &mut self.config,
            Region::Bar(bar) => self.bars.get_mut(usize::from(bar)).map_or(&mut [], |bar| bar),
        }
    }

    /// Descriptors of the driver's queues, as it wrote that last.
    fn queue_size(&self) -> u64 {
        let at = usize::try_from(COMMON_CFG.offset + common::QUEUE_SIZE).unwrap_or(0);
        u64::from(u16::from_le_bytes([self.bars[0][at], self.bars[0][at + 1]]).clamp(1, 64))
    }

    fn signal(&self, vector: usize) {
        if let Some(event) = self.vectors.get(vector) {
            let _ = rustix::io::write(event, &1u64.to_ne_bytes());
        }
    }

    fn access(&mut self) -> Result<(), DeviceError> {
        let left = self.accesses_left.checked_sub(1);
        self.accesses_left = left.ok_or_else(|| DeviceError::other("access", "the device is gone"))?;
        Ok(())
    }
}

impl PciDevice for HostileDevice {
    fn region_size(&self, region: Region) -> u64 {
        self.lock().region(region).len() as u64
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        check_access(region, offset, data.len(), self.region_size(region))?;
        let mut state = self.lock();
        state.access()?;
        let at = usize::try_from(offset).unwrap_or(0);
        data.copy_from_slice(&state.region(region)[at..at + data.len()]);
        for (of, start, bytes) in state.lies.iter().filter(|(of, ..)| *of == region) {
            debug_assert_eq!(*of, region);
            for (at, lie) in (*start..).zip(bytes) {
                let index = at.checked_sub(offset).and_then(|index| usize::try_from(index).ok());
                if let Some(byte) = index.and_then(|index| data.get_mut(index)) {
                    *byte = *lie;
                }
            }
        }
        Ok(())
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        check_access(region, offset, data.len(), self.region_size(region))?;
        self.lock().access()?;
        self.put(region, offset, data);
        Ok(())
    }

    fn bar_file(&self, _bar: u8) -> Result<BarFile, DeviceError> {
        let file = self.lock().memory.try_clone();
        Ok(BarFile { file: file.map_err(|error| DeviceError::other("dup", error))?.into(), offset: 0 })
    }

    fn map_registers(&self, _bar: u8) -> Option<Arc<MmapRegion>> {
        None
    }

    fn allocate_dma(&self, len: usize) -> Result<DmaBuffer, DeviceError> {
        let mut state = self.lock();
        let failed = |what: &str| DeviceError::other("allocate", what);
        let file = state.queues.get(state.allocated).ok_or_else(|| failed("no memory"))?;
        if len as u64 > QUEUE_MEMORY {
            return Err(failed("too large"));
        }
        let file = file.try_clone().map_err(|error| DeviceError::other("dup", error))?;
        let memory = MmapRegion::from_file(FileOffset::new(file.into(), 0), len);
        let memory = memory.map_err(|error| DeviceError::other("mmap", error))?;
        let _ = memory.as_volatile_slice().write_slice(&[0; RINGS], 0);
        state.allocated += 1;
        Ok(DmaBuffer { memory, iova: Iova((state.allocated as u64) << 32) })
    }

    fn enable_msix(&self, vectors: &[&Event]) -> Result<(), DeviceError> {
        let clone = |event: &&Event| event.as_fd().try_clone_to_owned();
        let vectors: Result<_, _> = vectors.iter().take(2).map(clone).collect();
        self.lock().vectors = vectors.map_err(|error| DeviceError::other("dup", error))?;
        Ok(())
    }

    fn bind_doorbell(&self, doorbell: Doorbell, _event: &Event) -> Result<(), DeviceError> {
        let region = Region::Bar(doorbell.bar);
        self.lock().access()?;
        check_access(region, doorbell.offset, doorbell.width(), self.region_size(region))
    }

    fn unbind_doorbell(&self, _doorbell: Doorbell) -> Result<(), DeviceError> {
        self.lock().access()
    }
}

/// A session of the bridge.
pub struct Session<'d>(FrontendSession<'d, HostileDevice>);

impl<'d> Session<'d> {
    /// A session between `driver` and the back-end at the other end of `backend`. `None` if the device fails.
    pub fn new(driver: &'d mut Driver<HostileDevice>, backend: UnixStream) -> Option<Self> {
        let mut session = FrontendSession::new(driver, MessageSocket::new(backend));
        session.open().ok()?;
        Some(Self(session))
    }

    /// Moves what can be moved, after a look at the device if `idle`. Returns whether the session goes on.
    pub fn step(&mut self, idle: bool) -> bool {
        self.0.step(idle)
    }

    /// Disconnects the front-end.
    pub fn close(mut self) {
        let _ = self.0.close();
    }
}
