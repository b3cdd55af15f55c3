//! Notifications of one queue in both directions. The front-end holds the same eventfds and may be hostile, so
//! nothing here can block on one.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::{Errno, ReadWriteFlags};

use crate::event::Event;
use crate::event::signaller::Signaller;

const NO_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
/// Tags of what a queue waits for.
const KICK: u64 = 0;
const WAKE_UP: u64 = 1;
const FINISHED: u64 = 2;

/// What a queue's thread waits for: kicks of the driver, wake-ups by its own process, and requests that its engine has
/// finished.
///
/// All are in one epoll instance, the kick event edge-triggered: each kick ends one wait, no matter who else reads
/// the event. A second `SET_VRING_KICK` takes effect at once, and the event it replaces is dead even if other
/// processes keep it open.
#[derive(Debug)]
pub(super) struct Kicks {
    epoll: OwnedFd,
    wake_up: Arc<Event>,
    kick: Mutex<Option<File>>,
}

impl Kicks {
    /// Waits for wake-ups only, until there is a kick event.
    ///
    /// # Errors
    /// When there is no file descriptor left.
    pub(super) fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake_up = Arc::new(Event::new()?);
        epoll::add(&epoll, &wake_up, EventData::new_u64(WAKE_UP), EventFlags::IN)?;
        Ok(Self { epoll, wake_up, kick: Mutex::new(None) })
    }

    /// The event that ends the wait.
    pub(super) fn wake_up_event(&self) -> &Arc<Event> {
        &self.wake_up
    }

    /// Lets each wait end also while `finished` is readable.
    ///
    /// # Errors
    /// When the kernel is out of memory.
    pub(super) fn watch(&self, finished: impl AsFd) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, finished, EventData::new_u64(FINISHED), EventFlags::IN)?)
    }

    fn kick(&self) -> MutexGuard<'_, Option<File>> {
        self.kick.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `event` the kick event, in place of the one before. The wait ends once after that, since a kick may have
    /// gone to the event before.
    ///
    /// # Errors
    /// When `event` cannot be waited for. There is no kick event then.
    pub(super) fn set_kick(&self, event: Option<File>) -> io::Result<()> {
        let mut kick = self.kick();
        if let Some(old) = kick.take() {
            epoll::delete(&self.epoll, &old)?;
        }
        if let Some(event) = event {
            epoll::add(&self.epoll, &event, EventData::new_u64(KICK), EventFlags::IN | EventFlags::ET)?;
            *kick = Some(event);
            self.wake_up();
        }
        Ok(())
    }

    /// Ends the current wait, or the next one.
    pub(super) fn wake_up(&self) {
        self.wake_up.signal();
    }

    /// Waits for a kick, a wake-up or a finished request. It may end without one: the kernel interrupts a thread to give it
    /// the result of a request, and looking for that is cheaper than another wait.
    ///
    /// # Errors
    /// When the kernel is out of memory.
    pub(super) fn wait(&self) -> io::Result<()> {
        self.look(None).map(drop)
    }

    /// Takes kicks and wake-ups, waiting for the first one for at most `limit`. Returns whether there was one.
    fn look(&self, limit: Option<&Timespec>) -> io::Result<bool> {
        let mut ready = Vec::with_capacity(3);
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut ready), limit) {
            Err(Errno::INTR) => return Ok(false),
            result => result?,
        };
        for event in &ready {
            let tag = event.data.u64();
            if tag == WAKE_UP {
                self.wake_up.drain();
            } else if let (KICK, Some(kick)) = (tag, &*self.kick()) {
                // Resets the counter, so that a VMM that takes the event over finds no old kick. Nothing depends on
                // it, and it fails when somebody else has reset the counter.
                let _ = rustix::io::preadv2(
                    kick,
                    &mut [IoSliceMut::new(&mut [0; 8])],
                    u64::MAX,
                    ReadWriteFlags::NOWAIT,
                );
            }
        }
        Ok(!ready.is_empty())
    }
}

