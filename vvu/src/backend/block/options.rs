//! What can be chosen about a block back-end.

use std::path::PathBuf;
use std::time::Duration;

/// Most queues of a block device.
pub const QUEUES_MAX: u16 = 16;
/// Longest serial number in bytes (virtio 1.2, 5.2.6.1).
pub const SERIAL_MAX: usize = 20;

/// What a block back-end serves, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockOptions {
    /// A regular file or block device, of a size that is a multiple of 512 bytes.
    pub path: PathBuf,
    /// Refuse writes. Several back-ends may serve a disk that none of them writes.
    pub read_only: bool,
    /// Number of queues, 1 to [`QUEUES_MAX`]. A front-end need not use all; each that it uses has a thread.
    pub queues: u16,
    /// Serial number of at most [`SERIAL_MAX`] printable ASCII characters; by default the file name, cut to fit.
    pub serial: Option<String>,
    /// How long to watch an empty queue for the next request before asking the driver for a notification. Zero turns
    /// this off.
    pub poll: Duration,
}
