//! A listening unix socket that only its owner can connect to, and whose name goes when it is dropped.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Longest path of a unix socket in bytes (`sun_path` without its final zero).
pub const PATH_MAX: usize = 107;

/// Connections that can wait to be accepted.
const BACKLOG: i32 = 8;

/// A socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The path does not fit into a socket address.
    #[error(
        "socket path {path:?} has {got} bytes: want at most {PATH_MAX}; use a shorter directory or a relative path"
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Length of the path in bytes.
        got: usize,
    },
    /// A live process listens there.
    #[error("socket {path:?} is in use by another process: stop that one or choose another path")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The path is that of something else than a socket.
    #[error("{path:?} exists and is not a socket: remove it or choose another path")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {what} socket {path:?}: {source}")]
    Io {
        /// The operation that was tried.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// A listening socket with mode 0600; dropping it removes it from the file system.
#[derive(Debug)]
pub struct ListeningSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket's file, so that no other file is removed.
    id: (u64, u64),
}

impl ListeningSocket {
    /// Takes over a socket that listens at `path`.
    #[must_use]
    pub fn inherit(listener: UnixListener, path: &Path) -> Self {
        let id = fs::symlink_metadata(path).map_or((0, 0), |file| (file.dev(), file.ino()));
        Self { listener, path: path.to_owned(), id }
    }

    /// Listens at `path`. A socket that a dead process left there is replaced.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let got = path.as_os_str().as_bytes().len();
        if got > PATH_MAX {
            return Err(ListenError::PathTooLong { path: path.to_owned(), got });
        }
        remove_stale(path)?;
        let io = |what| {
            let path = path.to_owned();
            move |error: rustix::io::Errno| ListenError::Io { what, path, source: error.into() }
        };
        let fd =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(io("create"))?;
        // Linux gives the file the mode of the socket, so other users cannot connect even for a moment.
        rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(io("set the mode of"))?;
        let address = SocketAddrUnix::new(path).map_err(io("address"))?;
        rustix::net::bind(&fd, &address).map_err(|error| match error {
            rustix::io::Errno::ADDRINUSE => ListenError::InUse { path: path.to_owned() },
            error => io("bind")(error),
        })?;
        rustix::net::listen(&fd, BACKLOG).map_err(io("listen on"))?;
        let id = identity(path).map_err(|source| ListenError::Io {
            what: "look up",
            path: path.to_owned(),
            source,
        })?;
        Ok(Self { listener: UnixListener::from(fd), path: path.to_owned(), id })
    }

    /// Returns the path of the socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the socket, which is in blocking mode.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

/// Connects to the socket at `path` without waiting: a full backlog is an error.
///
/// # Errors
/// Errors of connect(2).
pub fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(fd))
}

impl AsFd for ListeningSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for ListeningSocket {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|id| id == self.id)
            && let Err(error) = fs::remove_file(&self.path)
        {
            log::warn!("cannot remove socket {:?}: {error}", self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Removes a socket at `path` on which no process listens any more.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let io = |what| {
        let path = path.to_owned();
        move |source| ListenError::Io { what, path, source }
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io("look up")(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ListenError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(ListenError::InUse { path: path.to_owned() }),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(io("replace"))
        }
        Err(error) => Err(io("probe")(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn is_private_and_goes_away() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("s");
        let socket = ListeningSocket::bind(&path).expect("bind");
        let mode = fs::metadata(&path).expect("metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(&path).expect("connect");
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).expect("bind"));
        assert!(path.exists(), "std leaves the name behind");
        let socket = ListeningSocket::bind(&path).expect("replaces the stale one");
        assert!(matches!(ListeningSocket::bind(&path), Err(ListenError::InUse { .. })));
        UnixStream::connect(&path).expect("the live one is untouched");
        drop(socket);
    }

    #[test]
    fn a_successor_keeps_its_name() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("s");
        let first = ListeningSocket::bind(&path).expect("bind");
        fs::remove_file(&path).expect("remove");
        let second = ListeningSocket::bind(&path).expect("bind");
        drop(first);
        UnixStream::connect(&path).expect("connect");
        drop(second);
    }

    #[test]
    fn refuses_with_a_remedy() {
        let dir = tempfile::tempdir().expect("directory");
        let long = dir.path().join("x".repeat(PATH_MAX));
        let error = ListeningSocket::bind(&long).expect_err("too long");
        assert!(matches!(error, ListenError::PathTooLong { .. }));
        assert!(error.to_string().contains("want at most 107; use a shorter"), "{error}");

        let file = dir.path().join("file");
        fs::write(&file, "precious").expect("write");
        assert!(matches!(ListeningSocket::bind(&file), Err(ListenError::NotASocket { .. })));
        assert_eq!(fs::read(&file).expect("read"), b"precious");

        let missing = dir.path().join("no/s");
        assert!(matches!(ListeningSocket::bind(&missing), Err(ListenError::Io { what: "bind", .. })));
    }

    #[test]
    fn the_longest_path_works() {
        let dir = tempfile::tempdir().expect("directory");
        let used = dir.path().as_os_str().len() + 1;
        let path = dir.path().join("x".repeat(PATH_MAX - used));
        let _socket = ListeningSocket::bind(&path).expect("bind");
        UnixStream::connect(&path).expect("connect");
    }
}
