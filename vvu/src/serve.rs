//! Serves a vhost-user back-end of this process through a vvu device.

use std::fmt::{Debug, Display};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use crate::bridge::{BackendSocket, Bridge, BridgeError, Options, Retry};
use crate::driver::express::find::{self, FindError};
use crate::driver::sysfs::PciSysfs;
use crate::driver::vfio::{VfioDevice, VfioOpenError};
use crate::driver::{Driver, DriverError};
use crate::event::StopToken;
use crate::listening_socket::connect_now;
use crate::pci::PciDevice;
use crate::spec::addr::Bdf;
use crate::window::{self, Window, WindowError};

/// A vvu device of this machine cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// VFIO does not open the device.
    #[error(transparent)]
    Vfio(#[from] VfioOpenError),
    /// The device cannot be driven.
    #[error("cannot drive {bdf}: {source}")]
    Driver {
        /// The device.
        bdf: Bdf,
        /// The cause.
        source: DriverError,
    },
    /// The device has no window, and [`WindowUse::Required`] asks for one.
    #[error("{bdf} cannot have the sibling's memory in a window: {source}")]
    Window {
        /// The device.
        bdf: Bdf,
        /// The cause.
        source: WindowError,
    },
}

/// When a back-end gets the sibling's memory in a [window](crate::window), and not in the shared memory BAR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WindowUse {
    /// When there is one.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always: without one the device is not opened.
    Required,
}

