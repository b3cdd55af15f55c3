//! A queue as vhost-user-backend sees it, hardened against what front-ends may do with its events.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::ReadWriteFlags;
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};

use super::server::Memory;

/// A queue with its kick and call events.
///
/// What the crate watches in place of the kick event is an epoll instance that lives as long as the
/// queue runs, with the kick event inside. So a second `SET_VRING_KICK` takes effect at once and the
/// event it replaces is dead, even if other processes keep it open; and no event that a front-end
/// provides is ever read or written in a way that could block.
#[derive(Clone)]
pub(super) struct Vring {
    ring: VringMutex<Memory>,
    events: Arc<Mutex<Events>>,
    started: Arc<AtomicBool>,
}

#[derive(Default)]
struct Events {
    kick: Option<Kick>,
    call: Option<File>,
}

struct Kick {
    epoll: OwnedFd,
    event: File,
}

const NO_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

impl Kick {
    fn new(event: File) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        watch(&epoll, &event)?;
        Ok(Self { epoll, event })
    }

    /// Goes over to `event`. A kick that arrived at the old one is passed on.
    fn replace(&mut self, event: File) -> io::Result<()> {
        epoll::delete(&self.epoll, &self.event)?;
        watch(&self.epoll, &event)?;
        self.event = event;
        signal(&self.event)
    }

    fn consume(&self) -> io::Result<()> {
        let mut ready = Vec::with_capacity(1);
        epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut ready), Some(&NO_WAIT))?;
        // The event is edge-triggered, so this is just manners and may fail.
        let _ = rustix::io::preadv2(
            &self.event,
            &mut [IoSliceMut::new(&mut [0; 8])],
            u64::MAX,
            ReadWriteFlags::NOWAIT,
        );
        Ok(())
    }
}

fn watch(epoll: &OwnedFd, event: &File) -> io::Result<()> {
    Ok(epoll::add(epoll, event, EventData::new_u64(0), EventFlags::IN | EventFlags::ET)?)
}

/// Signals an eventfd. One that cannot take more is signalled already.
fn signal(event: &File) -> io::Result<()> {
    let mut fds = [PollFd::new(event, PollFlags::OUT)];
    rustix::event::poll(&mut fds, Some(&NO_WAIT))?;
    if fds[0].revents().contains(PollFlags::OUT) {
        rustix::io::write(event, &1u64.to_ne_bytes())?;
    }
    Ok(())
}

impl Vring {
    /// Whether the front-end has started the ring since this was asked last.
    pub(super) fn take_start(&self) -> bool {
        self.started.swap(false, Ordering::Relaxed)
    }

