//! The epoll instance of a device, which its host polls as one file descriptor.
//!
//! All events are edge-triggered: after an event the device works until there is nothing left to do. So
//! a source that the device cannot serve yet causes no further wake-ups, and the device never has to
//! read the front-end's eventfds.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use crate::spec::addr::QueueIndex;
use crate::spec::express::PeerId;

/// Most events that one call of [`Events::take`] returns.
const BATCH: usize = 64;
/// Time between two attempts to get a resource of which there is none left.
const RETRY_AFTER: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// The source of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The backlog of the listening socket may have a front-end.
    Listener,
    /// The front-end's socket or the back-end channel may be readable or writable.
    Socket,
    /// The device has work left; see [`Events::again`] and [`Events::retry_later`].
    Again,
    /// The front-end kicked a queue.
    Kick(QueueIndex),
    /// The VMM of the express device connected, hung up, or takes more messages.
    Express,
    /// The guest confirmed a peer of the express device.
    Confirmation(PeerId),
}

impl Source {
    const LISTENER: u64 = 1 << 16;
    const SOCKET: u64 = 2 << 16;
    const AGAIN: u64 = 3 << 16;
    const EXPRESS: u64 = 4 << 16;
    /// The number of the peer is added.
    const CONFIRMATION: u64 = 5 << 16;

    fn to_data(self) -> u64 {
        match self {
            Self::Listener => Self::LISTENER,
            Self::Socket => Self::SOCKET,
            Self::Again => Self::AGAIN,
            Self::Kick(QueueIndex(index)) => u64::from(index),
            Self::Express => Self::EXPRESS,
            Self::Confirmation(peer) => Self::CONFIRMATION | u64::from(peer.get()),
        }
    }

    fn from_data(data: u64) -> Self {
        let peer = || PeerId::new(u16::try_from(data ^ Self::CONFIRMATION).ok()?).map(Self::Confirmation);
        match (data, u16::try_from(data)) {
            (_, Ok(index)) => Self::Kick(QueueIndex(index)),
            (Self::LISTENER, _) => Self::Listener,
            (Self::AGAIN, _) => Self::Again,
            (Self::EXPRESS, _) => Self::Express,
            _ => peer().unwrap_or(Self::Socket),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Events {
    epoll: OwnedFd,
    again: Arc<OwnedFd>,
    retry: OwnedFd,
}

impl Events {
    pub(crate) fn new() -> Result<Self, Errno> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let again = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let retry =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let events = Self { epoll, again: Arc::new(again), retry };
        events.add(&events.again, Source::Again)?;
        events.add(&events.retry, Source::Again)?;
        Ok(events)
    }

    /// Watches `fd`. The kernel watches a closed descriptor for as long as another process has its file
    /// open, so [`remove`](Self::remove) it before closing it.
    pub(crate) fn add(&self, fd: impl AsFd, source: Source) -> Result<(), Errno> {
        let mut flags = EventFlags::ET | EventFlags::IN;
        if matches!(source, Source::Socket | Source::Express) {
            flags |= EventFlags::OUT | EventFlags::RDHUP;
        }
        epoll::add(&self.epoll, fd, EventData::new_u64(source.to_data()), flags)
    }

    /// Stops watching `fd`.
    pub(crate) fn remove(&self, fd: impl AsFd) {
        if let Err(error) = epoll::delete(&self.epoll, fd) {
            log::warn!("cannot stop watching a file descriptor: {error}");
        }
    }

    /// Makes the next [`take`](Self::take) return [`Source::Again`], so that the device goes on with its work
    /// after other events had their turn.
    pub(crate) fn again(&self) {
        if let Err(error) = rustix::io::write(&self.again, &1u64.to_ne_bytes()) {
            log::warn!("cannot schedule the rest of the device's work: {error}");
        }
    }

    /// An eventfd that does the same as [`again`](Self::again) when another thread writes to it.
    pub(crate) fn again_event(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.again)
    }

    /// Makes [`take`](Self::take) return [`Source::Again`] after [`RETRY_AFTER`]: something failed for want of
    /// a resource, and nothing tells when there is more of it.
    pub(crate) fn retry_later(&self) {
        let once = Itimerspec { it_interval: Timespec::default(), it_value: RETRY_AFTER };
        if let Err(error) = timerfd_settime(&self.retry, TimerfdTimerFlags::empty(), &once) {
            log::warn!("cannot schedule another attempt: {error}");
        }
    }

    /// Returns the events since the last call; does not wait.
    pub(crate) fn take(&self) -> Vec<Source> {
        let mut events: [Event; BATCH] =
            [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; BATCH];
        match epoll::wait(&self.epoll, &mut events, Some(&Timespec::default())) {
            Ok(count) => events[..count].iter().map(|event| Source::from_data(event.data.u64())).collect(),
            Err(Errno::INTR) => Vec::new(),
            Err(error) => {
                log::error!("cannot read the device's events: {error}");
                Vec::new()
            }
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_the_kernel() {
        let peers = [1, 2, 0x7fff].map(|id| Source::Confirmation(PeerId::new(id).expect("a peer")));
        let kicks = [0, 127, u16::MAX].map(|index| Source::Kick(QueueIndex(index)));
        let others = [Source::Listener, Source::Socket, Source::Again, Source::Express];
        for source in peers.into_iter().chain(kicks).chain(others) {
            assert_eq!(Source::from_data(source.to_data()), source);
        }
    }
}
