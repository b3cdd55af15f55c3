//! A set of descriptors for which a PCI function and its host wait together, so that an event of either costs one wait.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData};
use rustix::io::Errno;

pub use rustix::event::epoll::EventFlags;

/// Most descriptors that one wait returns.
const BATCH: usize = 64;

/// An epoll(7) instance whose descriptors each belong to a function or to its host. Clones share one instance.
#[derive(Clone, Debug)]
pub struct EventSet(Arc<OwnedFd>);

/// Whose descriptor one is, and the number that the owner gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// Of the PCI function.
    Function(u32),
    /// Of the host of the function.
    Host(u32),
}

/// What is ready, by owner.
#[derive(Debug)]
pub struct Ready {
    /// Numbers of the function's descriptors.
    pub function: Vec<u32>,
    /// Numbers of the host's descriptors.
    pub host: Vec<u32>,
}

impl Ready {
    /// Makes an empty one, with room for all that a wait returns.
    #[must_use]
    pub fn new() -> Self {
        Self { function: Vec::with_capacity(BATCH), host: Vec::with_capacity(BATCH) }
    }
}

impl Default for Ready {
    fn default() -> Self {
        Self::new()
    }
}

impl Token {
    const HOST: u64 = 1 << 32;

    fn to_data(self) -> EventData {
        EventData::new_u64(match self {
            Self::Function(number) => u64::from(number),
            Self::Host(number) => Self::HOST | u64::from(number),
        })
    }

    fn from_data(data: EventData) -> Self {
        let bits = data.u64();
        // `to_data` sets no other bit of the upper half.
        let number = u32::try_from(bits & !Self::HOST).unwrap_or_default();
        if bits & Self::HOST == 0 { Self::Function(number) } else { Self::Host(number) }
    }
}

impl EventSet {
    /// Makes a set without descriptors.
    ///
    /// # Errors
    /// When there is no file descriptor or no memory left.
    pub fn new() -> Result<Self, Errno> {
        Ok(Self(Arc::new(epoll::create(CreateFlags::CLOEXEC)?)))
    }

    /// Watches `fd` for `interest`.
    ///
    /// The kernel watches a closed descriptor for as long as another process has its file open, so
    /// [`remove`](Self::remove) it before closing it.
    ///
    /// # Errors
    /// When it is watched already, cannot be watched, or there is no memory left (`fs.epoll.max_user_watches`).
    pub fn add(&self, fd: impl AsFd, token: Token, interest: EventFlags) -> Result<(), Errno> {
        epoll::add(&self.0, fd, token.to_data(), interest)
    }

    /// Watches `fd`, which is watched already, for `interest` instead.
    ///
    /// # Errors
    /// When it is not watched.
    pub fn modify(&self, fd: impl AsFd, token: Token, interest: EventFlags) -> Result<(), Errno> {
        epoll::modify(&self.0, fd, token.to_data(), interest)
    }

    /// Stops watching `fd`.
    ///
    /// # Errors
    /// When it is not watched.
    pub fn remove(&self, fd: impl AsFd) -> Result<(), Errno> {
        epoll::delete(&self.0, fd)
    }

    /// Waits until something is ready, for `time` at most, and puts it into `ready` in place of what was there: at most 64
    /// descriptors, the others with the next wait. A signal to the process may end the wait with nothing.
    ///
    /// # Errors
    /// What epoll_wait(2) says of an instance that is none: never.
    pub fn wait(&self, time: Option<&Timespec>, ready: &mut Ready) -> Result<(), Errno> {
        ready.function.clear();
        ready.host.clear();
        let mut events = [const { MaybeUninit::uninit() }; BATCH];
        let events = match epoll::wait(&self.0, &mut events, time) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error),
        };
        for event in events {
            match Token::from_data(event.data) {
                Token::Function(number) => ready.function.push(number),
                Token::Host(number) => ready.host.push(number),
            }
        }
        Ok(())
    }
}

impl AsFd for EventSet {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;

    #[test]
    fn what_is_ready_is_told_apart_by_its_owner() {
        let set = EventSet::new().expect("set");
        let events: Vec<_> = (0..4).map(|_| Event::new().expect("event")).collect();
        let tokens = [Token::Function(7), Token::Host(7), Token::Function(u32::MAX), Token::Host(u32::MAX)];
        for (event, token) in events.iter().zip(tokens) {
            set.add(event, token, EventFlags::IN).expect("add");
            event.signal();
        }
        let mut ready = Ready::new();
        set.wait(None, &mut ready).expect("wait");
        ready.function.sort_unstable();
        ready.host.sort_unstable();
        assert_eq!((&ready.function[..], &ready.host[..]), (&[7, u32::MAX][..], &[7, u32::MAX][..]));

        set.remove(&events[0]).expect("remove");
        set.modify(&events[1], Token::Host(8), EventFlags::empty()).expect("modify");
        events[2].drain();
        set.wait(Some(&Timespec::default()), &mut ready).expect("look");
        assert_eq!((&ready.function[..], &ready.host[..]), (&[][..], &[u32::MAX][..]));
    }
}
