//! Stands between a front-end and the vhost-user-backend crate, which knows nothing of in-flight
//! tracking: takes out the messages of that feature and answers them, and passes on all others.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::inflight::{Inflight, RegionError, Verdict};
use crate::message_socket::{MessageSocket, SocketError};

/// How a connection came to its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("it is time to stop")]
    Stopped,
    #[error("{0}")]
    Left(SocketError),
    #[error("it was disconnected: {0}")]
    Refused(#[from] RegionError),
    /// The crate has said why, or will.
    #[error("the connection was closed by this side")]
    Closed,
    #[error("cannot wait: {0}")]
    Wait(Errno),
}

/// A listener with one connection in its backlog, and the other end of that. The crate accepts
/// connections and takes none that exist; nobody else can get at this one, since its name is gone.
pub(super) fn private_pair() -> io::Result<(UnixListener, UnixStream)> {
    let directory = tempfile::Builder::new().prefix("vvu-").tempdir()?;
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path)?;
    let stream = UnixStream::connect(&path)?;
    Ok((listener, stream))
}

/// Moves messages between the two until one leaves or `stop` is readable.
pub(super) fn relay(
    frontend: UnixStream,
    backend: UnixStream,
    inflight: &Inflight,
    stop: BorrowedFd<'_>,
) -> End {
    let mut relay =
        Relay { frontend: MessageSocket::new(frontend), backend: MessageSocket::new(backend), inflight };
    loop {
        match relay.turn(stop) {
            Ok(()) => {}
            Err(end) => return end,
        }
    }
}

struct Relay<'i> {
    frontend: MessageSocket,
    backend: MessageSocket,
    inflight: &'i Inflight,
}

impl Relay<'_> {
    /// Waits, then moves at most one message each way. A message is taken only when it can be given
    /// away, so memory is bounded.
    ///
    /// A front-end that asks about in-flight tracking while it has not yet heard the answer to an
    /// earlier question may get the two in the other order.
    fn turn(&mut self, stop: BorrowedFd<'_>) -> Result<(), End> {
        let answers = !self.frontend.is_congested();
        let requests = answers && !self.backend.is_congested();
        let mut fds = vec![PollFd::from_borrowed_fd(stop, PollFlags::IN)];
        for (socket, readable) in [(&self.frontend, requests), (&self.backend, answers)] {
            let mut events = PollFlags::empty();
            events.set(PollFlags::IN, readable);
            events.set(PollFlags::OUT, socket.is_congested());
            // A socket nothing is wanted of is left out: its hang-up would end every wait.
            if !events.is_empty() {
                fds.push(PollFd::new(socket, events));
            }
        }
        match poll(&mut fds, None) {
            Ok(_) if !fds[0].revents().is_empty() => return Err(End::Stopped),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(End::Wait(error)),
        }
        self.frontend.flush().map_err(End::Left)?;
        self.backend.flush().map_err(|_| End::Closed)?;
        // Answers first, in case the back-end has hung up on a front-end whose last request it refused.
        if answers && let Some(answer) = self.backend.receive().map_err(|_| End::Closed)? {
            self.frontend.send(answer.bytes, answer.fds).map_err(End::Left)?;
        }
        if requests && let Some(request) = self.frontend.receive().map_err(End::Left)? {
            match self.inflight.examine(request)? {
                Verdict::Pass(request) => {
                    self.backend.send(request.bytes, request.fds).map_err(|_| End::Closed)?;
                }
                Verdict::Done(Some(answer)) => {
                    self.frontend.send(answer.bytes, answer.fds).map_err(End::Left)?;
                }
                Verdict::Done(None) => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "connection_test.rs"]
mod tests;
