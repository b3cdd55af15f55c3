//! The device of one connection: takes requests off its queues, carries them out, answers.

use std::io;
use std::num::Wrapping;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringState, VringT};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap,
    Permissions,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use super::config::{self, QUEUE_SIZE_MAX};
use super::disk::{Disk, SECTOR_SIZE};
use super::request::{Malformed, Rejected, Request, Segments};
use crate::backend::inflight::{self, Inflight, RegionError, Tracker, TrackerError};
use crate::backend::poll::Poll;
use crate::backend::server::ExitEvents;
use crate::backend::vring::Vring;

mod ranges;

type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

/// Why a request fails.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Malformed(#[from] Malformed),
    #[error("disk: {0}")]
    Disk(#[from] io::Error),
    #[error("{len} bytes at sector {sector} of a disk of {sectors} sectors")]
    Range { sector: u64, len: u64, sectors: u64 },
    #[error("{0} bytes of data")]
    Size(u64),
    #[error("change of a read-only disk")]
    ReadOnly,
    #[error("unknown request or flag")]
    Unsupported,
}

/// Why a queue is of no further use.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Rings(#[from] virtio_queue::Error),
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error(transparent)]
    Tracker(#[from] TrackerError),
}

/// What [`Device::take`] found in a queue.
enum Taken {
    Chain(Chain),
    Nothing,
    /// The front-end stopped the queue.
    Stopped,
}

/// What a queue's thread needs, and holds while it is at work.
struct Queue {
    /// Where requests in flight are written down, if the front-end wants that.
    tracker: Option<Tracker>,
    poll: Poll,
}

/// A block device for one front-end.
pub(super) struct Device {
    disk: Arc<Disk>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    inflight: Arc<Inflight>,
    queues: Vec<Mutex<Queue>>,
    /// There is no front-end any longer.
    gone: Arc<AtomicBool>,
    /// The driver cannot flush, so each write has to be durable (virtio 1.2, 5.2.6.2).
    write_through: AtomicBool,
    /// The first failure of the disk was logged.
    disk_failed: AtomicBool,
    exit_events: ExitEvents,
}

impl Device {
    pub(super) fn new(
        disk: Arc<Disk>,
        queues: u16,
        poll: Duration,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        inflight: Arc<Inflight>,
        gone: Arc<AtomicBool>,
    ) -> Self {
        let queue = |_| Mutex::new(Queue { tracker: None, poll: Poll::new(poll) });
        Self {
            disk,
            memory,
            inflight,
            queues: (0..queues).map(queue).collect(),
            gone,
            write_through: AtomicBool::new(true),
            disk_failed: AtomicBool::new(false),
            exit_events: ExitEvents::default(),
        }
    }

