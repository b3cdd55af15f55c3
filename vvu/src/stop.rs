//! A file descriptor that becomes readable when the process is asked to end.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

/// Readable from the first `SIGINT` or `SIGTERM` on.
///
/// # Errors
/// When there is no file descriptor left.
pub(crate) fn on_signal() -> io::Result<OwnedFd> {
    let (read, write) = UnixStream::pair()?;
    pipe::register(SIGINT, write.try_clone()?)?;
    pipe::register(SIGTERM, write)?;
    Ok(read.into())
}
