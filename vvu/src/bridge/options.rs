//! The options and the errors of a bridge.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::time::Duration;

use crate::driver::DriverError;

/// Options of a bridge.
#[derive(Debug)]
pub struct Options {
    /// The socket between bridge and back-end.
    pub backend: BackendSocket,
    /// Behaviour while no back-end answers.
    pub retry: Retry,
}

/// The way in which bridge and back-end connect.
#[derive(Debug)]
pub enum BackendSocket {
    /// The back-end listens at this path.
    Connect(PathBuf),
    /// The bridge listens, and the back-end connects.
    Listen(UnixListener),
    /// The back-end is in this process: it receives one end of a socket pair for each connection.
    Pair(Sender<UnixStream>),
}

impl BackendSocket {
    /// Returns the path of the socket in quotation marks, for messages.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Connect(path) => format!("{path:?}"),
            Self::Listen(listener) => {
                let address = listener.local_addr().ok();
                let path = address.as_ref().and_then(|address| address.as_pathname());
                path.map_or_else(|| "a socket without a name".to_owned(), |path| format!("{path:?}"))
            }
            Self::Pair(_) => "a socket pair".to_owned(),
        }
    }
}

/// Behaviour of a bridge when no back-end answers, or the back-end hangs up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// End with an error. A back-end that has accepted gets 10 s to answer.
    Never,
    /// Try again for so long, then end with an error.
    For(Duration),
    /// Try again until a back-end answers.
    Forever,
}

/// The bridge ended.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// The device cannot be driven any longer.
    #[error("vvu device: {0}")]
    Driver(#[from] DriverError),
    /// No back-end answers on its socket.
    #[error("no back-end on {socket}: {source}; start the back-end first, or wait for it")]
    Connect {
        /// The socket.
        socket: String,
        /// The cause.
        source: io::Error,
    },
    /// The back-end hung up.
    #[error("the back-end on {socket} closed its connection{}", if *.serving { " while it served a front-end" } else { "" })]
    BackendLeft {
        /// The socket.
        socket: String,
        /// True if the front-end had sent messages.
        serving: bool,
    },
    /// A system call failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// The operation that was tried.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}

impl BridgeError {
    /// A wait for file descriptors failed.
    pub(super) fn wait(source: io::Error) -> Self {
        Self::Io { what: "wait for the device and the back-end", source }
    }
}
