//! A device with a host and a guest driver that tests and fuzz targets play.

use std::cell::RefCell;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::Timespec;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{DeviceConfig, Host, SiblingMemory, VvuDevice};
use crate::event::Ready;
use crate::message_socket::{Message, MessageSocket};
use crate::pci::PciFunction;
use crate::spec::pci::{self, Region};
use crate::spec::virtio::{common, device_config, status};

/// Bytes of device-VM memory; it begins at address 0.
pub const MEMORY: usize = 1 << 20;
/// Descriptors of each queue.
pub const QUEUE_SIZE: u16 = 8;
/// Bytes of each of the driver's buffers.
pub const BUFFER: u32 = 4096;
/// The BAR of the registers.
pub const BAR0: Region = Region::Bar(pci::REGISTER_BAR);
/// The BAR of doorbells and vector select.
pub const BAR2: Region = Region::Bar(pci::NOTIFY_BAR);

/// A host that records the vectors that the device raises.
#[derive(Debug)]
pub struct TestHost {
    /// Device-VM memory.
    pub memory: GuestMemoryMmap,
    /// Vectors raised, oldest first.
    pub signals: RefCell<Vec<u16>>,
}

impl Host for TestHost {
    type Memory = GuestMemoryMmap;

    fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    fn signal(&self, vector: u16) {
        self.signals.borrow_mut().push(vector);
    }
}

/// A virtqueue of the rig's driver.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    /// Address of the descriptor table; the rings and buffers follow it.
    pub base: u64,
    next_avail: u16,
    next_used: u16,
}

impl Ring {
    const AVAIL: u64 = 0x1000;
    const USED: u64 = 0x2000;
    const BUFFERS: u64 = 0x4000;
}

/// A device with its host and its driver.
#[derive(Debug)]
pub struct Rig<H = TestHost> {
    /// The device under test.
    pub device: VvuDevice,
    /// The host of the device.
    pub host: H,
    /// Device-VM memory as the driver reaches it.
    pub memory: GuestMemoryMmap,
    /// The receive and the transmit queue.
    pub rings: [Ring; 2],
    /// Directory of the socket `s` that front-ends connect to.
    pub dir: TempDir,
}

impl Default for Rig {
    fn default() -> Self {
        Self::new()
    }
}

impl Rig {
    /// A device after power-on.
    #[must_use]
    pub fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let host = TestHost { memory: memory.clone(), signals: RefCell::default() };
        Self::with_host(host, memory)
    }
}

