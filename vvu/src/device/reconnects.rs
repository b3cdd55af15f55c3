//! Front-ends that come when there is no back-end.
//!
//! One that a VMM makes when it starts may wait: its guest does not run yet. One that comes back because the back-end
//! left may not: its guest runs, and a VMM that waits for an answer on the new connection (QEMU does so with its big
//! lock held) stops it. It is hung up on, so that it tries again later.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, recvmsg};

use super::peer::Peer;

/// Most connections that wait outside of the socket's backlog.
const WAITING_MAX: usize = 8;

/// A front-end that may be served, and its process if that can be told.
pub(crate) type Visitor = (UnixStream, Option<Peer>);

#[derive(Debug, Default)]
pub(crate) struct Visitors {
    waiting: VecDeque<Visitor>,
    /// The process whose session ended because the driver went.
    bereft: Option<Peer>,
}

impl Visitors {
    /// From now on `peer` is hung up on until the driver is ready; with `None`, nobody is.
    pub(crate) fn set_bereft(&mut self, peer: Option<Peer>) {
        self.bereft = peer;
    }

    /// The next front-end to serve, or `None` if there is none.
    pub(crate) fn next(&mut self, listener: &UnixListener) -> io::Result<Option<Visitor>> {
        match self.waiting.pop_front() {
            Some(visitor) => Ok(Some(visitor)),
            None => accept(listener),
        }
    }

    /// Looks at one of those that came; false if there is none, or no need to look.
    pub(crate) fn sort(&mut self, listener: &UnixListener) -> io::Result<bool> {
        if self.waiting.len() == WAITING_MAX {
            self.waiting.retain(|(stream, _)| !has_left(stream));
        }
        if self.bereft.is_none() || self.waiting.len() == WAITING_MAX {
            return Ok(false);
        }
        let Some(visitor) = accept(listener)? else { return Ok(false) };
        if visitor.1 == self.bereft {
            log::debug!("hung up on a front-end that came back before the back-end did");
        } else {
            self.waiting.push_back(visitor);
        }
        Ok(true)
    }
}

fn has_left(stream: &UnixStream) -> bool {
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    match recvmsg(stream, &mut parts, &mut RecvAncillaryBuffer::default(), flags) {
        Ok(message) => message.bytes == 0,
        Err(error) => error != Errno::AGAIN,
    }
}

fn accept(listener: &UnixListener) -> io::Result<Option<Visitor>> {
    match listener.accept() {
        Ok((stream, _)) => {
            let peer = Peer::of(&stream)?;
            Ok(Some((stream, peer)))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A listener and a peer that is not this process.
    fn setup() -> (tempfile::TempDir, UnixListener, Option<Peer>) {
        let dir = tempfile::tempdir().expect("directory");
        let listener = UnixListener::bind(dir.path().join("s")).expect("bind");
        listener.set_nonblocking(true).expect("non-blocking");
        let other = Peer::of(&UnixStream::pair().expect("pair").0).expect("credentials").map(Peer::other);
        (dir, listener, other)
    }

    #[test]
    fn strangers_wait_in_order_and_the_dead_make_room() {
        let (dir, listener, bereft) = setup();
        let mut visitors = Visitors::default();
        visitors.set_bereft(bereft);
        let connect = || UnixStream::connect(dir.path().join("s")).expect("connect");
        let mut alive: Vec<_> = (0..WAITING_MAX + 1).map(|_| connect()).collect();
        (0..WAITING_MAX).for_each(|_| assert!(visitors.sort(&listener).expect("sorted")));
        assert!(!visitors.sort(&listener).expect("no room"));
        drop(alive.remove(0));
        assert!(visitors.sort(&listener).expect("room"));
        let count = std::iter::from_fn(|| visitors.next(&listener).expect("accepted")).count();
        assert_eq!(count, WAITING_MAX);
    }

    #[test]
    fn without_anybody_bereft_all_stay_in_the_backlog() {
        let (dir, listener, _) = setup();
        let mut visitors = Visitors::default();
        let _one = UnixStream::connect(dir.path().join("s")).expect("connect");
        assert!(!visitors.sort(&listener).expect("sorted"));
        assert!(visitors.next(&listener).expect("accepted").is_some());
    }
}
