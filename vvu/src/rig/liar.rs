//! A vvu device that lies where a test wants it to, and is the real one everywhere else.
//!
//! Its queues are the test's: the real device never hears of a notification, and the link shows what the test set.

use std::collections::HashMap;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::local::{LocalDevice, State};
use super::vvu_device;
use crate::device::VvuDevice;
use crate::event::EventSet;
use crate::message_socket::Message;
use crate::pci::{Host, MappableBar, PciFunction};
use crate::spec::pci::{COMMON_CFG, DEVICE_CFG, DOORBELL_CFG, NOTIFY_CFG, Region, Structure};
use crate::spec::vhost_user::Header;
use crate::spec::virtio::{common, device_config, status};

/// Vectors that the driver gives its two queues; the first is that of configuration changes, too.
const VECTORS: [u16; 2] = [0, 1];

#[derive(Debug)]
pub(crate) struct Liar {
    device: VvuDevice,
    /// By byte: what a read is ANDed and then ORed with.
    lies: HashMap<(Region, u64), (u8, u8)>,
    pub(crate) link: u32,
    /// Queue notifications, as (offset in the structure, value).
    pub(crate) notified: Vec<(u64, u16)>,
    /// Doorbell writes, as (offset in the structure, value).
    pub(crate) rung: Vec<(u64, u16)>,
    selected: usize,
    queues: [DriverQueue; 2],
}

/// A virtqueue as the driver described it, and the device's side of it.
#[derive(Debug, Default)]
struct DriverQueue {
    size: u16,
    addresses: [u64; 3],
    device: Option<Queue>,
}

impl Liar {
    fn new(queues: u16) -> Self {
        Self {
            device: vvu_device(queues),
            lies: HashMap::new(),
            link: 0,
            notified: Vec::new(),
            rung: Vec::new(),
            selected: 0,
            queues: Default::default(),
        }
    }

    /// Makes reads at `offset` of `region` give `bytes`.
    pub(crate) fn pretend(&mut self, region: Region, offset: u64, bytes: &[u8]) {
        self.distort(region, offset, bytes.iter().map(|byte| (0, *byte)));
    }

    /// Makes reads of a register give `bytes`.
    pub(crate) fn pretend_register(&mut self, at: Structure, offset: u64, bytes: &[u8]) {
        self.pretend(Region::Bar(at.bar), at.offset + offset, bytes);
    }

    /// Offers, of each half of the 64 feature bits, those in `halves` alone.
    pub(crate) fn offer_only(&mut self, halves: u32) {
        let at = COMMON_CFG.offset + common::DEVICE_FEATURE;
        self.distort(Region::Bar(COMMON_CFG.bar), at, halves.to_le_bytes().into_iter().map(|byte| (byte, 0)));
    }

    /// Sets bits of the device status for good.
    pub(crate) fn stick_status(&mut self, bits: u8) {
        let at = COMMON_CFG.offset + common::DEVICE_STATUS;
        self.distort(Region::Bar(COMMON_CFG.bar), at, [(0xff, bits)].into_iter());
    }

    /// Descriptors of a queue, as the driver wrote it.
    pub(crate) fn queue_size(&self, queue: usize) -> u16 {
        self.queues[queue].size
    }

    fn distort(&mut self, region: Region, offset: u64, bytes: impl Iterator<Item = (u8, u8)>) {
        self.lies.extend((offset..).zip(bytes).map(|(at, lie)| ((region, at), lie)));
    }

    fn write_common(&mut self, at: u64, data: &[u8]) {
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(value);
        let queue = &mut self.queues[self.selected];
        match at {
            common::QUEUE_SELECT => self.selected = usize::try_from(value).expect("small"),
            common::QUEUE_SIZE => queue.size = u16::try_from(value).expect("two bytes"),
            common::QUEUE_DESC..56 => {
                let index = usize::try_from((at - common::QUEUE_DESC) / 8).expect("0 to 2");
                queue.addresses[index] |= value << (at % 8 * 8);
            }
            common::DEVICE_STATUS if value == 0 => {
                self.queues = Default::default();
                self.link = 0;
            }
            common::DEVICE_STATUS if value & u64::from(status::DRIVER_OK) != 0 => {
                self.queues.iter_mut().for_each(DriverQueue::start);
            }
            _ => {}
        }
    }
}

impl DriverQueue {
    fn start(&mut self) {
        let mut device = Queue::new(256).expect("queue");
        device.set_size(self.size);
        let [descriptors, available, used] = self.addresses.map(GuestAddress);
        device.try_set_desc_table_address(descriptors).expect("descriptors");
        device.try_set_avail_ring_address(available).expect("available ring");
        device.try_set_used_ring_address(used).expect("used ring");
        device.set_ready(true);
        self.device = Some(device);
    }
}

impl PciFunction for Liar {
    fn region_size(&self, region: Region) -> u64 {
        self.device.region_size(region)
    }

    fn vector_count(&self) -> u16 {
        self.device.vector_count()
    }

