//! A vvu device in memory for tests of the driver and the bridge. It does as it is told, lies
//! included; its side of the virtqueues is the `virtio-queue` crate.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use super::pci_device::{DeviceError, DmaBuffer, PciDevice};
use crate::message_socket::Message;
use crate::spec::addr::Iova;
use crate::spec::pci::{
    self, COMMON_CFG, CONFIG_SPACE_SIZE, ConfigSpace, DEVICE_CFG, NOTIFY_CFG, Region, Structure,
    VECTOR_SELECT_CFG,
};
use crate::spec::vhost_user::Header;
use crate::spec::virtio::{common, device_config, feature, status, vector_select};

#[derive(Debug, Default)]
pub(crate) struct FakeQueue {
    pub(crate) size: u16,
    pub(crate) vector: u16,
    pub(crate) enabled: bool,
    addresses: [u64; 3],
    device: Option<Queue>,
}

/// A file-backed allocation: where the device finds it, its bytes, and its file.
type Allocation = (u64, usize, File);

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) config: [u8; CONFIG_SPACE_SIZE],
    pub(crate) offered: u64,
    pub(crate) accepted: u64,
    pub(crate) status: u8,
    /// Bits that the device sets in its status, whatever the driver writes.
    pub(crate) stuck_status: u8,
    pub(crate) queue_max: u16,
    pub(crate) queues: [FakeQueue; 2],
    pub(crate) vhost_queues: u16,
    pub(crate) link: u32,
    pub(crate) kick_vectors: Vec<u16>,
    pub(crate) doorbells: Vec<(u64, u16, EventFd)>,
    /// Queue notifications, as (offset in the structure, value).
    pub(crate) notified: Vec<(u64, u16)>,
    config_vector: u16,
    selected_queue: u16,
    selected_features: [u32; 2],
    selected_kick: u16,
    vectors: Vec<EventFd>,
    allocations: Vec<Allocation>,
    /// All allocations, as the device sees them.
    memory: GuestMemoryMmap,
}

#[derive(Clone, Debug)]
pub(crate) struct FakeDevice {
    state: Arc<Mutex<State>>,
    shared: Arc<File>,
}

fn memfd(len: u64) -> File {
    let fd = memfd_create("fake", MemfdFlags::CLOEXEC).expect("memfd");
    ftruncate(&fd, len).expect("size of memfd");
    fd.into()
}

impl FakeDevice {
    /// Size of the shared memory BAR.
    pub(crate) const MEMORY: u64 = 1 << 20;

    pub(crate) fn new(vhost_queues: u16) -> Self {
        let state = State {
            config: ConfigSpace::new(pci::vector_count(vhost_queues), Self::MEMORY).bytes,
            offered: feature::OFFERED,
            accepted: 0,
            status: 0xff,
            stuck_status: 0,
            queue_max: 256,
            queues: Default::default(),
            vhost_queues,
            link: 0,
            kick_vectors: vec![0xffff; vhost_queues.into()],
            doorbells: Vec::new(),
            notified: Vec::new(),
            config_vector: 0xffff,
            selected_queue: 0,
            selected_features: [0; 2],
            selected_kick: 0,
            vectors: Vec::new(),
            allocations: Vec::new(),
            memory: GuestMemoryMmap::new(),
        };
        Self { state: Arc::new(Mutex::new(state)), shared: Arc::new(memfd(Self::MEMORY)) }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // A test that failed while it held the lock still drops its driver.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn shared(&self) -> &File {
        &self.shared
    }

    pub(crate) fn bar_size(bar: u8) -> u64 {
        match bar {
            pci::REGISTER_BAR => pci::REGISTER_BAR_SIZE,
            pci::NOTIFY_BAR => pci::NOTIFY_BAR_SIZE,
            pci::SHARED_MEMORY_BAR => Self::MEMORY,
            _ => 0,
        }
    }

    /// Puts `bytes` into the next receive buffer and claims to have written `len`; false if there
    /// is no buffer.
    pub(crate) fn deliver_as(&self, bytes: &[u8], len: u32) -> bool {
        let mut state = self.state();
        let memory = state.memory.clone();
        let queue = state.queues[0].device.as_mut().expect("DRIVER_OK");
        let Some(chain) = queue.pop_descriptor_chain(&memory) else { return false };
        let head = chain.head_index();
        let buffer = chain.writable().next().expect("writable descriptor");
        assert!(bytes.len() <= buffer.len() as usize);
        memory.write_slice(bytes, buffer.addr()).expect("buffer");
        queue.add_used(&memory, head, len).expect("used ring");
        state.signal(state.queues[0].vector);
        true
    }

    pub(crate) fn deliver(&self, bytes: &[u8]) -> bool {
        self.deliver_as(bytes, u32::try_from(bytes.len()).expect("small message"))
    }

