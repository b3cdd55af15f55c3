//! Connects to the back-end and makes sure that it answers.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::FrontendReq;

use super::options::{BackendSocket, BridgeError, Options, Retry};
use crate::event::wait_readable;
use crate::listening_socket::connect_now;
use crate::message_socket::{MessageSocket, SocketError};
use crate::spec::vhost_user::Header;

/// First pause between two attempts: a back-end that is about to listen is found at once.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// Longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_millis(200);
/// Time that a back-end gets to answer when it is tried once.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Flags of a request that wants no acknowledgement: the protocol's version.
const VERSION: u32 = 1;

/// Connects to the back-end; `None` if one of `until` is readable.
///
/// A connection proves little: the kernel also makes one with a process that is about to close its socket or that
/// serves another front-end. So the bridge asks for the features, which a front-end may do at any time, and uses
/// the back-end once it has answered.
pub(super) fn connect(
    options: &Options,
    until: &[BorrowedFd<'_>],
) -> Result<Option<MessageSocket>, BridgeError> {
    let now = Instant::now();
    let deadline = match options.retry {
        Retry::Never => Some(now + ANSWER_TIME),
        Retry::For(time) => Some(now + time),
        Retry::Forever => None,
    };
    let (mut announced, mut pause) = (false, FIRST_PAUSE);
    loop {
        let source = match attempt(&options.backend, until, deadline)? {
            Attempt::Answered(socket) => return Ok(Some(socket)),
            Attempt::Stopped => return Ok(None),
            Attempt::Failed(source) => source,
        };
        let socket = options.backend.name();
        let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if options.retry == Retry::Never || late {
            return Err(BridgeError::Connect { socket, source });
        }
        if pause == LONGEST_PAUSE && !std::mem::replace(&mut announced, true) {
            log::info!("waiting for a back-end on {socket}: {source}");
        }
        let again = Instant::now() + pause;
        if wait_readable(until, Some(again)).map_err(BridgeError::wait)?.is_some() {
            return Ok(None);
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

enum Attempt {
    Answered(MessageSocket),
    Failed(io::Error),
    Stopped,
}

/// Waits for `fd` until the deadline; true if one of `until` was readable first.
fn is_stopped(
    fd: BorrowedFd<'_>,
    until: &[BorrowedFd<'_>],
    deadline: Option<Instant>,
) -> Result<bool, BridgeError> {
    let fds = [until, &[fd]].concat();
    let first = wait_readable(&fds, deadline).map_err(BridgeError::wait)?;
    Ok(first.is_some_and(|index| index < until.len()))
}

fn attempt(
    backend: &BackendSocket,
    until: &[BorrowedFd<'_>],
    deadline: Option<Instant>,
) -> Result<Attempt, BridgeError> {
    let opened = match backend {
        BackendSocket::Connect(path) => connect_now(path),
        BackendSocket::Listen(listener) => {
            if is_stopped(listener.as_fd(), until, deadline)? {
                return Ok(Attempt::Stopped);
            }
            accept(listener)
        }
        BackendSocket::Pair(sender) => UnixStream::pair().and_then(|(ours, theirs)| {
            sender.send(theirs).map_err(|_| io::Error::other("the back-end has ended"))?;
            Ok(ours)
        }),
    };
    let mut socket = match opened.and_then(ask) {
        Ok(socket) => socket,
        Err(source) => return Ok(Attempt::Failed(source)),
    };
    loop {
        match socket.receive() {
            Ok(Some(answer)) if is_answer(answer.header) => return Ok(Attempt::Answered(socket)),
            Ok(Some(_)) => return Ok(Attempt::Failed(io::Error::other("it does not speak vhost-user"))),
            Ok(None) => {}
            Err(error) => return Ok(Attempt::Failed(io::Error::other(error))),
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(Attempt::Failed(io::Error::other(
                "it does not answer; does it serve another front-end?",
            )));
        }
        if is_stopped(socket.as_fd(), until, deadline)? {
            return Ok(Attempt::Stopped);
        }
    }
}

/// Accepts a connection of the back-end without waiting.
fn accept(listener: &UnixListener) -> io::Result<UnixStream> {
    if wait_readable(&[listener.as_fd()], Some(Instant::now()))?.is_none() {
        return Err(io::Error::other("no back-end has connected"));
    }
    let (stream, _) = listener.accept()?;
    Ok(stream)
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
