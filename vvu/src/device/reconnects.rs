//! The front-ends that connect, and which of them have to try again later.
//!
//! While there is no back-end, a front-end that connects for the first time may wait: its guest does
//! not run yet. A front-end that reconnects because its back-end left may not wait: its guest runs, and
//! a VMM that waits for an answer on the new connection stops the guest (QEMU waits with its big lock
//! held). The device hangs up on such a front-end until the driver is ready, so that it tries again.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, recvmsg};

use super::closer::Closer;
use super::peer::Peer;
use super::resources::hang_up;
use crate::durable::{Adopted, Fd, RestoreError};

/// Most front-ends that wait outside of the socket's backlog.
const WAITING_MAX: usize = 8;

/// An accepted front-end, and its process if the kernel can name it.
pub(super) type Accepted = (Fd, Option<Peer>);

/// [`Reconnects`] as they are saved: the front-ends that wait, and the process to turn away.
pub(super) type SavedReconnects = (Vec<RawFd>, Option<Peer>);

#[derive(Debug)]
pub(super) struct Reconnects {
    listener: UnixListener,
    /// Front-ends that wait for a back-end.
    waiting: VecDeque<Accepted>,
    /// The process whose connection ended because the driver left.
    turned_away: Option<Peer>,
}

impl Reconnects {
    /// `listener` must be in non-blocking mode.
    pub(super) fn new(listener: UnixListener) -> Self {
        Self { listener, waiting: VecDeque::new(), turned_away: None }
    }

    /// Returns the state for a successor.
    pub(super) fn save(&self) -> SavedReconnects {
        let waiting = self.waiting.iter().map(|(stream, _)| stream.number()).collect();
        (waiting, self.turned_away)
    }

    /// Restores what [`save`](Self::save) returned, and what a predecessor accepted and did not come to save.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub(super) fn restore(
        &mut self,
        (waiting, turned_away): SavedReconnects,
        left: &mut Adopted,
    ) -> Result<(), RestoreError> {
        for number in waiting {
            let stream = left.adopt(number)?;
            let peer = Peer::of(&stream)?;
            self.waiting.push_back((stream, peer));
        }
        for stream in left.connections_to(&self.listener) {
            let peer = Peer::of(&stream)?;
            self.waiting.push_back((stream.into(), peer));
        }
        self.turned_away = turned_away;
        Ok(())
    }

    /// From now on, hangs up on connections of `peer` while there is no back-end; with `None`, on nobody.
    pub(super) fn turn_away(&mut self, peer: Option<Peer>) {
        self.turned_away = peer;
    }

    /// Takes `stream` for a front-end that has connected.
    #[cfg(fuzzing)]
    pub(super) fn adopt(&mut self, stream: std::os::unix::net::UnixStream) -> io::Result<()> {
        let peer = Peer::of(&stream)?;
        self.waiting.push_back((stream.into(), peer));
        Ok(())
    }

    /// Forgets the front-ends that wait.
    #[cfg(fuzzing)]
    pub(super) fn forget_waiting(&mut self) {
        self.waiting.clear();
    }

    /// The next front-end to serve, or `None` if there is none.
    pub(super) fn next(&mut self) -> io::Result<Option<Accepted>> {
        match self.waiting.pop_front() {
            Some(accepted) => Ok(Some(accepted)),
            None => accept(&self.listener),
        }
    }

    /// Accepts one front-end and lets it wait or hangs up on it; false if none connected, if nobody is
    /// to be turned away, or if there is no room.
    pub(super) fn sort(&mut self, closer: &Closer) -> io::Result<bool> {
        if self.waiting.len() == WAITING_MAX {
            let (left, waiting): (Vec<_>, _) =
                self.waiting.drain(..).partition(|(stream, _)| has_left(stream));
            self.waiting = waiting.into();
            closer.close(left);
        }
        if self.turned_away.is_none() || self.waiting.len() == WAITING_MAX {
            return Ok(false);
        }
        let Some(accepted) = accept(&self.listener)? else { return Ok(false) };
        if accepted.1 == self.turned_away {
            log::debug!("hung up on a front-end that reconnected before the back-end did");
            hang_up(closer, accepted.0);
        } else {
            self.waiting.push_back(accepted);
        }
        Ok(true)
    }
}

/// Whether the other end of `stream` is closed.
fn has_left(stream: &Fd) -> bool {
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    match recvmsg(stream, &mut parts, &mut RecvAncillaryBuffer::default(), flags) {
        Ok(message) => message.bytes == 0,
        Err(error) => error != Errno::AGAIN,
    }
}

fn accept(listener: &UnixListener) -> io::Result<Option<Accepted>> {
    match listener.accept() {
        Ok((stream, _)) => {
            let peer = Peer::of(&stream)?;
            Ok(Some((OwnedFd::from(stream).into(), peer)))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    /// The directory of the socket `s`, those who connect to it, and a peer that is not this process.
    fn setup() -> (tempfile::TempDir, Reconnects, Option<Peer>) {
        let dir = tempfile::tempdir().expect("directory");
        let listener = UnixListener::bind(dir.path().join("s")).expect("bind");
        listener.set_nonblocking(true).expect("non-blocking");
        let other = Peer::of(&UnixStream::pair().expect("pair").0).expect("credentials").map(Peer::other);
        (dir, Reconnects::new(listener), other)
    }

    fn closer() -> Closer {
        let wake = crate::event::Event::new().expect("event");
        Closer::new(std::sync::Arc::new(wake.into())).expect("thread")
    }

    #[test]
    fn strangers_wait_in_order_and_the_dead_make_room() {
        let (dir, mut reconnects, other) = setup();
        reconnects.turn_away(other);
        let connect = || UnixStream::connect(dir.path().join("s")).expect("connect");
        let mut alive: Vec<_> = (0..WAITING_MAX + 1).map(|_| connect()).collect();
        (0..WAITING_MAX).for_each(|_| assert!(reconnects.sort(&closer()).expect("sorted")));
        assert!(!reconnects.sort(&closer()).expect("no room"));
        drop(alive.remove(0));
        assert!(reconnects.sort(&closer()).expect("room"));
        let count = std::iter::from_fn(|| reconnects.next().expect("accepted")).count();
        assert_eq!(count, WAITING_MAX);
    }

    #[test]
    fn without_anybody_to_turn_away_all_stay_in_the_backlog() {
        let (dir, mut reconnects, _) = setup();
        let _one = UnixStream::connect(dir.path().join("s")).expect("connect");
        assert!(!reconnects.sort(&closer()).expect("sorted"));
        assert!(reconnects.next().expect("accepted").is_some());
    }
}
