//! Finds the back-end and makes sure that it is alive.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost::vhost_user::message::FrontendReq;

use super::{Absent, BridgeError, Meeting, Options, wait};
use crate::listening_socket::ListeningSocket;
use crate::message_socket::{MessageSocket, SocketError};
use crate::spec::vhost_user::Header;

/// How soon a back-end that is not there is looked for again: one that is about to listen is found at once.
const FIRST_RETRY: Duration = Duration::from_millis(5);
/// How often it is looked for in the long run.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);
/// How long a back-end that must be there may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Flags of a request that wants no acknowledgement: the protocol's version.
const VERSION: u32 = 1;

/// Connects to the back-end; `None` if it is time to stop.
///
/// A connection says little: the kernel makes one with a process that is about to close its socket,
/// or that serves somebody else. So the back-end is asked for its features, which any front-end may
/// do at any time, and only one that answers is used.
pub(super) fn connect(options: &Options, stop: BorrowedFd<'_>) -> Result<Option<MessageSocket>, BridgeError> {
    let deadline = match options.absent {
        Absent::Fail => Some(Instant::now() + ANSWER_TIME),
        Absent::WaitFor(time) => Some(Instant::now() + time),
        Absent::Wait => None,
    };
    let (mut announced, mut pause) = (false, FIRST_RETRY);
    loop {
        let source = match attempt(&options.meeting, stop, deadline)? {
            Attempt::Alive(socket) => return Ok(Some(socket)),
            Attempt::Stopped => return Ok(None),
            Attempt::Failed(source) => source,
        };
        let socket = options.meeting.path().to_owned();
        let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if options.absent == Absent::Fail || late {
            return Err(BridgeError::Connect { socket, source });
        }
        if pause == RETRY_INTERVAL && !std::mem::replace(&mut announced, true) {
            log::info!("waiting for a back-end on {socket:?}: {source}");
        }
        if wait_for(&[stop], Some(pause))? {
            return Ok(None);
        }
        pause = (pause * 2).min(RETRY_INTERVAL);
    }
}

enum Attempt {
    Alive(MessageSocket),
    Failed(io::Error),
    Stopped,
}

fn attempt(
    meeting: &Meeting,
    stop: BorrowedFd<'_>,
    deadline: Option<Instant>,
) -> Result<Attempt, BridgeError> {
    let left = || deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let opened = match meeting {
        Meeting::Connect(path) => open(path),
        Meeting::Listen(socket) => {
            wait_for(&[stop, socket.as_fd()], left())?;
            if wait_for(&[stop], Some(Duration::ZERO))? {
                return Ok(Attempt::Stopped);
            }
            accept(socket)
        }
    };
    let mut socket = match opened.and_then(ask) {
        Ok(socket) => socket,
        Err(source) => return Ok(Attempt::Failed(source)),
    };
    loop {
        match socket.receive() {
            Ok(Some(answer)) if is_answer(answer.header) => return Ok(Attempt::Alive(socket)),
            Ok(Some(_)) => return Ok(Attempt::Failed(io::Error::other("it does not speak vhost-user"))),
            Ok(None) => {}
            Err(error) => return Ok(Attempt::Failed(io::Error::other(error))),
        }
        let left = left();
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(Attempt::Failed(io::Error::other("it does not answer; does it serve somebody else?")));
        }
        wait_for(&[stop, socket.as_fd()], left)?;
        if wait_for(&[stop], Some(Duration::ZERO))? {
            return Ok(Attempt::Stopped);
        }
    }
}

/// Takes the connection of a back-end, without waiting: nobody there counts as a failure.
fn accept(socket: &ListeningSocket) -> io::Result<UnixStream> {
    if !wait_for(&[socket.as_fd()], Some(Duration::ZERO)).map_err(io::Error::other)? {
        return Err(io::Error::other("no back-end has connected"));
    }
    let (stream, _) = socket.listener().accept()?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// Connects, without waiting: a backlog that is full counts as a failure.
pub(super) fn open(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(fd))
}

/// Asks for the features.
fn ask(stream: UnixStream) -> io::Result<MessageSocket> {
    let mut socket = MessageSocket::new(stream);
    let question = Header { request: FrontendReq::GET_FEATURES.into(), flags: VERSION, size: 0 };
    socket.send(question.to_bytes().to_vec(), Vec::new()).map_err(|error| match error {
        SocketError::Io(errno) => errno.into(),
        error => io::Error::other(error),
    })?;
    Ok(socket)
}

fn is_answer(header: Header) -> bool {
    header.is_reply() && header.request == u32::from(FrontendReq::GET_FEATURES)
}

/// Whether one of `fds` is readable, or closed at its other end, within `time`.
fn wait_for(fds: &[BorrowedFd<'_>], time: Option<Duration>) -> Result<bool, BridgeError> {
    let mut fds: Vec<_> = fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    let time = time.map(|time| Timespec::try_from(time).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 }));
    wait(&mut fds, time).map(|count| count != 0)
}
