//! The block back-end: one disk served as a virtio block device (virtio 1.2, 5.2).

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::inflight::Limits;
use super::server::serve;
use super::{ServeError, Stop};
use config::QUEUE_SIZE_MAX;
use device::Device;
use disk::Disk;

pub use disk::OpenError;

mod config;
mod device;
mod disk;
mod request;
#[cfg(any(test, fuzzing))]
pub mod rig;

/// Most queues of a block device.
pub const QUEUES_MAX: u16 = 16;
/// Longest serial number in bytes (virtio 1.2, 5.2.6.1).
pub const SERIAL_MAX: usize = 20;

/// What to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// A regular file or block device, of a size that is a multiple of 512 bytes.
    pub path: PathBuf,
    /// Refuse writes; several back-ends may serve a disk that none of them writes.
    pub read_only: bool,
    /// Queues, 1 to [`QUEUES_MAX`], each with a thread of its own. A front-end need not use all.
    pub queues: u16,
    /// At most [`SERIAL_MAX`] printable ASCII characters; by default the file name, cut to fit.
    pub serial: Option<String>,
    /// How long a queue that was emptied is looked at for the next request before its driver is asked for
    /// a notification. Zero: not at all.
    pub poll: Duration,
}

/// A disk, open and locked, ready to be served.
#[derive(Clone, Debug)]
pub struct Block {
    disk: Arc<Disk>,
    queues: u16,
    poll: Duration,
}

impl Block {
    /// Opens the disk and locks it against other back-ends for as long as this value lives.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(options: &Options) -> Result<Self, OpenError> {
        if !(1..=QUEUES_MAX).contains(&options.queues) {
            return Err(OpenError::Queues { got: options.queues });
        }
        Ok(Self { disk: Arc::new(Disk::open(options)?), queues: options.queues, poll: options.poll })
    }

    /// Size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.disk.size()
    }

    /// Serves one front-end after another until `stop` says so.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn serve(&self, listener: &UnixListener, stop: &Stop) -> Result<(), ServeError> {
        let limits = Limits { queues: self.queues, queue_size: QUEUE_SIZE_MAX };
        serve(listener, stop, limits, |memory, inflight, gone| {
            Device::new(self.disk.clone(), self.queues, self.poll, memory, inflight, gone)
        })
    }
}