    /// Delivers a front-end's message.
    pub(crate) fn request(&self, request: u32, flags: u32, payload: &[u8]) {
        let size = u32::try_from(payload.len()).expect("small payload");
        assert!(self.deliver(&Message::new(Header { request, flags, size }, payload).bytes));
    }

    /// What the driver sent since the last time, completed at once.
    pub(crate) fn sent(&self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.sent_next()).collect()
    }

    /// Completes the oldest message that the driver sent.
    pub(crate) fn sent_next(&self) -> Option<Vec<u8>> {
        let mut state = self.state();
        let memory = state.memory.clone();
        let queue = state.queues[1].device.as_mut()?;
        let chain = queue.pop_descriptor_chain(&memory)?;
        let head = chain.head_index();
        let buffer = chain.readable().next().expect("readable descriptor");
        let mut bytes = vec![0; buffer.len() as usize];
        memory.read_slice(&mut bytes, buffer.addr()).expect("buffer");
        queue.add_used(&memory, head, 0).expect("used ring");
        state.signal(state.queues[1].vector);
        Some(bytes)
    }

    /// Claims `count` times in the used ring of `queue` that buffer `id` is done, true or not.
    pub(crate) fn claim_used(&self, queue: usize, id: u32, len: u32, count: u16) {
        let state = self.state();
        let memory = state.memory.clone();
        let FakeQueue { size, addresses: [.., used], .. } = state.queues[queue];
        for slot in 0..u64::from(count) {
            let element = GuestAddress(used + 4 + 8 * (slot % u64::from(size)));
            memory.write_slice(&[id.to_le_bytes(), len.to_le_bytes()].concat(), element).expect("used ring");
        }
        memory.write_slice(&count.to_le_bytes(), GuestAddress(used + 2)).expect("used index");
    }

    pub(crate) fn interrupt(&self, vector: u16) {
        self.state().signal(vector);
    }

    /// Sets the link status and sends a configuration interrupt.
    pub(crate) fn set_link(&self, link: u32) {
        let mut state = self.state();
        state.link = link;
        state.signal(state.config_vector);
    }
}

impl State {
    fn map(&mut self) {
        let range = |(iova, len, file): &Allocation| {
            let file = FileOffset::new(file.try_clone().expect("dup"), 0);
            (GuestAddress(*iova), *len, Some(file))
        };
        let ranges = self.allocations.iter().map(range);
        self.memory = GuestMemoryMmap::from_ranges_with_files(ranges).expect("memory");
    }

    fn signal(&self, vector: u16) {
        if let Some(event) = self.vectors.get(usize::from(vector)) {
            event.write(1).expect("eventfd");
        }
    }

    fn selected(&mut self) -> &mut FakeQueue {
        &mut self.queues[usize::from(self.selected_queue)]
    }

    fn read_common(&mut self, offset: u64) -> u64 {
        match offset {
            common::DEVICE_FEATURE => self.offered >> (32 * self.selected_features[0]) & 0xffff_ffff,
            common::CONFIG_MSIX_VECTOR => self.config_vector.into(),
            common::DEVICE_STATUS => (self.status | self.stuck_status).into(),
            common::QUEUE_SIZE => match self.selected().size {
                0 => self.queue_max.into(),
                size => size.into(),
            },
            common::QUEUE_MSIX_VECTOR => self.selected().vector.into(),
            common::QUEUE_NOTIFY_OFF => u64::from(self.selected_queue) + 1,
            _ => 0,
        }
    }

    fn write_common(&mut self, offset: u64, value: u32) {
        let low16 = (value & 0xffff) as u16;
        match offset {
            common::DEVICE_FEATURE_SELECT => self.selected_features[0] = value,
            common::DRIVER_FEATURE_SELECT => self.selected_features[1] = value,
            common::DRIVER_FEATURE => self.accepted |= u64::from(value) << (32 * self.selected_features[1]),
            common::CONFIG_MSIX_VECTOR => self.config_vector = low16,
            common::DEVICE_STATUS => self.write_status((value & 0xff) as u8),
            common::QUEUE_SELECT => self.selected_queue = low16,
            common::QUEUE_SIZE => self.selected().size = low16,
            common::QUEUE_MSIX_VECTOR => self.selected().vector = low16,
            common::QUEUE_ENABLE => self.selected().enabled = low16 == 1,
            common::QUEUE_DESC..56 => {
                let index = usize::try_from((offset - common::QUEUE_DESC) / 8).expect("0 to 2");
                self.selected().addresses[index] |= u64::from(value) << ((offset % 8) * 8);
            }
            _ => panic!("write to common configuration at {offset}"),
        }
    }

