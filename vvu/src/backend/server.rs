//! Serves front-ends one after another.
#![expect(unsafe_code, reason = "closes descriptors that vhost-user-backend forgets")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use vhost::vhost_user::Listener;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::connection::{self, End};
use super::inflight::{Inflight, Limits};
use super::vring::Vring;
use crate::message_socket::SocketError;

/// Memory of the front-end's VM: empty until the front-end describes it.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Why serving came to an end before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Threads or descriptors for a new front-end could not be had.
    #[error("cannot start serving the next front-end: {0}; check the limits on threads and open files")]
    Start(String),
    /// There is no place for a socket of our own.
    #[error("cannot make a socket in {directory:?}: {source}; set TMPDIR to a directory that can be written")]
    Directory {
        /// The place.
        directory: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The socket could not be waited for.
    #[error("cannot wait for the next front-end: {0}")]
    Wait(#[source] io::Error),
}

/// Ends one call of a back-end's `serve` from another thread; clones end the same one.
#[derive(Clone)]
pub struct Stop {
    shared: Arc<Shared>,
}

struct Shared {
    requested: AtomicBool,
    event: OwnedFd,
    listener: OnceLock<UnixListener>,
}

impl Stop {
    /// A handle nobody has used yet.
    ///
    /// # Errors
    /// When there is no file descriptor left.
    pub fn new() -> io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (requested, listener) = (AtomicBool::new(false), OnceLock::new());
        Ok(Self { shared: Arc::new(Shared { requested, event, listener }) })
    }

    /// Disconnects the front-end, if there is one, and makes `serve` return once the requests it
    /// has begun are done. Harmless when repeated.
    pub fn stop(&self) {
        self.shared.requested.store(true, Ordering::SeqCst);
        // First the listener: a front-end that reconnects at once is to find nobody here, rather than
        // to wait in the backlog of a server that is about to go.
        if let Some(listener) = self.shared.listener.get() {
            let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
        }
        // Fails only when the counter is full, and then the event is signalled already.
        let _ = rustix::io::write(&self.shared.event, &1u64.to_ne_bytes());
    }

    /// Whether [`stop`](Self::stop) was called.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        self.shared.requested.load(Ordering::SeqCst)
    }
}

impl std::fmt::Debug for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stop").field("requested", &self.is_requested()).finish_non_exhaustive()
    }
}

/// Serves the front-ends that connect to `listener`, one at a time and each with a device of its
/// own, until `stop` says so, after which nobody can connect to `listener` any more. A front-end that
/// breaks the protocol loses its connection, no more.
///
/// `new_device` gets the front-end's memory, its in-flight tracking, and what is set when the front-end is gone.
///
/// # Errors
/// [`ServeError`].
pub(super) fn serve<D>(
    listener: &UnixListener,
    stop: &Stop,
    limits: Limits,
    new_device: impl Fn(Memory, Arc<Inflight>, Arc<AtomicBool>) -> D,
) -> Result<(), ServeError>
where
    D: VhostUserBackend<Bitmap = (), Vring = Vring> + 'static,
{
    // A second call with the same order would leave its own listener alone, which does no harm.
    let _ = stop.shared.listener.set(listener.try_clone().map_err(ServeError::Wait)?);
    while wait_for_front_end(listener, stop).map_err(ServeError::Wait)? {
        let frontend = match listener.accept() {
            Ok((frontend, _)) => frontend,
            // The listener is closed by now.
            Err(_) if stop.is_requested() => return Ok(()),
            Err(error) => return Err(ServeError::Wait(error)),
        };
        let start = |error: &dyn std::fmt::Display| ServeError::Start(error.to_string());
        let memory = Memory::new(GuestMemoryMmap::new());
        let inflight = Arc::new(Inflight::new(limits));
        let gone = Arc::new(AtomicBool::new(false));
        let device = Arc::new(new_device(memory.clone(), inflight.clone(), gone.clone()));
        let mut daemon =
            VhostUserDaemon::new("vhost-user".to_owned(), device, memory).map_err(|error| start(&error))?;
        let (private, backend) = connection::private_pair()
            .map_err(|source| ServeError::Directory { directory: std::env::temp_dir(), source })?;
        daemon.start(&mut Listener::from(private)).map_err(|error| start(&error))?;
        log::info!("front-end connected");
        let end = connection::relay(frontend, backend, &inflight, stop.shared.event.as_fd());
        // Its driver may go on making requests, and a queue that always has one would never let its thread go.
        gone.store(true, Ordering::Relaxed);
        // Both sockets are closed now, so this is no wait for either peer.
        let outcome = daemon.wait();
        match (end, outcome) {
            (End::Left(SocketError::Closed) | End::Stopped, _) => log::info!("front-end disconnected"),
            (End::Closed, Err(error)) => log::warn!("front-end disconnected: {error}"),
            (end, _) => log::warn!("front-end disconnected: {end}"),
        }
    }
    Ok(())
}

/// Returns true when a front-end can be accepted, false when it is time to stop.
fn wait_for_front_end(listener: &UnixListener, stop: &Stop) -> io::Result<bool> {
    let wait_for = [listener.as_fd(), stop.shared.event.as_fd()];
    loop {
        let mut fds = wait_for.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match rustix::event::poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) if stop.is_requested() => return Ok(false),
            Ok(_) => return Ok(true),
        }
    }
}

/// The events that end a device's worker threads.
///
/// vhost-user-backend 0.24 takes the reading end of each and never closes it, which would cost a
/// descriptor for each queue of each connection. Belongs into the device, since that is the last
/// thing of a connection to go.
#[derive(Debug, Default)]
pub(super) struct ExitEvents {
    consumers: Mutex<Vec<RawFd>>,
}

impl ExitEvents {
    /// What [`VhostUserBackend::exit_event`] returns; none when there is no descriptor left.
    pub(super) fn create(&self) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
            .inspect_err(|error| log::error!("cannot make an event for a worker thread: {error}"))
            .ok()?;
        self.consumers.lock().unwrap_or_else(PoisonError::into_inner).push(consumer.as_raw_fd());
        Some((consumer, notifier))
    }
}

impl Drop for ExitEvents {
    fn drop(&mut self) {
        for fd in self.consumers.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // SAFETY: vhost-user-backend made a raw descriptor of the consumer and forgot it, its
            // worker threads are gone, and so nothing else owns or uses it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}
