//! Serves front-ends, one after another.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use vhost::vhost_user::{BackendReqHandler, Error};

use super::handler::Handler;
use crate::event::{StopToken, wait_any, wait_readable};
use crate::shortage::is_shortage;
use crate::spec::vhost_user::{HEADER_SIZE, Header, REGIONS_MAX};

/// How long to wait before a front-end that could not even be hung up on is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Why a back-end serves no longer, although nobody has told it to stop.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket could not be waited for.
    #[error("cannot wait for the next front-end: {0}")]
    Wait(#[from] io::Error),
}

/// How a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("it is time to stop")]
    Stopped,
    #[error("the front-end left")]
    Left,
    #[error("the front-end left in the middle of a message")]
    LeftInMessage,
    #[error("{0}")]
    Refused(Error),
    #[error(
        "a message has more than {REGIONS_MAX} descriptors, or there are too few left: check `ulimit -n`"
    )]
    Descriptors,
    #[error("cannot wait: {0}")]
    Wait(#[from] io::Error),
}

/// Serves the front-ends that connect to `listener`, one at a time and each with a handler of its own, until `stop`.
/// Nobody can connect to `listener` after that. A front-end that breaks the protocol, or for which there are no
/// descriptors or threads, loses its connection, and no more.
///
/// # Errors
/// [`ServeError`].
pub(super) fn serve(
    listener: &UnixListener,
    stop: &StopToken,
    new_handler: impl Fn() -> Handler,
) -> Result<(), ServeError> {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    let mut reserve = Reserve::new(listener);
    while wait_readable(&[stop.as_fd(), listener.as_fd()], None)? == Some(1) {
        match listener.accept() {
            Ok((frontend, _)) => serve_frontend(frontend, stop, new_handler(), || close(listener)),
            Err(error) if is_shortage(&error) => {
                log::warn!("a front-end was hung up on: {error}");
                if !reserve.hang_up() {
                    // The shortage is that of the whole system. The front-end stays where it is meanwhile.
                    wait_readable(&[stop.as_fd()], Some(Instant::now() + RETRY_INTERVAL))?;
                }
            }
            // The front-end has left already, or the call was interrupted.
            Err(error) if matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock) => {}
            Err(error) => return Err(error.into()),
        }
    }
    close(listener);
    Ok(())
}

/// A descriptor that is kept to be able to take a connection, and close it, when there is no other left.
struct Reserve<'l> {
    listener: &'l UnixListener,
    descriptor: Option<UnixListener>,
}

impl<'l> Reserve<'l> {
    fn new(listener: &'l UnixListener) -> Self {
        Self { listener, descriptor: listener.try_clone().ok() }
    }

    /// Hangs up on the front-end that waits to be accepted. Returns whether that was possible.
    fn hang_up(&mut self) -> bool {
        self.descriptor = None;
        let done = self.listener.accept().is_ok();
        self.descriptor = self.listener.try_clone().ok();
        done
    }
}

/// Lets nobody connect to `listener` any more, so that a front-end which connects again at once finds nobody here
/// rather than wait for a server that is about to end.
fn close(listener: &UnixListener) {
    if let Err(error) = rustix::net::shutdown(listener, rustix::net::Shutdown::Both) {
        log::warn!("cannot close the listening socket: {error}");
    }
}

/// Serves one front-end until it leaves or breaks the protocol, or until `stop`. In the latter case calls `stopping`
/// before the front-end is disconnected.
pub(super) fn serve_frontend(
    frontend: UnixStream,
    stop: &StopToken,
    handler: Handler,
    stopping: impl FnOnce(),
) {
    log::info!("front-end connected");
    let handler = Arc::new(Mutex::new(handler));
    let end = match Connection::new(frontend, Arc::clone(&handler)) {
        Ok(mut connection) => {
            let end = connection.run(stop);
            if matches!(end, End::Stopped) {
                stopping();
            }
            // Before the front-end sees the end of the connection: it may use its memory for something else then.
            handler.lock().unwrap_or_else(PoisonError::into_inner).end();
            end
        }
        Err(error) => End::Wait(error),
    };
    match end {
        End::Left | End::Stopped => log::info!("front-end disconnected"),
        end => log::warn!("front-end disconnected: {end}"),
    }
}