    fn write_status(&mut self, value: u8) {
        self.status = value;
        if value == 0 {
            self.queues = Default::default();
            self.accepted = 0;
            self.link = 0;
        }
        if value & status::DRIVER_OK != 0 {
            for queue in &mut self.queues {
                assert!(queue.enabled);
                let mut device = Queue::new(256).expect("queue");
                device.set_size(queue.size);
                let [descriptors, available, used] = queue.addresses.map(GuestAddress);
                device.try_set_desc_table_address(descriptors).expect("descriptors");
                device.try_set_avail_ring_address(available).expect("available ring");
                device.try_set_used_ring_address(used).expect("used ring");
                device.set_ready(true);
                queue.device = Some(device);
            }
        }
    }
}

fn within(structure: Structure, bar: u8, offset: u64, len: usize) -> Option<u64> {
    structure.locate(bar, offset, len)
}

impl PciDevice for FakeDevice {
    fn region_size(&self, region: Region) -> u64 {
        match region {
            Region::Bar(bar) => Self::bar_size(bar),
            Region::Config => 256,
        }
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        let mut state = self.state();
        let Region::Bar(bar) = region else {
            let offset = usize::try_from(offset).expect("offset");
            data.copy_from_slice(&state.config[offset..][..data.len()]);
            return Ok(());
        };
        let value = if let Some(at) = within(COMMON_CFG, bar, offset, data.len()) {
            state.read_common(at)
        } else if let Some(at) = within(DEVICE_CFG, bar, offset, data.len()) {
            match at {
                device_config::STATUS => state.link.into(),
                device_config::MAX_VHOST_QUEUES => state.vhost_queues.into(),
                _ => 0,
            }
        } else {
            match within(VECTOR_SELECT_CFG, bar, offset, data.len()) {
                Some(vector_select::SELECT) => state.selected_kick.into(),
                Some(_) => state.kick_vectors[usize::from(state.selected_kick)].into(),
                None => panic!("read of {} bytes at {offset:#x} of {region:?}", data.len()),
            }
        };
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
        Ok(())
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let mut state = self.state();
        let Region::Bar(bar) = region else {
            let offset = usize::try_from(offset).expect("offset");
            state.config[offset..][..data.len()].copy_from_slice(data);
            return Ok(());
        };
        let mut value = [0; 4];
        value[..data.len()].copy_from_slice(data);
        let value = u32::from_le_bytes(value);
        let low16 = (value & 0xffff) as u16;
        if let Some(at) = within(COMMON_CFG, bar, offset, data.len()) {
            state.write_common(at, value);
        } else if let Some(at) = within(NOTIFY_CFG, bar, offset, data.len()) {
            state.notified.push((at, low16));
        } else if within(DEVICE_CFG, bar, offset, data.len()) == Some(device_config::STATUS) {
            state.link = state.link & !device_config::BACKEND_UP | value & device_config::BACKEND_UP;
        } else {
            match within(VECTOR_SELECT_CFG, bar, offset, data.len()) {
                Some(vector_select::SELECT) => state.selected_kick = low16,
                Some(_) => {
                    let queue = usize::from(state.selected_kick);
                    state.kick_vectors[queue] = low16;
                }
                None => panic!("write of {} bytes at {offset:#x} of {region:?}", data.len()),
            }
        }
        Ok(())
    }

    fn bar_file(&self, bar: u8) -> Result<File, DeviceError> {
        assert_eq!(bar, pci::SHARED_MEMORY_BAR);
        Ok(self.shared.try_clone().expect("dup"))
    }

    fn allocate_dma(&self, len: usize) -> Result<DmaBuffer, DeviceError> {
        let mut state = self.state();
        let iova = 0x10_0000 * (1 + state.allocations.len() as u64);
        let file = memfd(len as u64);
        let offset = FileOffset::new(file.try_clone().expect("dup"), 0);
        let memory = MmapRegion::from_file(offset, len)
            .map_err(|e| DeviceError::Io { what: "mmap".to_owned(), source: io::Error::other(e) })?;
        state.allocations.push((iova, len, file));
        state.map();
        Ok(DmaBuffer { memory, iova: Iova(iova) })
    }

    fn enable_msix(&self, vectors: &[&EventFd]) -> Result<(), DeviceError> {
        let clone = |event: &&EventFd| event.try_clone().expect("dup");
        self.state().vectors = vectors.iter().map(clone).collect();
        Ok(())
    }

    fn bind_doorbell(&self, bar: u8, offset: u64, value: u16, event: &EventFd) -> Result<(), DeviceError> {
        assert_eq!(bar, pci::NOTIFY_BAR);
        self.state().doorbells.push((offset, value, event.try_clone().expect("dup")));
        Ok(())
    }
}
