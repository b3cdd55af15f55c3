//! Notifications of the vhost queues: a kick of the front-end raises an MSI-X vector, and a doorbell
//! write of the guest signals an eventfd of the front-end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::durable::{Adopted, Fd, RestoreError};
use crate::event::signaller::Signaller;
use crate::spec::addr::QueueIndex;
use crate::spec::virtio::NO_VECTOR;

/// An eventfd of the front-end.
#[derive(Debug)]
pub(crate) struct Eventfd(Fd);

/// Why a file descriptor cannot be used for notifications.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EventfdError {
    #[error("the file descriptor for notifications is {got:?}: want an eventfd")]
    Kind { got: String },
    #[error("cannot use an eventfd: {0}")]
    Io(#[from] Errno),
}

impl Eventfd {
    /// An eventfd that [`check`](Self::check) has accepted.
    pub(crate) fn new(fd: impl Into<Fd>) -> Self {
        Self(fd.into())
    }

    /// Checks that `fd` is an eventfd. That does not ask a file system, which might not answer.
    ///
    /// # Errors
    /// [`EventfdError`].
    pub(crate) fn check(fd: &OwnedFd) -> Result<(), EventfdError> {
        use std::os::fd::AsRawFd;
        let link = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new())?;
        let got = link.to_string_lossy();
        if got != "anon_inode:[eventfd]" {
            return Err(EventfdError::Kind { got: got.into_owned() });
        }
        Ok(())
    }

    /// Makes a second handle of the same eventfd.
    pub(crate) fn try_clone(&self) -> Result<Self, Errno> {
        rustix::io::fcntl_dupfd_cloexec(&self.0, 0).map(Self::new)
    }

    /// The number by which the saved state names it.
    pub(crate) fn number(&self) -> RawFd {
        self.0.number()
    }
}

impl From<Eventfd> for OwnedFd {
    fn from(eventfd: Eventfd) -> Self {
        eventfd.0.into_inner()
    }
}

impl AsFd for Eventfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One vhost queue.
#[derive(Debug)]
struct Vring {
    kick: Option<Eventfd>,
    call: Option<Eventfd>,
    err: Option<Eventfd>,
    /// MSI-X vector that kicks of this queue raise.
    vector: u16,
    /// The front-end kicked the queue while it had no vector.
    kick_pending: bool,
}

impl Vring {
    fn new() -> Self {
        Self { kick: None, call: None, err: None, vector: NO_VECTOR, kick_pending: false }
    }
}

/// A vhost queue as it is saved.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedVring {
    kick: Option<RawFd>,
    call: Option<RawFd>,
    err: Option<RawFd>,
    vector: u16,
    kick_pending: bool,
}

/// One of the three eventfds of a vhost queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notification {
    Kick,
    Call,
    Err,
}

#[derive(Debug)]
pub(crate) struct Vrings {
    vrings: Vec<Vring>,
    signaller: &'static Signaller,
}

impl Vrings {
    /// Makes `queues` queues without eventfds and vectors.
    ///
    /// # Errors
    /// Fails as [`Signaller::shared`] does.
    pub(crate) fn new(queues: u16) -> io::Result<Self> {
        let vrings = (0..queues).map(|_| Vring::new()).collect();
        Ok(Self { vrings, signaller: Signaller::shared()? })
    }

    /// Replaces an eventfd of queue `index` and returns the old one.
    pub(crate) fn set(
        &mut self,
        index: QueueIndex,
        which: Notification,
        fd: Option<Eventfd>,
    ) -> Option<Eventfd> {
        let vring = self.vrings.get_mut(usize::from(index.0))?;
        let slot = match which {
            Notification::Kick => &mut vring.kick,
            Notification::Call => &mut vring.call,
            Notification::Err => &mut vring.err,
        };
        std::mem::replace(slot, fd)
    }

    /// Returns the state for a successor.
    pub(super) fn save(&self) -> Vec<SavedVring> {
        let number = |eventfd: &Option<Eventfd>| eventfd.as_ref().map(Eventfd::number);
        let saved = |Vring { kick, call, err, vector, kick_pending }: &Vring| SavedVring {
            kick: number(kick),
            call: number(call),
            err: number(err),
            vector: *vector,
            kick_pending: *kick_pending,
        };
        self.vrings.iter().map(saved).collect()
    }

