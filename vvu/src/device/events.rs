//! What wakes the device: an epoll instance that a host polls as a whole.
//!
//! Everything is edge-triggered: an event says that something may be possible now, and the device
//! then goes on until nothing is. So a source that cannot be served yet costs nothing, and the
//! counters of the front-end's eventfds need not be read.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;

use crate::spec::addr::QueueIndex;

/// Events taken at once.
const BATCH: usize = 64;

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A front-end may be waiting in the backlog.
    Listener,
    /// A socket of the session may be readable or writable.
    Socket,
    /// The device stopped in the middle of its work.
    Again,
    /// The front-end kicked a queue.
    Kick(QueueIndex),
}

impl Source {
    const LISTENER: u64 = 1 << 16;
    const SOCKET: u64 = 2 << 16;
    const AGAIN: u64 = 3 << 16;

    fn to_data(self) -> u64 {
        match self {
            Self::Listener => Self::LISTENER,
            Self::Socket => Self::SOCKET,
            Self::Again => Self::AGAIN,
            Self::Kick(QueueIndex(index)) => u64::from(index),
        }
    }

    fn from_data(data: u64) -> Self {
        match (data, u16::try_from(data)) {
            (_, Ok(index)) => Self::Kick(QueueIndex(index)),
            (Self::LISTENER, _) => Self::Listener,
            (Self::AGAIN, _) => Self::Again,
            _ => Self::Socket,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Events {
    epoll: OwnedFd,
    again: OwnedFd,
}

impl Events {
    pub(crate) fn new() -> Result<Self, Errno> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let again = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let events = Self { epoll, again };
        events.add(&events.again, Source::Again)?;
        Ok(events)
    }

    /// Watches `fd` until it is closed everywhere or removed.
    pub(crate) fn add(&self, fd: impl AsFd, source: Source) -> Result<(), Errno> {
        let mut flags = EventFlags::ET | EventFlags::IN;
        if source == Source::Socket {
            flags |= EventFlags::OUT | EventFlags::RDHUP;
        }
        epoll::add(&self.epoll, fd, EventData::new_u64(source.to_data()), flags)
    }

    /// No longer watches `fd`.
    pub(crate) fn remove(&self, fd: impl AsFd) {
        if let Err(error) = epoll::delete(&self.epoll, fd) {
            log::warn!("no longer watching a file descriptor: {error}");
        }
    }

    /// Makes [`take`](Self::take) return [`Source::Again`].
    pub(crate) fn again(&self) {
        if let Err(error) = rustix::io::write(&self.again, &1u64.to_ne_bytes()) {
            log::warn!("waking the device up again: {error}");
        }
    }

    /// What happened since the last call.
    pub(crate) fn take(&self) -> Vec<Source> {
        let mut events: [Event; BATCH] =
            [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; BATCH];
        match epoll::wait(&self.epoll, &mut events, Some(&Timespec::default())) {
            Ok(count) => events[..count].iter().map(|event| Source::from_data(event.data.u64())).collect(),
            Err(Errno::INTR) => Vec::new(),
            Err(error) => {
                log::error!("waiting for events: {error}");
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