/// A back-end does not serve a vvu device any longer; `E` is the back-end's own error.
#[derive(Debug, thiserror::Error)]
pub enum ServeError<E: Debug + Display> {
    /// The device cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// There is no file descriptor left, or no thread.
    #[error("cannot start the back-end: {0}; check the limits on open files and threads")]
    Start(#[source] io::Error),
    /// No directory can be made for the back-end's socket.
    #[error("cannot make a directory in {parent:?}: {source}; set TMPDIR to a directory that can be written")]
    Directory {
        /// The directory for temporary files.
        parent: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The bridge between device and back-end ended.
    #[error(transparent)]
    Bridge(#[from] BridgeError),
    /// The back-end ended with an error.
    #[error("{0}")]
    Backend(E),
    /// The back-end panicked.
    #[error("the back-end panicked: this is a bug of the back-end")]
    Panicked,
}

/// Opens the vvu device `bdf` of this machine through VFIO and brings it up. The device has to be bound to vfio-pci:
/// `vvu bind BDF` does that. If the machine has an express device for it that is bound as well, the driver uses it; the
/// same holds for its window.
///
/// # Errors
/// [`OpenError`].
pub fn open_vfio(bdf: Bdf) -> Result<Driver<VfioDevice>, OpenError> {
    open_vfio_with(bdf, WindowUse::Auto)
}

/// Opens a vvu device as [`open_vfio`] does, with or without a window.
///
/// # Errors
/// [`OpenError`].
pub fn open_vfio_with(bdf: Bdf, window: WindowUse) -> Result<Driver<VfioDevice>, OpenError> {
    let sysfs = PciSysfs::default();
    let device = VfioDevice::open(sysfs.clone(), bdf)?;
    let mut driver = Driver::new(device).map_err(|source| OpenError::Driver { bdf, source })?;
    match find::attach(&sysfs, bdf, &mut driver) {
        Ok(express) => log::info!("{bdf} notifies the sibling through the express device {express}"),
        Err(error @ FindError::Absent) => log::info!("{bdf} notifies the sibling through the proxy: {error}"),
        Err(error) => log::warn!("{bdf} notifies the sibling through the proxy: {error}"),
    }
    use_window(bdf, window, &mut driver)?;
    Ok(driver)
}

/// Makes the driver use its window if `wanted` says so, and says in one line of the log what is used.
fn use_window<D: PciDevice>(bdf: Bdf, wanted: WindowUse, driver: &mut Driver<D>) -> Result<(), OpenError> {
    if wanted == WindowUse::Off {
        return Ok(());
    }
    match window::attach(driver) {
        Ok(Window { memory, believes_info_blocks: false }) => {
            log::info!("{bdf} has the sibling's memory in a window on {memory}");
        }
        Ok(Window { memory, believes_info_blocks: true }) => log::warn!(
            "{bdf} has the sibling's memory in a window on {memory}, and this kernel believes NVDIMM info blocks, which the \
             sibling's VMM can write: where that must not be trusted, use a kernel without CONFIG_NVDIMM_PFN and \
             CONFIG_NVDIMM_DAX"
        ),
        Err(source) if wanted == WindowUse::Required => return Err(OpenError::Window { bdf, source }),
        Err(error @ WindowError::NotOffered) => {
            log::info!("{bdf} has the sibling's memory in its BAR: {error}")
        }
        Err(error) => log::warn!("{bdf} has the sibling's memory in its BAR: {error}"),
    }
    Ok(())
}

/// Serves a device: `backend` gets one connected vhost-user stream after the other, each for one front-end, and
/// returns when it is done with it. Calls `ready` once, when the first front-end can connect.
///
/// Returns when the stop is requested, when `backend` returns an error, or when the device is gone. The stream that
/// `backend` serves is hung up then, and `backend` has to return. A back-end that hangs up on a front-end for any
/// reason gets a new stream for the next one.
///
/// # Errors
/// [`ServeError`].
pub fn serve<D: PciDevice, E: Debug + Display + Send>(
    driver: Driver<D>,
    stop: &StopToken,
    ready: impl FnOnce(),
    mut backend: impl FnMut(UnixStream) -> Result<(), E> + Send,
) -> Result<(), ServeError<E>> {
    let (streams, accepted): (_, Receiver<UnixStream>) = channel();
    let options = Options { backend: BackendSocket::Pair(streams), retry: Retry::Forever };
    run(driver, options, stop, ready, move || accepted.into_iter().try_for_each(&mut backend), || {})
}

/// Serves a device as [`serve`] does, with a back-end that listens on a socket itself: `backend` gets the path of a
/// private socket that does not exist yet, and takes one connection after the other there, each for one front-end.
/// `VhostUserDaemon::serve` of the `vhost-user-backend` crate takes one and returns.
///
/// Returns when `backend` does, when the stop is requested, or when the device is gone. A connection that is open or
/// awaited is hung up then, no socket can be made at the path any more, and `stop` is requested in any case:
/// `backend` has to return.
///
/// # Errors
/// [`ServeError`].
pub fn serve_socket<D: PciDevice, E: Debug + Display + Send>(
    driver: Driver<D>,
    stop: &StopToken,
    ready: impl FnOnce(),
    backend: impl FnOnce(&Path) -> Result<(), E> + Send,
) -> Result<(), ServeError<E>> {
    let failed = |source| ServeError::Directory { parent: std::env::temp_dir(), source };
    let directory = SocketDirectory::new().map_err(failed)?;
    let socket = directory.socket();
    let options = Options { backend: BackendSocket::Connect(socket.clone()), retry: Retry::Forever };
    run(
        driver,
        options,
        stop,
        ready,
        move || backend(&socket),
        || {
            stop.stop();
            directory.close();
        },
    )
}

/// Serves the vvu device `bdf` of this machine as [`serve_socket`] does, until `backend` returns or the device is gone.
///
/// # Errors
/// [`ServeError`].
pub fn serve_vfio<E: Debug + Display + Send>(
    bdf: Bdf,
    backend: impl FnOnce(&Path) -> Result<(), E> + Send,
) -> Result<(), ServeError<E>> {
    let driver = open_vfio(bdf)?;
    let stop = StopToken::new().map_err(ServeError::Start)?;
    serve_socket(driver, &stop, || log::info!("ready on {bdf}"), backend)
}

/// Runs the bridge here and the back-end in a thread until one of them ends. Calls `end` when the bridge has ended.
fn run<D: PciDevice, E: Debug + Display + Send>(
    driver: Driver<D>,
    options: Options,
    stop: &StopToken,
    ready: impl FnOnce(),
    backend: impl FnOnce() -> Result<(), E> + Send,
    end: impl FnOnce(),
) -> Result<(), ServeError<E>> {
    let (ended, alive) = UnixStream::pair().map_err(ServeError::Start)?;
    thread::scope(|scope| {
        let backend = thread::Builder::new().name("back-end".to_owned()).spawn_scoped(scope, move || {
            let _alive = alive;
            backend()
        });
        let backend = backend.map_err(ServeError::Start)?;
        let mut bridge = Bridge::new(driver, options);
        let bridged = bridge.run(&[stop.as_fd(), ended.as_fd()], ready);
        // Closes the back-end's connection, or the channel that its streams come from.
        drop(bridge);
        end();
        // An error of the back-end comes first: the bridge only saw the back-end hang up.
        backend.join().map_err(|_| ServeError::Panicked)?.map_err(ServeError::Backend)?;
        Ok(bridged?)
    })
}

/// A private directory for one socket.
struct SocketDirectory(tempfile::TempDir);

impl SocketDirectory {
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

    /// Hangs up on a back-end that waits for a connection, and lets nobody listen at the path again.
    fn close(&self) {
        let closed = self.0.path().join(Self::CLOSED);
        // First the path, so that a back-end that is woken up does not wait again.
        if let Err(error) = std::fs::rename(self.0.path().join(Self::OPEN), &closed) {
            log::error!("cannot close {:?}: {error}", self.0.path());
        }
        // Fails when nobody listens, and then there is nobody to wake up.
        let _ = connect_now(&closed.join(Self::SOCKET));
    }
}