    /// Locks queue `index` while its thread is at rest.
    fn queue(&self, index: usize) -> Option<MutexGuard<'_, Queue>> {
        self.queues.get(index).map(|queue| queue.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// When the front-end has just started the queue: begins to track its requests, and finishes those
    /// that an earlier back-end has left unfinished.
    fn start(&self, index: usize, vring: &Vring, tracker: &mut Option<Tracker>) -> Result<(), Broken> {
        let chains = {
            let mut state = vring.get_mut();
            if !is_running(&state) || !vring.take_start() {
                return Ok(());
            }
            let queue = state.get_queue_mut();
            let memory = self.memory.memory();
            let used = queue.used_idx(&*memory, Ordering::Acquire)?;
            if used.0 != 0 {
                // The back-end before may have ended between giving something back and saying so.
                signal(vring);
            }
            *tracker = self.inflight.tracker(index, queue.size())?;
            let Some(tracker) = tracker else { return Ok(()) };
            let available = queue.avail_idx(&*memory, Ordering::Acquire)?;
            let Some(heads) = tracker.recover(used.0, available.0)? else { return Ok(()) };
            // Whatever index the front-end knows: what is neither used nor in flight was not taken.
            let taken = u16::try_from(heads.len()).map_err(|_| virtio_queue::Error::InvalidAvailRingIndex)?;
            queue.set_next_used(used.0);
            queue.set_next_avail((used + Wrapping(taken)).0);
            if !heads.is_empty() {
                log::info!("queue {index}: {taken} unfinished requests are carried out again");
            }
            inflight::chains(&memory, queue, &heads)?
        };
        // They were in flight all the time, so they are finished even if the queue is stopped now.
        for chain in chains {
            let head = chain.head_index();
            let used = self.answer(chain.memory(), Request::parse(chain.clone()));
            give_back(vring, tracker.as_mut(), head, used)?;
            self.announce(vring)?;
        }
        Ok(())
    }

    /// Carries out requests until there are none or the front-end stops the queue.
    fn process(&self, vring: &Vring, Queue { tracker, poll }: &mut Queue) -> Result<(), Broken> {
        while is_running(&vring.get_ref()) {
            vring.disable_notification()?;
            let mut unannounced = false;
            let more = loop {
                let chain = match self.take(vring)? {
                    Taken::Chain(chain) => chain,
                    Taken::Nothing => break true,
                    Taken::Stopped => break false,
                };
                let head = chain.head_index();
                if let Some(tracker) = tracker {
                    tracker.begin(head)?;
                }
                let memory = chain.memory();
                let request = Request::parse(chain.clone());
                if unannounced && request.as_ref().is_ok_and(is_slow) {
                    self.announce(vring)?;
                }
                let used = self.answer(memory, request);
                give_back(vring, tracker.as_mut(), head, used)?;
                unannounced = true;
            };
            if unannounced {
                self.announce(vring)?;
            }
            if !more {
                break;
            }
            if poll.sees_more(vring, &self.memory, &self.gone)? {
                continue;
            }
            // What comes from here on is told, and what came before is seen.
            if !vring.enable_notification()? {
                break;
            }
        }
        Ok(())
    }

    /// Takes the next chain that the driver made available.
    fn take(&self, vring: &Vring) -> Result<Taken, virtio_queue::Error> {
        let memory = self.memory.memory();
        let mut state = vring.get_mut();
        if !is_running(&state) || self.gone.load(Ordering::Relaxed) {
            return Ok(Taken::Stopped);
        }
        let queue = state.get_queue_mut();
        if queue.avail_idx(&*memory, Ordering::Acquire)? == Wrapping(queue.next_avail()) {
            return Ok(Taken::Nothing);
        }
        let chain = queue.iter(memory)?.next();
        chain.map(Taken::Chain).ok_or(virtio_queue::Error::InvalidAvailRingIndex)
    }

    /// Tells the driver of used chains, if it wants to know.
    fn announce(&self, vring: &Vring) -> Result<(), virtio_queue::Error> {
        let wanted = {
            let mut state = vring.get_mut();
            let queue = state.get_queue();
            // Needed in the crate's stead, which looks at the event index only.
            let suppressed = !queue.event_idx_enabled() && {
                let flags: u16 = self
                    .memory
                    .memory()
                    .load(GuestAddress(queue.avail_ring()), Ordering::Acquire)
                    .map_err(virtio_queue::Error::GuestMemory)?;
                u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0
            };
            !suppressed && state.needs_notification()?
        };
        if wanted {
            signal(vring);
        }
        Ok(())
    }

    /// Carries a request out, writes its status, and returns how many bytes were written in all.
    fn answer(&self, memory: &GuestMemoryMmap, request: Result<Request, Rejected>) -> u32 {
        let (status_addr, result) = match request {
            Ok(request) => (Some(request.status), self.execute(memory, &request)),
            Err(Rejected { reason, status }) => (status, Err(reason.into())),
        };
        let (status, written) = match result {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(failure) => {
                // A guest must not be able to fill the log, be it with a full disk.
                let loud =
                    matches!(failure, Failure::Disk(_)) && !self.disk_failed.swap(true, Ordering::Relaxed);
                log::log!(
                    if loud { log::Level::Warn } else { log::Level::Debug },
                    "request failed: {failure}"
                );
                let unsupported = matches!(failure, Failure::Unsupported);
                (if unsupported { VIRTIO_BLK_S_UNSUPP } else { VIRTIO_BLK_S_IOERR }, 0)
            }
        };
        let [status, ..] = status.to_le_bytes();
        let placed = status_addr.is_some_and(|addr| memory.write_obj(status, addr).is_ok());
        if placed { written + 1 } else { 0 }
    }

    /// Carries a request out and returns how many bytes of data were written to the guest.
    fn execute(&self, memory: &GuestMemoryMmap, request: &Request) -> Result<u32, Failure> {
        match request.kind {
            VIRTIO_BLK_T_IN => {
                let offset = self.range(request.sector, &request.output)?;
                // Room for the status must remain in the used length.
                let len = request.output.len();
                let written = u32::try_from(len).ok().filter(|len| *len < u32::MAX);
                let written = written.ok_or(Failure::Size(len))?;
                self.disk.read(offset, &request.output.slices(memory, Permissions::Write)?)?;
                Ok(written)
            }
            VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                let offset = self.range(request.sector, &request.input)?;
                self.disk.write(offset, &request.input.slices(memory, Permissions::Read)?)?;
                self.written_through()
            }
            VIRTIO_BLK_T_FLUSH => {
                self.disk.flush()?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                let written = request.output.write(memory, self.disk.serial())?;
                Ok(u32::try_from(written).unwrap_or(0))
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.check_writable()?;
                for range in self.ranges(memory, request)? {
                    let ranges::Range { offset, len, unmap } = range;
                    if request.kind == VIRTIO_BLK_T_DISCARD {
                        self.disk.discard(offset, len)?;
                    } else {
                        self.disk.write_zeroes(offset, len, unmap)?;
                    }
                }
                self.written_through()
            }
            _ => Err(Failure::Unsupported),
        }
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.disk.is_read_only() { Err(Failure::ReadOnly) } else { Ok(()) }
    }