impl<H: Host> Rig<H> {
    /// A device after power-on, whose driver has `memory`.
    #[must_use]
    pub fn with_host(host: H, memory: GuestMemoryMmap) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let listener = UnixListener::bind(dir.path().join("s")).expect("bind");
        let sibling = SiblingMemory::create(0x10000).expect("memory");
        let config = DeviceConfig { memory: sibling, listener, queues: 16, uuid: [7; 16] };
        let device = VvuDevice::new(config).expect("device");
        let ring = |base| Ring { base, next_avail: 0, next_used: 0 };
        Self { device, host, memory, rings: [ring(0x10000), ring(0x40000)], dir }
    }

    /// Writes as the guest.
    pub fn write(&mut self, region: Region, offset: u64, data: &[u8]) {
        self.device.write(&self.host, region, offset, data);
    }

    /// Writes a register of the common configuration.
    pub fn common(&mut self, offset: u64, data: &[u8]) {
        self.write(BAR0, pci::COMMON_CFG.offset + offset, data);
    }

    /// Reads as the guest.
    pub fn read<const N: usize>(&mut self, region: Region, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.device.read(region, offset, &mut data);
        data
    }

    /// Reads the device status.
    pub fn status(&mut self) -> u8 {
        let [status] = self.read(BAR0, pci::COMMON_CFG.offset + common::DEVICE_STATUS);
        status
    }

    /// Reads the link status from the device configuration.
    pub fn link_status(&mut self) -> u32 {
        u32::from_le_bytes(self.read(BAR0, pci::DEVICE_CFG.offset))
    }

    /// Brings the device up as a driver does; `BACKEND_UP` is the last step.
    pub fn bring_up(&mut self, features: u64) {
        self.write(Region::Config, 4, &6u16.to_le_bytes());
        self.common(common::DEVICE_STATUS, &[0]);
        for select in [0u32, 1] {
            self.common(common::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            let half = (features >> (32 * select)).to_le_bytes();
            self.common(common::DRIVER_FEATURE, &half[..4]);
        }
        self.common(common::DEVICE_STATUS, &[status::FEATURES_OK]);
        self.common(common::CONFIG_MSIX_VECTOR, &[0, 0]);
        for index in [0u16, 1] {
            let ring = &mut self.rings[usize::from(index)];
            (ring.next_avail, ring.next_used) = (0, 0);
            let base = ring.base;
            self.memory.write_slice(&[0; 0x3000], GuestAddress(base)).expect("clear");
            self.common(common::QUEUE_SELECT, &index.to_le_bytes());
            self.common(common::QUEUE_SIZE, &QUEUE_SIZE.to_le_bytes());
            self.common(common::QUEUE_MSIX_VECTOR, &index.to_le_bytes());
            self.common(common::QUEUE_DESC, &base.to_le_bytes());
            self.common(common::QUEUE_DRIVER, &(base + Ring::AVAIL).to_le_bytes());
            self.common(common::QUEUE_DEVICE, &(base + Ring::USED).to_le_bytes());
            self.common(common::QUEUE_ENABLE, &1u16.to_le_bytes());
        }
        self.common(common::DEVICE_STATUS, &[status::FEATURES_OK | status::DRIVER_OK]);
        (0..QUEUE_SIZE).for_each(|_| self.offer(0, &[], BUFFER));
        self.backend_up();
    }

    /// Sets `BACKEND_UP`.
    pub fn backend_up(&mut self) {
        self.write(BAR0, pci::DEVICE_CFG.offset, &device_config::BACKEND_UP.to_le_bytes());
    }

    /// Makes a buffer available without a notification: one with `bytes` for the device to read, or one of
    /// `room` bytes for the device to write.
    pub fn offer(&mut self, queue: usize, bytes: &[u8], room: u32) {
        let memory = &self.memory;
        let ring = &mut self.rings[queue];
        let slot = ring.next_avail % QUEUE_SIZE;
        let buffer = ring.base + Ring::BUFFERS + u64::from(slot) * u64::from(BUFFER);
        memory.write_slice(bytes, GuestAddress(buffer)).expect("buffer");
        let (len, flags) =
            if room > 0 { (room, 2u16) } else { (u32::try_from(bytes.len()).expect("small"), 0) };
        let mut descriptor = buffer.to_le_bytes().to_vec();
        descriptor.extend(len.to_le_bytes());
        descriptor.extend(flags.to_le_bytes());
        descriptor.extend([0; 2]);
        memory.write_slice(&descriptor, GuestAddress(ring.base + 16 * u64::from(slot))).expect("descriptor");
        let entry = ring.base + Ring::AVAIL + 4 + 2 * u64::from(slot);
        memory.write_obj(slot, GuestAddress(entry)).expect("avail ring");
        ring.next_avail = ring.next_avail.wrapping_add(1);
        memory.write_obj(ring.next_avail, GuestAddress(ring.base + Ring::AVAIL + 2)).expect("avail index");
    }

    /// Takes the next used buffer and returns the bytes that the device wrote to it.
    pub fn used(&mut self, queue: usize) -> Option<Vec<u8>> {
        let memory = &self.memory;
        let ring = &mut self.rings[queue];
        let index: u16 = memory.read_obj(GuestAddress(ring.base + Ring::USED + 2)).expect("used index");
        if index == ring.next_used {
            return None;
        }
        let entry = ring.base + Ring::USED + 4 + 8 * u64::from(ring.next_used % QUEUE_SIZE);
        let [id, length]: [u32; 2] = memory.read_obj(GuestAddress(entry)).expect("used entry");
        ring.next_used = ring.next_used.wrapping_add(1);
        let mut bytes = vec![0; usize::try_from(length).expect("small")];
        let buffer = ring.base + Ring::BUFFERS + u64::from(id) * u64::from(BUFFER);
        memory.read_slice(&mut bytes, GuestAddress(buffer)).expect("buffer");
        Some(bytes)
    }

    /// Takes all used buffers without a look at them.
    pub fn forget_used(&mut self, queue: usize) {
        let ring = &mut self.rings[queue];
        ring.next_used = self.memory.read_obj(GuestAddress(ring.base + Ring::USED + 2)).expect("used index");
    }

    /// Sends a message as the driver does.
    pub fn send(&mut self, message: &Message) {
        self.offer(1, &message.bytes, 0);
        self.notify(1);
    }

    /// Notifies the device of a queue.
    pub fn notify(&mut self, queue: u64) {
        self.write(BAR0, pci::NOTIFY_CFG.offset + queue * u64::from(pci::NOTIFY_MULTIPLIER), &[1, 0]);
    }

    /// Connects a front-end and lets the device accept it.
    pub fn connect(&mut self) -> MessageSocket {
        let stream = UnixStream::connect(self.dir.path().join("s")).expect("connect");
        self.turn();
        MessageSocket::new(stream)
    }

    /// Lets the device deal with what is ready now.
    pub fn turn(&mut self) {
        let mut ready = Ready::new();
        self.device.events().wait(Some(&Timespec::default()), &mut ready).expect("look");
        self.device.process(&self.host, &ready.function);
    }

    /// Lets the device work until it has nothing to do.
    pub fn process(&mut self) {
        for _ in 0..100 {
            self.turn();
        }
    }
}