    fn events(&self) -> MutexGuard<'_, Events> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `event` the kick event, and returns what the crate is to watch if that is new.
    fn change_kick(&self, event: Option<File>) -> io::Result<Option<OwnedFd>> {
        let mut events = self.events();
        match (event, &mut events.kick) {
            (None, kick) => {
                *kick = None;
                Ok(None)
            }
            (Some(event), Some(kick)) => {
                kick.replace(event)?;
                Ok(None)
            }
            (Some(event), kick) => {
                let new = Kick::new(event)?;
                let watched = new.epoll.try_clone()?;
                *kick = Some(new);
                Ok(Some(watched))
            }
        }
    }
}

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl VringT<Memory> for Vring {
    fn new(mem: Memory, max_queue_size: u16) -> Result<Self, virtio_queue::Error> {
        let ring = VringMutex::new(mem, max_queue_size)?;
        Ok(Self { ring, events: Arc::default(), started: Arc::default() })
    }

    fn set_kick(&self, file: Option<File>) {
        let none = file.is_none();
        match self.change_kick(file) {
            Ok(Some(watched)) => self.ring.set_kick(Some(watched.into())),
            Ok(None) if none => self.ring.set_kick(None),
            Ok(None) => {}
            Err(error) => log::warn!("front-end sent a kick event that cannot be waited for: {error}"),
        }
    }

    fn read_kick(&self) -> io::Result<bool> {
        if let Some(kick) = &self.events().kick {
            kick.consume()?;
        }
        Ok(self.ring.get_ref().is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        self.events().call = file;
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.events().call.as_ref().map_or(Ok(()), signal)
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.ring.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.ring.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), virtio_queue::Error> {
        self.ring.add_used(desc_index, len)
    }

    fn enable_notification(&self) -> Result<bool, virtio_queue::Error> {
        self.ring.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), virtio_queue::Error> {
        self.ring.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, virtio_queue::Error> {
        self.ring.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.ring.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc: u64, avail: u64, used: u64) -> Result<(), virtio_queue::Error> {
        self.ring.set_queue_info(desc, avail, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.ring.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.ring.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.ring.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, virtio_queue::Error> {
        self.ring.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.ring.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.ring.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.started.store(ready, Ordering::Relaxed);
        self.ring.set_queue_ready(ready);
    }

    fn set_err(&self, file: Option<File>) {
        self.ring.set_err(file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::os::fd::{AsFd, AsRawFd};
    use vm_memory::GuestMemoryMmap;

    fn vring() -> Vring {
        Vring::new(Memory::new(GuestMemoryMmap::new()), 16).expect("queue")
    }

    /// A blocking event, and a second descriptor of it such as another process would have.
    fn event() -> (File, File) {
        let event = File::from(eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd"));
        let other = event.try_clone().expect("descriptor");
        (event, other)
    }

    fn is_ready(watched: &impl AsFd) -> bool {
        let mut fds = [PollFd::new(watched, PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&NO_WAIT)).expect("poll") != 0
    }

    #[test]
    fn a_kick_counts_once_and_never_blocks() {
        let vring = vring();
        let (event, kick) = event();
        let watched = vring.change_kick(Some(event)).expect("kick").expect("new");
        assert!(!is_ready(&watched));
        vring.read_kick().expect("nothing to read, and yet no wait");
        signal(&kick).expect("signal");
        assert!(is_ready(&watched));
        vring.read_kick().expect("kick");
        assert!(!is_ready(&watched));
        assert!(!is_ready(&kick), "the event is drained");
    }

    #[test]
    fn a_kick_that_another_process_reads_is_no_trap() {
        let vring = vring();
        let (event, kick) = event();
        let watched = vring.change_kick(Some(event)).expect("kick").expect("new");
        signal(&kick).expect("signal");
        rustix::io::read(&kick, &mut [0; 8]).expect("stolen");
        vring.read_kick().expect("no wait");
        assert!(!is_ready(&watched));
    }

    #[test]
    fn a_new_kick_event_takes_over_from_one_that_lives_on_elsewhere() {
        let vring = vring();
        let (first, old) = event();
        let watched = vring.change_kick(Some(first)).expect("kick").expect("new");
        let (second, new) = event();
        assert!(vring.change_kick(Some(second)).expect("kick").is_none(), "the same is watched");
        assert!(is_ready(&watched), "a kick may have gone to the old event");
        vring.read_kick().expect("kick");
        signal(&old).expect("signal");
        assert!(!is_ready(&watched));
        signal(&new).expect("signal");
        assert!(is_ready(&watched));
    }

    #[test]
    fn what_cannot_be_waited_for_is_no_kick_event() {
        let vring = vring();
        vring.set_kick(Some(tempfile::tempfile().expect("file")));
        assert!(vring.get_ref().get_kick().is_none());
    }

    #[test]
    fn a_full_call_event_does_not_block() {
        let vring = vring();
        let (event, call) = event();
        vring.set_call(Some(event));
        rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).expect("fill");
        vring.signal_used_queue().expect("no wait");
    }

    #[test]
    fn the_crate_watches_the_same_thing_that_is_changed() {
        let vring = vring();
        let (event, kick) = event();
        vring.set_kick(Some(event));
        signal(&kick).expect("signal");
        let state = vring.get_ref();
        let watched = state.get_kick().as_ref().expect("watched").as_raw_fd();
        drop(state);
        // Waited for by number, as the crate does.
        let epoll = vmm_sys_util::epoll::Epoll::new().expect("epoll");
        let interest = vmm_sys_util::epoll::EpollEvent::new(vmm_sys_util::epoll::EventSet::IN, 0);
        epoll.ctl(vmm_sys_util::epoll::ControlOperation::Add, watched, interest).expect("add");
        let mut ready = [vmm_sys_util::epoll::EpollEvent::default()];
        assert_eq!(epoll.wait(0, &mut ready).expect("wait"), 1);
        vring.set_kick(None);
        assert_eq!(epoll.wait(0, &mut ready).expect("wait"), 0, "gone with the queue");
    }
}
