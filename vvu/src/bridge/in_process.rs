//! A back-end in the process of its bridge: the two share a socket that nobody else sees.

use std::fmt::{Debug, Display};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

use rustix::event::epoll;

use super::connect::open;
use super::{Absent, Bridge, BridgeError, Meeting, Options};
use crate::driver::pci_device::PciDevice;
use crate::driver::sysfs::PciSysfs;
use crate::driver::vfio::{VfioDevice, VfioOpenError};
use crate::driver::{Driver, DriverError};
use crate::spec::addr::Bdf;

/// Why a back-end does not serve a vvu device any longer.
#[derive(Debug, thiserror::Error)]
pub enum InProcessError<E: Debug + Display> {
    /// The device cannot be opened.
    #[error(transparent)]
    Open(#[from] VfioOpenError),
    /// The device is not one that can be driven.
    #[error("cannot drive {bdf}: {source}")]
    Driver {
        /// The device.
        bdf: Bdf,
        /// The cause.
        source: DriverError,
    },
    /// There is no place for the socket.
    #[error("cannot make a directory in {parent:?}: {source}; set TMPDIR to one that can be written")]
    Directory {
        /// The place.
        parent: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// There is no file descriptor left.
    #[error("cannot make an event: {0}; check the limit on open files")]
    Event(#[source] io::Error),
    /// The bridge came to an end.
    #[error(transparent)]
    Bridge(#[from] BridgeError),
    /// The back-end came to an end.
    #[error("{0}")]
    Backend(E),
    /// The back-end panicked.
    #[error("the back-end panicked: this is a bug of the back-end")]
    Panicked,
}

/// Lets the vvu device `bdf` of this machine use the back-end that `backend` serves on the socket whose
/// path it is given. Returns when `backend` does, or when the device is gone.
///
/// `backend` has a thread of its own, listens on the socket, and may take one connection after the other;
/// each is one front-end. `VhostUserDaemon::serve` of the `vhost-user-backend` crate takes one and returns.
/// A back-end that hangs up on a front-end, since it misbehaved or for any other reason, is waited for until it listens
/// again; only its own return ends this call.
/// When the device is gone, a connection that is open or awaited is hung up, and no socket can be made at the
/// path any more: `backend` has to return then.
///
/// # Errors
/// [`InProcessError`].
pub fn serve_vfio<E: Debug + Display + Send>(
    bdf: Bdf,
    backend: impl FnOnce(&Path) -> Result<(), E> + Send,
) -> Result<(), InProcessError<E>> {
    let device = VfioDevice::open(PciSysfs::default(), bdf)?;
    let driver = Driver::new(device).map_err(|source| InProcessError::Driver { bdf, source })?;
    let (stop, _never) = UnixStream::pair().map_err(InProcessError::Event)?;
    let ready = || log::info!("ready on {bdf}");
    serve(driver, stop.as_fd(), ready, backend, || {})
}

/// As [`serve_vfio`], on any device, until `stop` is readable. Calls `ready` once, when the first front-end can
/// connect, and `end` when `backend` has to return.
///
/// # Errors
/// [`InProcessError`].
pub fn serve<D: PciDevice, E: Debug + Display + Send>(
    driver: Driver<D>,
    stop: BorrowedFd<'_>,
    ready: impl FnOnce(),
    backend: impl FnOnce(&Path) -> Result<(), E> + Send,
    end: impl FnOnce(),
) -> Result<(), InProcessError<E>> {
    let place =
        Place::new().map_err(|source| InProcessError::Directory { parent: std::env::temp_dir(), source })?;
    let (ended, alive) = UnixStream::pair().map_err(InProcessError::Event)?;
    let until = either(stop, ended.as_fd()).map_err(InProcessError::Event)?;
    let socket = place.socket();
    let options = Options { meeting: Meeting::Connect(socket.clone()), absent: Absent::Wait };
    thread::scope(|scope| {
        let backend = scope.spawn(move || {
            let _alive = alive;
            backend(&socket)
        });
        let mut bridge = Bridge::new(driver, options);
        let bridged = bridge.run(until.as_fd(), ready);
        end();
        place.close();
        // What ended the back-end is the better answer: the bridge only saw it hang up.
        backend.join().map_err(|_| InProcessError::Panicked)?.map_err(InProcessError::Backend)?;
        Ok(bridged?)
    })
}

/// A private directory for one socket.
struct Place(tempfile::TempDir);

impl Place {
    const OPEN: &str = "open";
    const CLOSED: &str = "closed";
    const SOCKET: &str = "back-end";

    fn new() -> io::Result<Self> {
        let directory = tempfile::Builder::new().prefix("vvu-").tempdir()?;
        std::fs::create_dir(directory.path().join(Self::OPEN))?;
        Ok(Self(directory))
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join(Self::OPEN).join(Self::SOCKET)
    }

    /// Hangs up on whoever waits for a connection there, and lets nobody listen there again.
    fn close(&self) {
        let closed = self.0.path().join(Self::CLOSED);
        // First the path, so that a back-end that is woken up does not wait again.
        if let Err(error) = std::fs::rename(self.0.path().join(Self::OPEN), &closed) {
            log::error!("cannot close {:?}: {error}", self.0.path());
        }
        // Fails when nobody listens, and then nobody is to be woken up.
        let _ = open(&closed.join(Self::SOCKET));
    }
}

/// An event for whichever of two is readable first.
fn either(first: BorrowedFd<'_>, second: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for fd in [first, second] {
        epoll::add(&set, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
    }
    Ok(set)
}
