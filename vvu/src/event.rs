//! Events to wait for: a counter that is signalled ([`Event`]), a request to stop ([`StopToken`]), and the wait
//! for several file descriptors ([`wait_any`], [`wait_readable`]).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, retry_on_intr};

mod set;
pub(crate) mod signaller;

pub use set::{EventFlags, EventSet, Ready, Token};

/// A counter of signals in the kernel, eventfd(2), in non-blocking mode. Its descriptor is readable while the
/// counter is not zero.
///
/// Non-blocking mode belongs to the eventfd and not to the descriptor, so a process that holds a duplicate can turn
/// it off. Neither signal nor drain an event whose duplicate an untrusted process holds.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// Makes an event without signals.
    ///
    /// # Errors
    /// When the process or the system has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Makes a second handle of the same counter.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Adds one signal. A counter that is full stays as it is.
    pub fn signal(&self) {
        // The only other outcome is EAGAIN: the counter is full, and so the event is signalled.
        let _ = retry_on_intr(|| rustix::io::write(&self.0, &1u64.to_ne_bytes()));
    }

    /// Takes all signals and returns their number, 0 if there are none.
    pub fn drain(&self) -> u64 {
        let mut count = [0; 8];
        // The only other outcome is EAGAIN: the counter is zero.
        retry_on_intr(|| rustix::io::read(&self.0, &mut count)).map_or(0, |_| u64::from_ne_bytes(count))
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Event> for OwnedFd {
    fn from(event: Event) -> Self {
        event.0
    }
}

/// A request to stop, made once and for good. Clones share one request.
///
/// The descriptor becomes readable with the request and stays so, hence any number of waits can watch it.
#[derive(Clone, Debug)]
pub struct StopToken(Arc<Stop>);

#[derive(Debug)]
struct Stop {
    requested: AtomicBool,
    event: Event,
}

impl StopToken {
    /// Makes a token that nobody has used yet.
    ///
    /// # Errors
    /// As [`Event::new`].
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Stop { requested: AtomicBool::new(false), event: Event::new()? })))
    }

    /// Requests the stop, from any thread or from a signal handler: it stores to an atomic and makes one system
    /// call that does not block. Further calls change nothing.
    pub fn stop(&self) {
        if !self.0.requested.swap(true, Ordering::SeqCst) {
            self.0.event.signal();
        }
    }

    /// Whether the stop was requested.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.0.requested.load(Ordering::SeqCst)
    }
}

impl AsFd for StopToken {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

/// Waits until one of `fds` has an event it asks for or a hang-up or error, or until `deadline`; without one, for as
/// long as it takes. Returns how many have, 0 at the deadline; each one's `revents` says which. A deadline in the past makes it a
/// look without a wait. Signals to the process do not end the wait.
///
/// # Errors
/// When the kernel cannot wait for so many descriptors (`ulimit -n`) or has no memory.
pub fn wait_any(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<usize> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        // A time too long for the kernel is as good as none.
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(fds, left.as_ref()) {
            Err(Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// Waits as [`wait_any`] until one of `fds` is readable or closed at its other end. Returns the index of the first
/// that is, `None` at the deadline.
///
/// # Errors
/// As [`wait_any`].
pub fn wait_readable(fds: &[BorrowedFd<'_>], deadline: Option<Instant>) -> io::Result<Option<usize>> {
    let mut fds: Vec<_> = fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    wait_any(&mut fds, deadline)?;
    Ok(fds.iter().position(|fd| !fd.revents().is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_secs(20))
    }

    fn now() -> Option<Instant> {
        Some(Instant::now())
    }

    #[test]
    fn signals_are_counted_and_drained() {
        let event = Event::new().expect("event");
        let other = event.try_clone().expect("clone");
        assert_eq!((event.drain(), wait_readable(&[event.as_fd()], now()).expect("look")), (0, None));
        event.signal();
        other.signal();
        assert_eq!(wait_readable(&[other.as_fd()], soon()).expect("wait"), Some(0));
        assert_eq!((other.drain(), event.drain()), (2, 0));
    }

    #[test]
    fn a_full_counter_does_not_block() {
        let event = Event::new().expect("event");
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).expect("fill");
        event.signal();
        assert_eq!(event.drain(), u64::MAX - 1);
    }

    #[test]
    fn a_stop_reaches_every_clone_and_stays() {
        let token = StopToken::new().expect("token");
        let clone = token.clone();
        assert!(!token.is_stopped());
        let waiter = std::thread::spawn(move || {
            let first = wait_readable(&[clone.as_fd()], soon()).expect("wait");
            (first, clone.is_stopped())
        });
        token.stop();
        token.stop();
        assert_eq!(waiter.join().expect("thread"), (Some(0), true));
        assert_eq!(wait_readable(&[token.as_fd()], now()).expect("look"), Some(0));
    }

    #[test]
    fn the_first_ready_descriptor_counts_and_a_hang_up_is_ready() {
        let (quiet, ready) = (Event::new().expect("event"), Event::new().expect("event"));
        ready.signal();
        let fds = [quiet.as_fd(), ready.as_fd(), ready.as_fd()];
        assert_eq!(wait_readable(&fds, soon()).expect("wait"), Some(1));
        let (ours, theirs) = UnixStream::pair().expect("pair");
        drop(theirs);
        assert_eq!(wait_readable(&[quiet.as_fd(), ours.as_fd()], soon()).expect("wait"), Some(1));
    }

    #[test]
    fn a_deadline_ends_the_wait_and_is_kept() {
        let event = Event::new().expect("event");
        let begun = Instant::now();
        let deadline = begun + Duration::from_millis(20);
        assert_eq!(wait_readable(&[event.as_fd()], Some(deadline)).expect("wait"), None);
        assert!(Instant::now() >= deadline);
        let mut fds = [PollFd::new(&event, PollFlags::OUT)];
        assert_eq!(wait_any(&mut fds, soon()).expect("wait"), 1);
        assert_eq!(fds[0].revents(), PollFlags::OUT);
    }
}
