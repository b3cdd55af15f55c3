//! The block back-end: one disk served as a virtio block device (virtio 1.2, 5.2).
//!
//! An engine (`sync` or `uring`) carries out requests. What a request needs, one system call after the other, is in `job`,
//! which checks it first (`request`, `ranges`) and moves its bytes (`transfer`, over `pieces` of memory, straight or through
//! `buffers`). `disk` is the open file, with what it says of its blocks (`topology`) and what requests of several queues wait
//! for (`gate`).

use std::fs::File;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use super::handler::Handler;
use super::inflight::FileId;
use super::server::{self, ServeError};
use crate::event::StopToken;
use crate::pci::DirectDoorbells;
use crate::shortage::is_shortage;
use config::Shape;
use device::BlockDevice;
use disk::Disk;
use options::SEGMENTS_MAX;

pub use open_error::OpenError;
pub use options::{BlockOptions, EngineKind, QUEUES_MAX, SEGMENTS_DEFAULT, SERIAL_MAX};

mod buffers;
mod config;
mod device;
mod disk;
#[cfg(test)]
mod durability_test;
mod failure;
mod faults;
mod gate;
#[cfg(fuzzing)]
pub mod hostile_driver;
mod job;
mod means;
mod open_error;
mod options;
mod pieces;
mod ranges;
mod request;
#[cfg(test)]
pub mod rig;
mod sync;
mod topology;
mod transfer;
mod uring;

/// A disk, open and locked, ready to be served.
#[derive(Clone, Debug)]
pub struct BlockBackend {
    disk: Arc<Disk>,
    shape: Shape,
    engine: EngineKind,
    poll: Duration,
    doorbells: Option<Arc<DirectDoorbells>>,
    window: Option<FileId>,
}

impl BlockBackend {
    /// Opens the disk and locks it against other back-ends for as long as this value lives.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(options: &BlockOptions) -> Result<Self, OpenError> {
        if !(1..=QUEUES_MAX).contains(&options.queues) {
            return Err(OpenError::Queues { got: options.queues });
        }
        if !(1..=SEGMENTS_MAX).contains(&options.segments) {
            return Err(OpenError::Segments { got: options.segments });
        }
        let shape = Shape {
            queues: options.queues,
            segments: options.segments,
            access_platform: options.access_platform,
        };
        let disk = Arc::new(Disk::open(options)?);
        let engine = choose(options)?;
        Ok(Self { disk, shape, engine, poll: options.poll, doorbells: None, window: None })
    }

    /// Makes the queues ring `doorbells`, where they have one, in place of the call eventfds that the front-end sets:
    /// those of the driver through which the back-end is served
    /// ([`Driver::direct_doorbells`](crate::driver::Driver::direct_doorbells)).
    #[must_use]
    pub fn with_doorbells(self, doorbells: Option<Arc<DirectDoorbells>>) -> Self {
        Self { doorbells, ..self }
    }

    /// Takes in-flight regions in `file` too, which nobody makes shorter: the window of the driver through which the back-end
    /// is served ([`Driver::window`](crate::driver::Driver::window)).
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn with_window(self, file: Option<&File>) -> io::Result<Self> {
        Ok(Self { window: file.map(FileId::of).transpose()?, ..self })
    }

    /// Size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.disk.size()
    }

    /// How requests are carried out.
    #[must_use]
    pub fn engine(&self) -> EngineKind {
        self.engine
    }

    /// Serves the front-ends that connect to `listener`, one after another, each with a fresh device, until `stop`.
    /// Requests that have been begun are finished first. Nobody can connect to `listener` afterwards.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn serve(&self, listener: &UnixListener, stop: &StopToken) -> Result<(), ServeError> {
        server::serve(listener, stop, || self.handler())
    }

    /// Serves the front-end at the other end of `frontend` until it leaves or breaks the protocol, or until `stop`.
    /// Requests that have been begun are finished first.
    pub fn serve_frontend(&self, frontend: UnixStream, stop: &StopToken) {
        server::serve_frontend(frontend, stop, self.handler(), || {});
    }

    fn handler(&self) -> Handler {
        let device = BlockDevice::new(Arc::clone(&self.disk), self.shape, self.engine);
        Handler::new(Arc::new(device), self.poll)
            .with_doorbells(self.doorbells.clone())
            .with_lasting(self.window)
    }
}

fn choose(options: &BlockOptions) -> Result<EngineKind, OpenError> {
    match options.engine {
        Some(EngineKind::IoUring) => match uring::probe() {
            Ok(()) => Ok(EngineKind::IoUring),
            Err(source) if is_shortage(&source) => {
                Err(OpenError::Io { what: "make an io_uring for", path: options.path.clone(), source })
            }
            Err(error) => Err(OpenError::Engine(error)),
        },
        None if options.direct => Ok(match uring::probe() {
            Ok(()) => EngineKind::IoUring,
            Err(error) => {
                log::warn!("no io_uring ({error}): requests of a queue are carried out one at a time");
                EngineKind::Sync
            }
        }),
        Some(EngineKind::Sync) | None => Ok(EngineKind::Sync),
    }
}
