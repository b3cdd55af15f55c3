//! Answers the requests of one front-end (vhost-user, "Front-end message types").

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::device::Device;
use super::inflight::{self, FileId, Limits, Region};
use super::memory::{Memory, REGIONS_MAX};
use super::queue::Queue;
use super::ring::QUEUE_SIZE_MAX;
use super::worker::Worker;
use crate::pci::DirectDoorbells;
use crate::shortage::is_shortage;

/// The features that the queue engine and this handler add to those of the device.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::CONFIG
    .union(VhostUserProtocolFeatures::MQ)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD);

/// The state of one front-end's device. An error in answer to a request ends the connection.
pub(super) struct Handler {
    device: Arc<dyn Device>,
    window: Duration,
    /// What the queues ring in place of their call events.
    doorbells: Option<Arc<DirectDoorbells>>,
    /// A file that in-flight regions may be in, although it can be made shorter.
    lasting: Option<FileId>,
    owned: bool,
    /// Virtio features that the front-end has set.
    features: Option<u64>,
    memory: Memory,
    region: Option<Arc<Region>>,
    /// One entry for each queue of the device, `None` until the front-end says something about the queue.
    workers: Vec<Option<Worker>>,
}

impl Handler {
    /// A handler for `device`, whose queues poll for `window`.
    pub(super) fn new(device: Arc<dyn Device>, window: Duration) -> Self {
        let workers = (0..device.queues()).map(|_| None).collect();
        Self {
            device,
            window,
            doorbells: None,
            lasting: None,
            owned: false,
            features: None,
            memory: Memory::default(),
            region: None,
            workers,
        }
    }

    /// Makes the queues ring `doorbells` where they have one.
    pub(super) fn with_doorbells(self, doorbells: Option<Arc<DirectDoorbells>>) -> Self {
        Self { doorbells, ..self }
    }

    /// Takes in-flight regions in `file`, which nobody makes shorter.
    pub(super) fn with_lasting(self, file: Option<FileId>) -> Self {
        Self { lasting: file, ..self }
    }

    /// Ends the queues' threads. Requests that have been begun are finished first.
    pub(super) fn end(&mut self) {
        self.workers.clear();
    }

    fn features(&self) -> u64 {
        self.device.features() | FEATURES
    }

    fn limits(&self) -> Limits {
        Limits { queues: self.device.queues(), queue_size: QUEUE_SIZE_MAX }
    }

    fn worker(&mut self, index: u32) -> Result<&Worker> {
        let index = u16::try_from(index).map_err(|_| Error::InvalidParam)?;
        if self.workers.get(usize::from(index)).ok_or(Error::InvalidParam)?.is_none() {
            let worker = Worker::start(index, Arc::clone(&self.device), self.window).map_err(failed)?;
            worker.change(|queue| {
                queue.memory = Arc::clone(self.memory.guest());
                queue.region.clone_from(&self.region);
                queue.doorbells.clone_from(&self.doorbells);
                self.configure(queue);
            });
            self.workers[usize::from(index)] = Some(worker);
        }
        self.workers[usize::from(index)].as_ref().ok_or(Error::InvalidParam)
    }

    /// Applies the features to a queue. Without `VHOST_USER_F_PROTOCOL_FEATURES` queues need not be enabled
    /// (vhost-user, "Ring states").
    fn configure(&self, queue: &mut Queue) {
        let Some(features) = self.features else { return };
        queue.ring.event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        queue.enabled |= features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
    }

    fn change<T>(&mut self, index: u32, change: impl FnOnce(&mut Queue) -> T) -> Result<T> {
        Ok(self.worker(index)?.change(change))
    }

    fn change_all(&self, change: impl Fn(&mut Queue)) {
        self.workers.iter().flatten().for_each(|worker| worker.change(&change));
    }

    /// Warns of a queue that is too short for the driver's requests. The driver would not even make such a request
    /// available, but wait until there is room for it.
    fn check_size(&self, index: u8, size: u16) {
        let want = self.device.descriptors_max();
        let indirect = self.features.unwrap_or(0) & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0;
        if !indirect && size < want {
            log::warn!(
                "queue {index} has {size} descriptors and its driver no indirect ones: it waits for ever with a \
                 request of up to {want}; want a larger queue-size, indirect_desc=on or --seg-max {}",
                size.saturating_sub(2).max(1)
            );
        }
    }