    fn mappable_bar(&self) -> Option<MappableBar<'_>> {
        self.device.mappable_bar()
    }

    fn events(&self) -> &EventSet {
        self.device.events()
    }

    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        self.device.read(region, offset, data);
        if region == Region::Bar(DEVICE_CFG.bar)
            && DEVICE_CFG.locate(DEVICE_CFG.bar, offset, data.len()) == Some(device_config::STATUS)
        {
            data.copy_from_slice(&self.link.to_le_bytes()[..data.len()]);
        }
        for (at, byte) in (offset..).zip(data) {
            let (and, or) = self.lies.get(&(region, at)).copied().unwrap_or((0xff, 0));
            *byte = *byte & and | or;
        }
    }

    fn write<H: Host>(&mut self, host: &H, region: Region, offset: u64, data: &[u8]) {
        let Region::Bar(bar) = region else { return self.device.write(host, region, offset, data) };
        let locate = |structure: Structure| structure.locate(bar, offset, data.len());
        let value = |data: &[u8]| u16::from_le_bytes([data[0], data[1]]);
        if let Some(at) = locate(NOTIFY_CFG) {
            return self.notified.push((at, value(data)));
        }
        if let Some(at) = locate(DOORBELL_CFG) {
            self.rung.push((at, value(data)));
        }
        if locate(DEVICE_CFG) == Some(device_config::STATUS) {
            let up = u32::from(data[0]) & device_config::BACKEND_UP;
            self.link = self.link & !device_config::BACKEND_UP | up;
        }
        if let Some(at) = locate(COMMON_CFG) {
            self.write_common(at, data);
        }
        self.device.write(host, region, offset, data);
    }

    fn process<H: Host>(&mut self, host: &H, ready: &[u32]) {
        self.device.process(host, ready);
    }

    fn reset(&mut self) {
        self.device.reset();
    }
}

impl LocalDevice<Liar> {
    /// A device that is honest until it is told otherwise.
    pub(crate) fn liar(queues: u16) -> Self {
        Self::new(Liar::new(queues))
    }

    /// Puts `bytes` into the next receive buffer and claims to have written `len`; false if there
    /// is no buffer.
    pub(crate) fn deliver_as(&self, bytes: &[u8], len: u32) -> bool {
        let State { function, host, .. } = &mut *self.lock();
        let queue = function.queues[0].device.as_mut().expect("DRIVER_OK");
        let Some(chain) = queue.pop_descriptor_chain(host.memory()) else { return false };
        let head = chain.head_index();
        let buffer = chain.writable().next().expect("writable descriptor");
        assert!(bytes.len() <= buffer.len() as usize);
        host.memory().write_slice(bytes, buffer.addr()).expect("buffer");
        queue.add_used(host.memory(), head, len).expect("used ring");
        host.signal(VECTORS[0]);
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
        let State { function, host, .. } = &mut *self.lock();
        let queue = function.queues[1].device.as_mut()?;
        let chain = queue.pop_descriptor_chain(host.memory())?;
        let head = chain.head_index();
        let buffer = chain.readable().next().expect("readable descriptor");
        let mut bytes = vec![0; buffer.len() as usize];
        host.memory().read_slice(&mut bytes, buffer.addr()).expect("buffer");
        queue.add_used(host.memory(), head, 0).expect("used ring");
        host.signal(VECTORS[1]);
        Some(bytes)
    }

    /// Claims `count` times in the used ring of `queue` that buffer `id` is done, true or not.
    pub(crate) fn claim_used(&self, queue: usize, id: u32, len: u32, count: u16) {
        let State { function, host, .. } = &mut *self.lock();
        let DriverQueue { size, addresses: [.., used], .. } = function.queues[queue];
        for slot in 0..u64::from(count) {
            let element = GuestAddress(used + 4 + 8 * (slot % u64::from(size)));
            let bytes = [id.to_le_bytes(), len.to_le_bytes()].concat();
            host.memory().write_slice(&bytes, element).expect("used ring");
        }
        host.memory().write_slice(&count.to_le_bytes(), GuestAddress(used + 2)).expect("used index");
    }

    pub(crate) fn interrupt(&self, vector: u16) {
        self.lock().host.signal(vector);
    }

    /// The link as the device shows it.
    pub(crate) fn link(&self) -> u32 {
        self.lock().function.link
    }

    /// The device status without lies.
    pub(crate) fn status(&self) -> u8 {
        let mut status = [0];
        let at = COMMON_CFG.offset + common::DEVICE_STATUS;
        self.lock().function.device.read(Region::Bar(COMMON_CFG.bar), at, &mut status);
        status[0]
    }

    /// Sets the link and sends a configuration interrupt.
    pub(crate) fn set_link(&self, link: u32) {
        let mut state = self.lock();
        state.function.link = link;
        state.host.signal(VECTORS[0]);
    }

    /// Lets the device lie.
    pub(crate) fn lie(&self, lie: impl FnOnce(&mut Liar)) {
        lie(&mut self.lock().function);
    }
}
