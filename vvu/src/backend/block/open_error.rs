//! Why a disk cannot be served.

use std::io;
use std::path::PathBuf;

use super::options::{QUEUES_MAX, SEGMENTS_MAX, SERIAL_MAX};

/// A disk cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file does not exist.
    #[error("disk {path:?} does not exist: create one, for example with `truncate -s 1G {}`", path.display())]
    NotFound {
        /// The path.
        path: PathBuf,
    },
    /// The path is a directory.
    #[error("disk {path:?} is a directory: name a disk image or block device")]
    Directory {
        /// The path.
        path: PathBuf,
    },
    /// The path is a pipe, a socket or a character device.
    #[error("disk {path:?} is neither a regular file nor a block device")]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// This user may not open the disk.
    #[error("no permission to open disk {path:?} for {access}: change its mode or owner{}",
        if *.access == "writing" { ", or serve it read-only" } else { "" })]
    Permission {
        /// The path.
        path: PathBuf,
        /// "reading" or "writing".
        access: &'static str,
    },
    /// The disk has no bytes.
    #[error("disk {path:?} is empty: give it a size, for example with `truncate -s 1G {}`", path.display())]
    Empty {
        /// The path.
        path: PathBuf,
    },
    /// The size is not a multiple of the disk's blocks: 512 bytes, or what direct I/O asks for.
    #[error(
        "disk {path:?} has {got} bytes, which is no multiple of {block}: enlarge it with `truncate -s {} {}`",
        got.next_multiple_of((*block).into()), path.display()
    )]
    Size {
        /// The path.
        path: PathBuf,
        /// The size in bytes.
        got: u64,
        /// Bytes of a block.
        block: u32,
    },
    /// The file system has no direct I/O.
    #[error("disk {path:?} cannot be opened for direct I/O: its file system has none; leave out --direct")]
    Direct {
        /// The path.
        path: PathBuf,
    },
    /// The kernel has no io_uring for this process.
    #[error(
        "no io_uring: {0}; want Linux 5.6 or newer with CONFIG_IO_URING, `sysctl kernel.io_uring_disabled=0` and a sandbox \
         that allows it, or --engine sync"
    )]
    Engine(io::Error),
    /// Another process serves the disk.
    #[error("disk {path:?} is served by another process: stop that one, or serve it read-only in both")]
    Busy {
        /// The path.
        path: PathBuf,
    },
    /// The serial number is too long or not printable.
    #[error("serial number {got:?}: want 1 to {SERIAL_MAX} printable ASCII characters")]
    Serial {
        /// The serial number that was asked for.
        got: String,
    },
    /// Too few or too many queues.
    #[error("{got} queues: want 1 to {QUEUES_MAX}")]
    Queues {
        /// The number asked for.
        got: u16,
    },
    /// Too few or too many pieces of memory in a request.
    #[error("requests of {got} pieces of memory: want 1 to {SEGMENTS_MAX}")]
    Segments {
        /// The number asked for.
        got: u16,
    },
    /// A system call failed.
    #[error("cannot {what} disk {path:?}: {source}")]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}