    fn written_through(&self) -> Result<u32, Failure> {
        if self.write_through.load(Ordering::Relaxed) {
            self.disk.flush()?;
        }
        Ok(0)
    }

    /// Offset in bytes of `sector`, if `data` from there on is on the disk.
    fn range(&self, sector: u64, data: &Segments) -> Result<u64, Failure> {
        let len = data.len();
        if !len.is_multiple_of(SECTOR_SIZE.into()) {
            return Err(Failure::Size(len));
        }
        self.offset(sector, len)
    }

    fn offset(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR_SIZE.into());
        let inside = |offset: &u64| offset.checked_add(len).is_some_and(|end| end <= self.disk.size());
        let sectors = self.disk.sectors();
        offset.filter(inside).ok_or(Failure::Range { sector, len, sectors })
    }
}

/// Puts a request that is done into the used ring.
fn give_back(vring: &Vring, tracker: Option<&mut Tracker>, head: u16, used: u32) -> Result<(), Broken> {
    let Some(tracker) = tracker else { return Ok(vring.add_used(head, used)?) };
    tracker.finish(head)?;
    vring.add_used(head, used)?;
    Ok(tracker.forget()?)
}

/// Interrupts the driver.
fn signal(vring: &Vring) {
    if let Err(error) = vring.signal_used_queue() {
        log::warn!("cannot signal the call event: {error}");
    }
}

/// Whether the front-end has started and enabled the queue.
fn is_running(state: &VringState) -> bool {
    state.is_enabled() && state.get_queue().ready()
}

/// Whether earlier requests should not have to wait for this one to be announced.
fn is_slow(request: &Request) -> bool {
    !matches!(request.kind, VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_GET_ID)
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queues.len()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE_MAX.into()
    }

    fn features(&self) -> u64 {
        config::features(&self.disk)
    }

    fn acked_features(&self, features: u64) {
        self.write_through.store(features & 1 << VIRTIO_BLK_F_FLUSH == 0, Ordering::Relaxed);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        config::protocol_features()
    }

    fn reset_device(&self) {
        for index in 0..self.queues.len() {
            drop(self.queue(index));
        }
        self.write_through.store(true, Ordering::Relaxed);
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let queues = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        config::read(&self.disk, queues, offset, size)
    }

    fn set_config(&self, offset: u32, _data: &[u8]) -> io::Result<()> {
        // No field is the driver's to write, and an error would cost it the connection.
        log::debug!("front-end wrote to offset {offset} of the configuration, which is read-only");
        Ok(())
    }

    fn update_memory(&self, _memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues.len()).map(|index| 1 << index).collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.exit_events.create()
    }

    fn stop_vring(&self, index: u32) -> io::Result<()> {
        // The queue was marked as stopped, so its thread is done after the request it is at.
        drop(usize::try_from(index).ok().and_then(|index| self.queue(index)));
        Ok(())
    }

    fn handle_event(&self, _event: u16, _set: EventSet, vrings: &[Vring], thread: usize) -> io::Result<()> {
        // Each thread has the one queue of its own number. An error here would end the thread.
        if let (Some(vring), Some(mut queue)) = (vrings.first(), self.queue(thread)) {
            let started = self.start(thread, vring, &mut queue.tracker);
            if let Err(error) = started.and_then(|()| self.process(vring, &mut queue)) {
                log::warn!("queue {thread} is stopped, since its rings are broken: {error}");
                vring.set_queue_ready(false);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "device_test.rs"]
mod tests;
