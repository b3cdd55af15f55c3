//! Taking over what a predecessor has left.

#![expect(unsafe_code, reason = "a number in the saved state becomes the owner of its descriptor")]

use std::collections::BTreeSet;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::net::sockopt::socket_acceptconn;

use super::Fd;
use crate::event::wait_any;

/// The saved state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// It names a descriptor that is not open, or that it names twice.
    #[error("the saved state names file descriptor {0}, which the last worker did not leave")]
    Fd(RawFd),
    /// It is not what this program saves.
    #[error("the saved state is damaged: {0}")]
    Format(#[from] serde_json::Error),
    /// A system call failed.
    #[error("cannot take the saved state over: {0}")]
    Io(#[from] std::io::Error),
    /// Something else in it is wrong.
    #[error("the saved state is damaged: {0}")]
    Value(String),
}

/// The descriptors that a predecessor has left, each of which is adopted once.
#[derive(Debug)]
pub struct Adopted(BTreeSet<RawFd>);

impl Adopted {
    /// All of `left`.
    ///
    /// # Safety
    /// They are open, and no value of this process owns one of them.
    #[must_use]
    pub unsafe fn new(left: impl IntoIterator<Item = RawFd>) -> Self {
        Self(left.into_iter().collect())
    }

    /// Becomes the owner of the descriptor with this number.
    ///
    /// # Errors
    /// [`RestoreError::Fd`].
    pub fn adopt(&mut self, number: RawFd) -> Result<Fd, RestoreError> {
        if !self.0.remove(&number) {
            return Err(RestoreError::Fd(number));
        }
        // SAFETY: it is open, and so far nobody owns it.
        Ok(Fd::from(unsafe { OwnedFd::from_raw_fd(number) }))
    }

    /// Adopts the descriptor with this number, if there is one.
    ///
    /// # Errors
    /// [`RestoreError::Fd`].
    pub fn adopt_some(&mut self, number: Option<RawFd>) -> Result<Option<Fd>, RestoreError> {
        number.map(|number| self.adopt(number)).transpose()
    }

    /// Adopts the connections to `listener` that the predecessor accepted and did not come to save. Those that are over may be
    /// ones that it did not come to close.
    #[must_use]
    pub fn connections_to(&mut self, listener: &UnixListener) -> Vec<UnixStream> {
        let own = listener.local_addr().ok();
        let own = own.as_ref().and_then(|address| address.as_pathname());
        let mut connections = Vec::new();
        for fd in self.rest() {
            let stream = UnixStream::from(fd.into_inner());
            let address = stream.local_addr().ok();
            let to_own = own.is_some() && address.as_ref().and_then(|address| address.as_pathname()) == own;
            if to_own && socket_acceptconn(&stream) == Ok(false) && !is_over(&stream) {
                connections.push(stream);
            } else {
                self.0.insert(stream.into_raw_fd());
            }
        }
        connections
    }

    /// Adopts all that are left.
    #[must_use]
    pub fn rest(&mut self) -> Vec<Fd> {
        let rest: Vec<_> = self.0.iter().copied().collect();
        rest.into_iter().filter_map(|number| self.adopt(number).ok()).collect()
    }
}

/// Whether either side has closed the connection or shut it down.
fn is_over(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    wait_any(&mut fds, Some(Instant::now())).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_adopted_and_nothing_else_is() {
        let directory = tempfile::tempdir().expect("directory");
        let [own, other] = ["own", "other"].map(|name| directory.path().join(name));
        let [own_listener, other_listener] =
            [&own, &other].map(|path| UnixListener::bind(path).expect("bind"));
        let accepted = |listener: &UnixListener| listener.accept().expect("accept").0;
        let _peer = UnixStream::connect(&own).expect("connect");
        let live = accepted(&own_listener).into_raw_fd();
        drop(UnixStream::connect(&own).expect("connect"));
        let over = accepted(&own_listener).into_raw_fd();
        let _other_peer = UnixStream::connect(&other).expect("connect");
        let foreign = accepted(&other_listener).into_raw_fd();
        let listener = own_listener.try_clone().expect("dup").into_raw_fd();
        let file = std::fs::File::open("/dev/null").expect("file").into_raw_fd();
        // SAFETY: nothing else owns these descriptors.
        let mut left = unsafe { Adopted::new([live, over, foreign, listener, file]) };
        let adopted = left.connections_to(&own_listener);
        assert_eq!(adopted.into_iter().map(IntoRawFd::into_raw_fd).collect::<Vec<_>>(), [live]);
        assert!(left.adopt(file).is_ok() && left.adopt(file).is_err());
        assert_eq!(left.rest().len(), 3);
    }
}
