//! The bridge: gives the messages of a vvu device to an ordinary vhost-user back-end, with the file
//! descriptors that the messages lost on their way.
//!
//! One session at a time. The bridge finds a back-end that answers and only then lets a front-end in,
//! so that a front-end never finds the device without a back-end. When the front-end leaves,
//! the back-end gets a new connection for the next one.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, Timespec, poll};
use rustix::io::Errno;

use crate::driver::pci_device::PciDevice;
use crate::driver::{Driver, DriverError};
use crate::listening_socket::ListeningSocket;
use connect::connect;
use session::{End, Session};

pub mod in_process;

mod attachments;
mod connect;
mod session;
#[cfg(test)]
mod tests;

/// What a bridge does besides moving messages.
#[derive(Debug)]
pub struct Options {
    /// Where the bridge meets the back-end.
    pub meeting: Meeting,
    /// What to do without a back-end.
    pub absent: Absent,
}

/// Who listens for whom.
#[derive(Debug)]
pub enum Meeting {
    /// The back-end listens on the socket of this path.
    Connect(PathBuf),
    /// The bridge listens for the back-end.
    Listen(ListeningSocket),
}

impl Meeting {
    /// The path of the socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Meeting::Connect(path) => path,
            Meeting::Listen(socket) => socket.path(),
        }
    }
}

/// What to do when no back-end answers, or the back-end hangs up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absent {
    /// End with an error.
    Fail,
    /// Look for it for so long, then end with an error.
    WaitFor(Duration),
    /// Look for it until it is there (again).
    Wait,
}

/// Why a bridge came to an end.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// The device cannot be driven any longer.
    #[error("vvu device: {0}")]
    Driver(#[from] DriverError),
    /// No back-end answers on its socket.
    #[error("no back-end on {socket:?}: {source}; start the back-end first, or wait for it")]
    Connect {
        /// The path.
        socket: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The back-end hung up.
    #[error("the back-end on {socket:?} closed its connection{}", if *.serving { " while it served a front-end" } else { "" })]
    BackendLeft {
        /// The path.
        socket: PathBuf,
        /// Whether the front-end had sent messages.
        serving: bool,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// The call.
        what: &'static str,
        /// The cause.
        source: std::io::Error,
    },
}

/// A device and where its back-end is.
#[derive(Debug)]
pub struct Bridge<D: PciDevice> {
    driver: Driver<D>,
    options: Options,
}

impl<D: PciDevice> Bridge<D> {
    /// A bridge between `driver` and the back-end that `options` name.
    #[must_use]
    pub fn new(driver: Driver<D>, options: Options) -> Self {
        Self { driver, options }
    }

    /// Serves one front-end after the other until `stop` is readable. Calls `ready` once, when the
    /// first front-end can connect.
    ///
    /// # Errors
    /// [`BridgeError`].
    pub fn run(&mut self, stop: BorrowedFd<'_>, ready: impl FnOnce()) -> Result<(), BridgeError> {
        let mut ready = Some(ready);
        while let Some(backend) = connect(&self.options, stop)? {
            let mut session = Session::new(&mut self.driver, backend);
            session.open()?;
            if let Some(ready) = ready.take() {
                ready();
            }
            match session.run(stop)? {
                End::Stopped => {
                    session.close()?;
                    return Ok(());
                }
                End::FrontendLeft => log::info!("the front-end left"),
                End::Refused(reason) => {
                    log::error!("disconnected the front-end: {reason}");
                    session.close()?;
                }
                End::BackendLeft { reason, serving } => {
                    log::warn!("back-end on {:?}: {reason}", self.options.meeting.path());
                    session.close()?;
                    if self.options.absent == Absent::Fail {
                        let socket = self.options.meeting.path().to_owned();
                        return Err(BridgeError::BackendLeft { socket, serving });
                    }
                }
            }
        }
        Ok(())
    }
}

/// Waits for one of `fds`; a signal ends the wait as if the time were over.
fn wait(fds: &mut [PollFd<'_>], time: Option<Timespec>) -> Result<usize, BridgeError> {
    match poll(fds, time.as_ref()) {
        Ok(count) => Ok(count),
        Err(Errno::INTR) => Ok(0),
        Err(error) => Err(BridgeError::Io { what: "poll", source: error.into() }),
    }
}