    fn set_memory(&mut self, memory: Memory) {
        self.change_all(|queue| queue.memory = Arc::clone(memory.guest()));
        self.memory = memory;
    }
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.owned, true) {
            return Err(Error::InvalidOperation("this connection has set an owner before"));
        }
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        (self.owned, self.features) = (false, None);
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.change_all(|queue| {
            queue.stop();
            queue.enabled = false;
        });
        self.features = None;
        self.device.set_features(0);
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.features() != 0 {
            return Err(Error::InvalidParam);
        }
        // The front-end clears it unless the driver's addresses have to be translated.
        if features & 1 << VIRTIO_F_ACCESS_PLATFORM != 0 {
            return Err(failed(
                "the front-end's VM has an IOMMU of its own, whose addresses this back-end does not translate: \
                 set iommu_platform=off",
            ));
        }
        self.features = Some(features);
        self.device.set_features(features);
        self.change_all(|queue| self.configure(queue));
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.set_memory(Memory::from_table(table, files).map_err(failed)?);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        let valid = |size: &u16| size.is_power_of_two() && *size <= QUEUE_SIZE_MAX;
        let size = u16::try_from(size).ok().filter(valid).ok_or_else(|| {
            failed(format!("queue of {size} descriptors: want a power of two up to {QUEUE_SIZE_MAX}"))
        })?;
        self.change(index, |queue| queue.ring.size = size)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let place = |user| self.memory.guest_address(user).map_err(failed);
        let (descriptors, available, used) = (place(descriptors)?, place(available)?, place(used)?);
        // virtio 1.2, 2.7.
        if !descriptors.0.is_multiple_of(16) || !available.0.is_multiple_of(2) || !used.0.is_multiple_of(4) {
            return Err(failed("the address of a ring is not aligned"));
        }
        self.change(index, |queue| {
            (queue.ring.descriptors, queue.ring.available, queue.ring.used) = (descriptors, available, used);
        })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.change(index, |queue| queue.ring.next_available = base)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.worker(index)?.set_kick(None).map_err(failed)?;
        let base = self.change(index, |queue| {
            queue.stop();
            queue.call = None;
            queue.ring.next_available
        })?;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, event: Option<File>) -> Result<()> {
        let starts = event.is_some();
        match self.worker(index.into())?.set_kick(event) {
            Ok(()) if starts => {
                let size = self.change(index.into(), |queue| {
                    queue.start();
                    queue.ring.size
                })?;
                self.check_size(index, size);
                Ok(())
            }
            Ok(()) => Ok(()),
            Err(error) if is_shortage(&error) => Err(failed(error)),
            Err(error) => {
                log::warn!("queue {index}: the front-end's kick event cannot be waited for: {error}");
                Ok(())
            }
        }
    }

    fn set_vring_call(&mut self, index: u8, event: Option<File>) -> Result<()> {
        self.change(index.into(), |queue| queue.call = event)
    }

    fn set_vring_err(&mut self, index: u8, _event: Option<File>) -> Result<()> {
        self.worker(index.into()).map(drop)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        // QEMU takes VIRTIO_F_ACCESS_PLATFORM only from a back-end that can ask for translations.
        let platform = self.features() & 1 << VIRTIO_F_ACCESS_PLATFORM != 0;
        let more = if platform {
            VhostUserProtocolFeatures::BACKEND_REQ
        } else {
            VhostUserProtocolFeatures::empty()
        };
        Ok(PROTOCOL_FEATURES | more)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.device.queues().into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.change(index, |queue| queue.enabled = enable)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(self.device.config(offset, size))
    }

    fn set_config(&mut self, offset: u32, _data: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        // A driver that writes to a read-only field should not cost its VM the connection.
        log::debug!("the front-end wrote to offset {offset} of the configuration, which is read-only");
        Ok(())
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        match inflight::create(asked, self.limits()) {
            Ok(made) => Ok(made),
            Err(error) => {
                log::warn!("no in-flight tracking: {error}");
                // A size of 0 says that there is no region. The answer has a file all the same.
                Ok((VhostUserInflight::default(), inflight::no_file().map_err(failed)?))
            }
        }
    }

    fn set_inflight_fd(&mut self, description: &VhostUserInflight, file: File) -> Result<()> {
        let region = Arc::new(Region::open(description, file, self.limits(), self.lasting).map_err(failed)?);
        self.change_all(|queue| queue.region = Some(Arc::clone(&region)));
        self.region = Some(region);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(REGIONS_MAX.into())
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.set_memory(self.memory.with_region(region, file).map_err(failed)?);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.set_memory(self.memory.without_region(region).map_err(failed)?);
        Ok(())
    }

    // Requests of protocol features that are not offered.

    fn set_gpu_socket(&mut self, _socket: GpuBackend) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shared_object(&mut self, _object: VhostUserSharedMsg) -> Result<File> {
        Err(NOT_OFFERED)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(NOT_OFFERED)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(NOT_OFFERED)
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(NOT_OFFERED)
    }
}

const NOT_OFFERED: Error = Error::InvalidOperation("its protocol feature is not offered");

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}