/// The connection of one front-end.
///
/// The vhost crate's handler reads a message and writes the answer in blocking mode. It is given a message only when
/// the whole of it has arrived and the socket has room for an answer, so it never waits for the front-end.
struct Connection {
    stream: UnixStream,
    /// Becomes ready whenever something new arrives on the stream.
    arrivals: OwnedFd,
    requests: BackendReqHandler<Mutex<Handler>>,
}

/// What has arrived of the next message.
enum Arrived {
    Nothing,
    Part,
    Whole,
}

impl Connection {
    fn new(stream: UnixStream, handler: Arc<Mutex<Handler>>) -> io::Result<Self> {
        let arrivals = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let events = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&arrivals, &stream, EventData::new_u64(0), events)?;
        let requests = BackendReqHandler::from_stream(stream.try_clone()?, handler);
        Ok(Self { stream, arrivals, requests })
    }

    fn run(&mut self, stop: &StopToken) -> End {
        let mut closed = false;
        loop {
            let step = match self.arrived() {
                Ok(Arrived::Whole) => self.answer(stop),
                Ok(Arrived::Nothing) if closed => return End::Left,
                Ok(Arrived::Part) if closed => return End::LeftInMessage,
                // What is there of a message is readable all the time, so only its next piece ends the wait. Without any,
                // whatever is readable does: a look that a signal interrupted has seen nothing.
                Ok(Arrived::Part) => {
                    self.await_arrival(stop, &self.arrivals).map(|is_closed| closed |= is_closed)
                }
                Ok(Arrived::Nothing) => {
                    self.await_arrival(stop, &self.stream).map(|is_closed| closed |= is_closed)
                }
                Err(end) => Err(end),
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    /// Looks at what has arrived, without taking it.
    ///
    /// The descriptors are duplicated for the look: the crate waits for another message when it cannot take all of
    /// them.
    fn arrived(&self) -> Result<Arrived, End> {
        let mut header = [0; HEADER_SIZE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(REGIONS_MAX))];
        let mut descriptors = RecvAncillaryBuffer::new(&mut space);
        let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let count = match recvmsg(&self.stream, &mut [IoSliceMut::new(&mut header)], &mut descriptors, peek) {
            Ok(got) => {
                let rights = descriptors.drain().map(|message| match message {
                    RecvAncillaryMessage::ScmRights(descriptors) => descriptors.count(),
                    _ => 0,
                });
                if rights.sum::<usize>() > REGIONS_MAX || got.flags.contains(ReturnFlags::CTRUNC) {
                    return Err(End::Descriptors);
                }
                got.bytes
            }
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(Errno::CONNRESET) => return Err(End::Left),
            Err(error) => return Err(io::Error::from(error).into()),
        };
        if count < HEADER_SIZE {
            return Ok(if count == 0 { Arrived::Nothing } else { Arrived::Part });
        }
        // The crate refuses what is no header, from the header alone.
        let Ok(header) = Header::parse(&header) else { return Ok(Arrived::Whole) };
        let want = HEADER_SIZE + header.payload_size();
        let there = rustix::io::ioctl_fionread(&self.stream).map_err(io::Error::from)?;
        let there = usize::try_from(there).unwrap_or(usize::MAX);
        Ok(if there < want { Arrived::Part } else { Arrived::Whole })
    }

    /// Waits until `source` is readable, and returns whether the front-end has closed its side since the last wait.
    fn await_arrival(&self, stop: &StopToken, source: &impl AsFd) -> Result<bool, End> {
        let stopped = wait_readable(&[stop.as_fd(), source.as_fd()], None)? == Some(0);
        if stopped {
            return Err(End::Stopped);
        }
        let mut events = Vec::with_capacity(1);
        match epoll::wait(&self.arrivals, rustix::buffer::spare_capacity(&mut events), Some(&NO_WAIT)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        Ok(events.iter().any(|event| {
            let flags = event.flags;
            flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR)
        }))
    }

    /// Handles the message that has arrived, once there is room for its answer.
    fn answer(&mut self, stop: &StopToken) -> Result<(), End> {
        let mut fds = [PollFd::new(stop, PollFlags::IN), PollFd::new(&self.stream, PollFlags::OUT)];
        wait_any(&mut fds, None)?;
        if !fds[0].revents().is_empty() {
            return Err(End::Stopped);
        }
        match self.requests.handle_request() {
            Ok(()) => Ok(()),
            Err(Error::Disconnected | Error::SocketBroken(_)) => Err(End::Left),
            Err(error) => Err(End::Refused(error)),
        }
    }
}

const NO_WAIT: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;
