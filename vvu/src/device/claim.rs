//! Locks on single bytes of a file, by which processes divide it among themselves.
#![expect(unsafe_code, reason = "rustix has no locks that belong to an open file description")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Claims the byte at `offset` of `file`; false if another open file description has claimed it. The kernel
/// drops a claim when the last descriptor of its open file description is closed, at the latest when the
/// last process exits that has one.
///
/// # Errors
/// When the kernel cannot lock the file.
pub(super) fn claim(file: &File, offset: u64) -> io::Result<bool> {
    let lock = lock_of(offset)?;
    // SAFETY: the descriptor is open, and the kernel only reads the structure, which outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// Returns whether another open file description than that of `file` has claimed the byte at `offset`.
///
/// # Errors
/// When the kernel cannot tell.
pub(super) fn is_claimed(file: &File, offset: u64) -> io::Result<bool> {
    let mut lock = lock_of(offset)?;
    // SAFETY: the descriptor is open, and the kernel reads and writes the structure, which outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}

/// The lock on the byte at `offset`.
fn lock_of(offset: u64) -> io::Result<libc::flock> {
    // Both constants fit: they are 0 or 1.
    let narrow = |constant: libc::c_int| libc::c_short::try_from(constant).unwrap_or_default();
    let start = libc::off_t::try_from(offset)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "offset of a claim is too large"))?;
    Ok(libc::flock {
        l_type: narrow(libc::F_WRLCK),
        l_whence: narrow(libc::SEEK_SET),
        l_start: start,
        l_len: 1,
        l_pid: 0,
    })
}
