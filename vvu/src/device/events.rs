//! What a device waits for, in a set that it shares with its host.
//!
//! All events are edge-triggered: after an event the device works until there is nothing left to do. So
//! a source that the device cannot serve yet causes no further wake-ups, and the device never has to
//! read the front-end's eventfds.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use crate::event::{EventFlags, EventSet, Token};
use crate::spec::addr::QueueIndex;
use crate::spec::express::PeerId;

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
    const LISTENER: u32 = 1 << 16;
    const SOCKET: u32 = 2 << 16;
    const AGAIN: u32 = 3 << 16;
    const EXPRESS: u32 = 4 << 16;
    /// The number of the peer is added.
    const CONFIRMATION: u32 = 5 << 16;

    /// The number of the source's descriptor in the set.
    fn number(self) -> u32 {
        match self {
            Self::Listener => Self::LISTENER,
            Self::Socket => Self::SOCKET,
            Self::Again => Self::AGAIN,
            Self::Kick(QueueIndex(index)) => u32::from(index),
            Self::Express => Self::EXPRESS,
            Self::Confirmation(peer) => Self::CONFIRMATION | u32::from(peer.get()),
        }
    }

    /// The source whose descriptor has this number in the set.
    pub(crate) fn from_number(number: u32) -> Self {
        let peer = || PeerId::new(u16::try_from(number ^ Self::CONFIRMATION).ok()?).map(Self::Confirmation);
        match (number, u16::try_from(number)) {
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
    set: EventSet,
    again: Arc<OwnedFd>,
    retry: OwnedFd,
}

impl Events {
    pub(crate) fn new() -> Result<Self, Errno> {
        let set = EventSet::new()?;
        let again = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let retry =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let events = Self { set, again: Arc::new(again), retry };
        events.add(&events.again, Source::Again)?;
        events.add(&events.retry, Source::Again)?;
        Ok(events)
    }

    /// The set, which the device shares with its host.
    pub(crate) fn set(&self) -> &EventSet {
        &self.set
    }

    /// Watches `fd` until it is [removed](Self::remove).
    pub(crate) fn add(&self, fd: impl AsFd, source: Source) -> Result<(), Errno> {
        let mut flags = EventFlags::ET | EventFlags::IN;
        if matches!(source, Source::Socket | Source::Express) {
            flags |= EventFlags::OUT | EventFlags::RDHUP;
        }
        self.set.add(fd, Token::Function(source.number()), flags)
    }

    /// Stops watching `fd`.
    pub(crate) fn remove(&self, fd: impl AsFd) {
        if let Err(error) = self.set.remove(fd) {
            log::warn!("cannot stop watching a file descriptor: {error}");
        }
    }

    /// Makes [`Source::Again`] ready at the next wait, so that the device goes on with its work
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

    /// Makes [`Source::Again`] ready after [`RETRY_AFTER`]: something failed for want of
    /// a resource, and nothing tells when there is more of it.
    pub(crate) fn retry_later(&self) {
        let once = Itimerspec { it_interval: Timespec::default(), it_value: RETRY_AFTER };
        if let Err(error) = timerfd_settime(&self.retry, TimerfdTimerFlags::empty(), &once) {
            log::warn!("cannot schedule another attempt: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_known_by_their_numbers() {
        let peers = [1, 2, 0x7fff].map(|id| Source::Confirmation(PeerId::new(id).expect("a peer")));
        let kicks = [0, 127, u16::MAX].map(|index| Source::Kick(QueueIndex(index)));
        let others = [Source::Listener, Source::Socket, Source::Again, Source::Express];
        for source in peers.into_iter().chain(kicks).chain(others) {
            assert_eq!(Source::from_number(source.number()), source);
        }
    }
}
