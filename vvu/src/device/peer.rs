//! The process at the other end of a front-end's socket.
#![expect(
    unsafe_code,
    reason = "rustix's type for credentials cannot hold the process id 0, which the kernel gives"
)]

use std::io;
use std::num::NonZeroI32;
use std::os::fd::{AsFd, AsRawFd};

/// The id of a process that connected to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Peer(NonZeroI32);

impl Peer {
    /// Returns the process that made the connection `stream`; `None` if it has no id in this process id
    /// namespace.
    ///
    /// # Errors
    /// When the kernel has no credentials for the socket.
    pub(crate) fn of(stream: impl AsFd) -> io::Result<Option<Self>> {
        let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut size = libc::socklen_t::try_from(size_of::<libc::ucred>()).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `size` bytes, which is the size of `credentials`, a plain structure.
        let result = unsafe {
            libc::getsockopt(
                stream.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut credentials).cast(),
                &mut size,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(NonZeroI32::new(credentials.pid).map(Self))
    }

    /// The process with this id.
    pub(crate) fn with_id(id: NonZeroI32) -> Self {
        Self(id)
    }

    /// The id of the process.
    pub(crate) fn id(self) -> NonZeroI32 {
        self.0
    }
}

#[cfg(test)]
impl Peer {
    /// A peer that is not this one.
    pub(crate) fn other(self) -> Self {
        Self(-self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_peer_of_a_connection_is_its_process() {
        let (one, other) = UnixStream::pair().expect("pair");
        let own = NonZeroI32::new(std::process::id().cast_signed()).map(Peer);
        assert_eq!(Peer::of(&one).expect("credentials"), own);
        assert_eq!(Peer::of(&other).expect("credentials"), own);
    }
}
