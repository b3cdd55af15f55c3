//! The process at the other end of a front-end's socket.
#![expect(
    unsafe_code,
    reason = "rustix has no SO_PEERPIDFD, and its type for credentials cannot hold the process id 0, which the kernel gives"
)]

use std::io;
use std::num::NonZeroI32;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::{fstat, fstatfs};
use serde::{Deserialize, Serialize};

/// A process that connected to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Peer {
    /// Inode of the process's pidfd, which no other process gets, whatever its PID namespace (Linux 6.9).
    Inode(u64),
    /// Process id in the PID namespace of this process.
    Id(NonZeroI32),
}

impl Peer {
    /// Returns the process that made the connection `stream`; `None` if nothing identifies it: before Linux 6.9, a process
    /// outside of this PID namespace has no id.
    ///
    /// # Errors
    /// When the kernel has no credentials for the socket.
    pub(crate) fn of(stream: impl AsFd) -> io::Result<Option<Self>> {
        let stream = stream.as_fd();
        // An older kernel has no pidfd, and neither has a process that has ended.
        if let Ok(inode) = pidfd(stream).and_then(|pidfd| inode(&pidfd))
            && let Some(inode) = inode
        {
            return Ok(Some(Self::Inode(inode)));
        }
        let unknown = libc::ucred { pid: 0, uid: 0, gid: 0 };
        // SAFETY: any bytes are a valid `ucred`, a structure of integers.
        let credentials = unsafe { option(stream, libc::SO_PEERCRED, unknown)? };
        Ok(NonZeroI32::new(credentials.pid).map(Self::Id))
    }
}

/// The pidfd of the process that made the connection (Linux 6.5).
fn pidfd(stream: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const SO_PEERPIDFD: libc::c_int = 77;
    // SAFETY: any bytes are a valid integer.
    let fd: RawFd = unsafe { option(stream, SO_PEERPIDFD, -1)? };
    // SAFETY: the kernel has just made the descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The inode of a pidfd; `None` before Linux 6.9, where all share one.
fn inode(pidfd: &OwnedFd) -> io::Result<Option<u64>> {
    const PID_FS_MAGIC: i64 = 0x5049_4446;
    let own = fstatfs(pidfd)?.f_type == PID_FS_MAGIC;
    Ok(if own { Some(fstat(pidfd)?.st_ino) } else { None })
}

/// Reads an option of a socket, in place of `value`.
///
/// # Safety
/// Any bytes are a valid `T`.
unsafe fn option<T>(stream: BorrowedFd<'_>, name: libc::c_int, mut value: T) -> io::Result<T> {
    let mut size = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `size` bytes, which is the size of `value`. Any bytes are a valid `T`.
    let result = unsafe {
        libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, name, (&raw mut value).cast(), &mut size)
    };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
impl Peer {
    /// A peer that is not this one.
    pub(crate) fn other(self) -> Self {
        match self {
            Self::Inode(inode) => Self::Inode(!inode),
            Self::Id(id) => Self::Id(-id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_peer_of_a_connection_is_its_process() {
        let (one, other) = UnixStream::pair().expect("pair");
        let peer = Peer::of(&one).expect("credentials").expect("known");
        assert_eq!(Peer::of(&other).expect("credentials"), Some(peer));
        let inode_of = |pid: Pid| {
            let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("running");
            inode(&pidfd).expect("inode")
        };
        let Some(own) = inode_of(getpid()) else {
            assert_eq!(peer, Peer::Id(getpid().as_raw_nonzero()));
            return;
        };
        assert_eq!(peer, Peer::Inode(own));
        assert_ne!(inode_of(Pid::INIT), Some(own), "another process is another peer");
    }
}