/// Signals a call event. One whose counter is full is signalled already.
///
/// # Errors
/// When `event` is no eventfd.
pub(super) fn signal(event: impl AsFd) -> io::Result<()> {
    match Signaller::shared() {
        Ok(signaller) => signaller.signal(event.as_fd()),
        Err(error) => {
            if !WITHOUT_SIGNALLER.swap(true, Ordering::Relaxed) {
                log::warn!("a front-end can block this back-end by its call events: {error}");
            }
            signal_unless_full(event)
        }
    }
}

static WITHOUT_SIGNALLER: AtomicBool = AtomicBool::new(false);

/// Signals an event by a write, which waits if the front-end fills the counter after the look at it.
fn signal_unless_full(event: impl AsFd) -> io::Result<()> {
    let mut fds = [PollFd::new(&event, PollFlags::OUT)];
    rustix::event::poll(&mut fds, Some(&NO_WAIT))?;
    if fds[0].revents().contains(PollFlags::OUT) {
        rustix::io::write(&event, &1u64.to_ne_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    /// A blocking event, and a second descriptor of it such as another process would have.
    fn event() -> (File, File) {
        let event = File::from(eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd"));
        let other = event.try_clone().expect("descriptor");
        (event, other)
    }

    /// Kicks with a kick event, of which nothing is pending, and another descriptor of that.
    fn kicks() -> (Kicks, File) {
        let kicks = Kicks::new().expect("descriptors");
        let (event, kick) = event();
        kicks.set_kick(Some(event)).expect("kick");
        assert!(is_kicked(&kicks), "a kick may have come before");
        (kicks, kick)
    }

    fn is_kicked(kicks: &Kicks) -> bool {
        kicks.look(Some(&NO_WAIT)).expect("no error")
    }

    fn is_readable(event: &File) -> bool {
        let mut fds = [PollFd::new(event, PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&NO_WAIT)).expect("poll") != 0
    }

    #[test]
    fn a_kick_counts_once_and_never_blocks() {
        let (kicks, kick) = kicks();
        assert!(!is_kicked(&kicks));
        signal(&kick).expect("signal");
        assert!(is_kicked(&kicks));
        assert!(!is_kicked(&kicks));
        assert!(!is_readable(&kick), "the event is drained");
    }

    #[test]
    fn a_kick_that_another_process_reads_is_no_trap() {
        let (kicks, kick) = kicks();
        signal(&kick).expect("signal");
        rustix::io::read(&kick, &mut [0; 8]).expect("stolen");
        is_kicked(&kicks);
        assert!(!is_kicked(&kicks));
    }

    #[test]
    fn a_new_kick_event_takes_over_from_one_that_lives_on_elsewhere() {
        let (kicks, old) = kicks();
        let (second, new) = event();
        kicks.set_kick(Some(second)).expect("kick");
        assert!(is_kicked(&kicks), "a kick may have gone to the old event");
        signal(&old).expect("signal");
        assert!(!is_kicked(&kicks));
        signal(&new).expect("signal");
        assert!(is_kicked(&kicks));
    }

    #[test]
    fn what_cannot_be_waited_for_is_no_kick_event() {
        let (kicks, old) = kicks();
        assert!(kicks.set_kick(Some(tempfile::tempfile().expect("file"))).is_err());
        signal(&old).expect("signal");
        assert!(!is_kicked(&kicks), "nor is the one before any longer");
    }

    #[test]
    fn without_a_kick_event_only_wake_ups_count() {
        let (kicks, kick) = kicks();
        kicks.set_kick(None).expect("none");
        signal(&kick).expect("signal");
        assert!(!is_kicked(&kicks));
        kicks.wake_up();
        kicks.wait().expect("woken up");
        assert!(!is_kicked(&kicks));
    }

    #[test]
    fn a_full_call_event_does_not_block() {
        let (event, call) = event();
        rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).expect("fill");
        signal(&event).expect("no wait");
        signal_unless_full(&event).expect("no wait");
    }

    #[test]
    fn what_is_no_eventfd_is_no_call_event() {
        let (_read, write) = rustix::pipe::pipe().expect("pipe");
        assert!(signal(&write).is_err());
    }
}