    /// Restores what [`save`](Self::save) returned.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub(super) fn restore(&mut self, saved: Vec<SavedVring>, left: &mut Adopted) -> Result<(), RestoreError> {
        let mut adopt = |number| Ok::<_, RestoreError>(left.adopt_some(number)?.map(Eventfd::new));
        for (vring, saved) in self.vrings.iter_mut().zip(saved) {
            let SavedVring { kick, call, err, vector, kick_pending } = saved;
            let (kick, call, err) = (adopt(kick)?, adopt(call)?, adopt(err)?);
            *vring = Vring { kick, call, err, vector, kick_pending };
        }
        Ok(())
    }

    /// Returns the kick eventfds that are set.
    pub(super) fn kicks(&self) -> impl Iterator<Item = (QueueIndex, &Eventfd)> {
        let queues = (0..).map(QueueIndex).zip(&self.vrings);
        queues.filter_map(|(queue, vring)| Some((queue, vring.kick.as_ref()?)))
    }

    /// Returns the call eventfds that are set.
    pub(crate) fn calls(&self) -> impl Iterator<Item = (QueueIndex, &Eventfd)> {
        let queues = (0..).map(QueueIndex).zip(&self.vrings);
        queues.filter_map(|(queue, vring)| Some((queue, vring.call.as_ref()?)))
    }

    /// Removes the front-end's eventfds and returns the kick eventfds. The guest's vectors stay.
    pub(crate) fn disconnect(&mut self) -> Vec<Eventfd> {
        let forget = |vring: &mut Vring| {
            let vector = vring.vector;
            std::mem::replace(vring, Vring { vector, ..Vring::new() }).kick
        };
        self.vrings.iter_mut().filter_map(forget).collect()
    }

    /// Removes the guest's vectors.
    pub(crate) fn reset(&mut self) {
        self.vrings.iter_mut().for_each(|vring| vring.vector = NO_VECTOR);
    }

    /// Returns the vector to raise for a kick of queue `index`. Without a vector, the kick stays pending.
    pub(crate) fn kicked(&mut self, index: QueueIndex) -> Option<u16> {
        let vring = self.vrings.get_mut(usize::from(index.0))?;
        vring.kick_pending = vring.vector == NO_VECTOR;
        (!vring.kick_pending).then_some(vring.vector)
    }

    /// The vector of queue `index`.
    pub(crate) fn vector(&self, index: QueueIndex) -> u16 {
        self.vrings.get(usize::from(index.0)).map_or(NO_VECTOR, |vring| vring.vector)
    }

    /// Sets the vector of queue `index`, and returns it if a kick is pending.
    pub(crate) fn set_vector(&mut self, index: QueueIndex, vector: u16) -> Option<u16> {
        let vring = self.vrings.get_mut(usize::from(index.0))?;
        vring.vector = vector;
        let due = vring.kick_pending && vector != NO_VECTOR;
        vring.kick_pending &= !due;
        due.then_some(vector)
    }

    /// Signals the eventfd of a doorbell. With N queues, doorbells 0 to N-1 are calls and N to 2N-1 are
    /// errors. A doorbell without an eventfd does nothing.
    pub(crate) fn ring(&self, doorbell: usize) {
        let eventfd = match self.vrings.get(doorbell) {
            Some(vring) => vring.call.as_ref(),
            None => self.vrings.get(doorbell - self.vrings.len()).and_then(|vring| vring.err.as_ref()),
        };
        if let Some(eventfd) = eventfd
            && let Err(error) = self.signaller.signal(eventfd.as_fd())
        {
            log::warn!("cannot signal the front-end: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    fn pair() -> (OwnedFd, Eventfd) {
        let ours = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd");
        let theirs = Eventfd::new(ours.try_clone().expect("dup"));
        (ours, theirs)
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        match rustix::io::read(fd, &mut bytes) {
            Ok(_) => u64::from_ne_bytes(bytes),
            Err(_) => 0,
        }
    }

    #[test]
    fn doorbells_ring_calls_then_errors_and_nothing_else() {
        let mut vrings = Vrings::new(2).expect("queues");
        let (call, call_fd) = pair();
        let (err, err_fd) = pair();
        vrings.set(QueueIndex(1), Notification::Call, Some(call_fd));
        vrings.set(QueueIndex(0), Notification::Err, Some(err_fd));
        for doorbell in [0, 1, 2, 3, 4, 2047] {
            vrings.ring(doorbell);
        }
        assert_eq!((count(&call), count(&err)), (1, 1));
        vrings.disconnect();
        vrings.ring(1);
        assert_eq!(count(&call), 0);
    }

    #[test]
    fn a_kick_before_its_vector_is_kept() {
        let mut vrings = Vrings::new(2).expect("queues");
        assert_eq!(vrings.kicked(QueueIndex(1)), None);
        assert_eq!(vrings.set_vector(QueueIndex(0), 2), None);
        assert_eq!(vrings.set_vector(QueueIndex(1), 3), Some(3));
        assert_eq!(vrings.set_vector(QueueIndex(1), 4), None);
        assert_eq!(vrings.kicked(QueueIndex(1)), Some(4));
        assert_eq!(vrings.kicked(QueueIndex(2)), None);
    }

    #[test]
    fn only_eventfds_are_accepted() {
        let (read, _write) = rustix::pipe::pipe().expect("pipe");
        assert!(matches!(Eventfd::check(&read), Err(EventfdError::Kind { .. })));
    }
}
