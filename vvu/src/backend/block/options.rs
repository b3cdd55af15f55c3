//! What can be chosen about a block back-end.

use std::path::PathBuf;
use std::time::Duration;

use crate::backend::ring::QUEUE_SIZE_MAX;

/// Most queues of a block device.
pub const QUEUES_MAX: u16 = 16;
/// Longest serial number in bytes (virtio 1.2, 5.2.6.1).
pub const SERIAL_MAX: usize = 20;
/// Pieces of memory in a request by default: with its header and status, a request fits into a queue of 16 descriptors.
pub const SEGMENTS_DEFAULT: u16 = 14;
/// Most pieces of memory in a request, which with its header and status fits into the largest queue.
pub(super) const SEGMENTS_MAX: u16 = QUEUE_SIZE_MAX - 2;

/// How requests are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// One request of a queue at a time, by system calls of the queue's thread.
    Sync,
    /// Many requests of a queue at a time, through an io_uring. Needs Linux 5.6.
    IoUring,
}

/// What a block back-end serves, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockOptions {
    /// A regular file or block device, of a size that is a multiple of 512 bytes.
    pub path: PathBuf,
    /// Refuse writes. Several back-ends may serve a disk that none of them writes.
    pub read_only: bool,
    /// Read and write the disk without the page cache of this machine (`O_DIRECT`).
    pub direct: bool,
    /// How requests are carried out; `None` leaves it to the back-end: an io_uring for direct I/O where the kernel has one,
    /// else system calls.
    pub engine: Option<EngineKind>,
    /// Number of queues, 1 to [`QUEUES_MAX`]. A front-end need not use all; each that it uses has a thread.
    pub queues: u16,
    /// Most pieces of memory in a request (`seg_max`; virtio 1.2, 5.2.4), 1 to 1022. The driver learns it before it
    /// tells the size of its queues, so a driver without indirect descriptors can make requests that do not fit into a queue
    /// of less than two descriptors more than this, and waits for ever.
    pub segments: u16,
    /// Offer `VIRTIO_F_ACCESS_PLATFORM` (virtio 1.2, 6.1) to a front-end whose VM has no IOMMU of its own. A front-end whose
    /// VM has one is served only if it does without the feature.
    pub access_platform: bool,
    /// Serial number of at most [`SERIAL_MAX`] printable ASCII characters; by default the file name, cut to fit.
    pub serial: Option<String>,
    /// How long at most to watch an empty queue for the next request before asking the driver for a notification. The
    /// time follows what the requests show. Zero turns this off.
    pub poll: Duration,
}

impl BlockOptions {
    /// The defaults for the disk at `path`: writable, with as many queues as there can be and a poll window of at most 2 ms.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
            direct: false,
            engine: None,
            queues: QUEUES_MAX,
            segments: SEGMENTS_DEFAULT,
            access_platform: false,
            serial: None,
            poll: Duration::from_millis(2),
        }
    }
}
