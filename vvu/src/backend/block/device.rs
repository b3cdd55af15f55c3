//! The block device of one front-end: what it offers, and what its driver has chosen.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use super::config::{self, Shape};
use super::disk::{Disk, SECTOR_SIZE};
use super::failure::Failure;
use super::options::EngineKind;
use super::ranges::offset;
use super::sync::SyncEngine;
use super::uring::UringEngine;
use crate::backend::chain::Segments;
use crate::backend::device::Device;
use crate::backend::engine::Engine;
use crate::event::Event;

/// A block device for one front-end.
#[derive(Debug)]
pub(super) struct BlockDevice {
    disk: Arc<Disk>,
    shape: Shape,
    engine: EngineKind,
    /// The driver cannot flush, so each write has to be durable (virtio 1.2, 5.2.6.2).
    write_through: AtomicBool,
    /// A failure of the disk has been logged.
    disk_failed: AtomicBool,
    /// By which [`Path`]s data has gone, which was logged.
    paths: [AtomicBool; 2],
}

/// The way between the front-end's memory and a disk that is opened for direct I/O.
#[derive(Clone, Copy, Debug)]
pub(super) enum Path {
    Straight,
    /// The kernel cannot pin the memory.
    Buffers,
}

impl BlockDevice {
    pub(super) fn new(disk: Arc<Disk>, shape: Shape, engine: EngineKind) -> Self {
        Self {
            disk,
            shape,
            engine,
            write_through: AtomicBool::new(true),
            disk_failed: AtomicBool::new(false),
            paths: [const { AtomicBool::new(false) }; 2],
        }
    }

    pub(super) fn disk(&self) -> &Disk {
        &self.disk
    }

    pub(super) fn check_writable(&self) -> Result<(), Failure> {
        if self.disk.is_read_only() { Err(Failure::ReadOnly) } else { Ok(()) }
    }

    pub(super) fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::Relaxed)
    }

    /// The offset of `sector` in bytes, if `data` from there on is whole sectors and on the disk.
    pub(super) fn offset(&self, sector: u64, data: &Segments) -> Result<u64, Failure> {
        let len = data.len();
        if !len.is_multiple_of(SECTOR_SIZE.into()) {
            return Err(Failure::Size(len));
        }
        offset(&self.disk, sector, len)
    }

    /// Says by which way data goes, once for each.
    pub(super) fn log_path(&self, path: Path) {
        let logged = &self.paths[path as usize];
        if logged.load(Ordering::Relaxed) || logged.swap(true, Ordering::Relaxed) {
            return;
        }
        match path {
            Path::Straight => log::info!("data goes straight between the front-end's memory and the disk"),
            Path::Buffers => log::info!(
                "data goes through buffers: the front-end's memory cannot be pinned for direct I/O, as that of a PCI device \
                 cannot"
            ),
        }
    }

    pub(super) fn log(&self, failure: &Failure) {
        // The guest must not be able to fill the log, nor a disk that is full.
        let first = matches!(failure, Failure::Disk(_)) && !self.disk_failed.swap(true, Ordering::Relaxed);
        let level = if first { log::Level::Warn } else { log::Level::Debug };
        log::log!(level, "request failed: {failure}");
    }
}

impl Device for BlockDevice {
    fn queues(&self) -> u16 {
        self.shape.queues
    }

    fn features(&self) -> u64 {
        config::features(&self.disk, self.shape)
    }

    fn descriptors_max(&self) -> u16 {
        // The header and the status have a descriptor each.
        self.shape.segments + 2
    }

    fn set_features(&self, features: u64) {
        self.write_through.store(features & 1 << VIRTIO_BLK_F_FLUSH == 0, Ordering::Relaxed);
    }

    fn config(&self, offset: u32, size: u32) -> Vec<u8> {
        config::read(&self.disk, self.shape, offset, size)
    }

    fn engine(self: Arc<Self>, wake_up: &Arc<Event>) -> io::Result<Box<dyn Engine>> {
        Ok(match self.engine {
            EngineKind::Sync => Box::new(SyncEngine::new(self)),
            EngineKind::IoUring => Box::new(UringEngine::new(self, wake_up)?),
        })
    }
}

#[cfg(test)]
#[path = "device_test.rs"]
mod tests;
