//! The block device of one front-end: carries out requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestMemoryMmap, Permissions};

use super::config::{self, Shape};
use super::disk::{Disk, SECTOR_SIZE};
use super::failure::Failure;
use super::ranges::{Range, offset, ranges};
use super::request::{Rejected, Request};
use crate::backend::chain::{Chain, Segments};
use crate::backend::device::Device;

/// A block device for one front-end.
#[derive(Debug)]
pub(super) struct BlockDevice {
    disk: Arc<Disk>,
    shape: Shape,
    /// The driver cannot flush, so each write has to be durable (virtio 1.2, 5.2.6.2).
    write_through: AtomicBool,
    /// A failure of the disk has been logged.
    disk_failed: AtomicBool,
}

impl BlockDevice {
    pub(super) fn new(disk: Arc<Disk>, shape: Shape) -> Self {
        Self { disk, shape, write_through: AtomicBool::new(true), disk_failed: AtomicBool::new(false) }
    }

    /// Carries a request out and returns the number of bytes of data that were written to the guest.
    fn execute(&self, memory: &GuestMemoryMmap, request: &Request) -> Result<u32, Failure> {
        match request.kind {
            VIRTIO_BLK_T_IN => {
                let offset = self.offset(request.sector, &request.output)?;
                // The used length also counts the status, and has to fit into 32 bits.
                let len = request.output.len();
                let written = u32::try_from(len).ok().filter(|len| *len < u32::MAX);
                let written = written.ok_or(Failure::Size(len))?;
                self.disk.read(offset, &request.output.slices(memory, Permissions::Write)?)?;
                Ok(written)
            }
            VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                let offset = self.offset(request.sector, &request.input)?;
                self.disk.write(offset, &request.input.slices(memory, Permissions::Read)?)?;
                self.write_through()
            }
            VIRTIO_BLK_T_FLUSH => {
                self.disk.flush()?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                let written = request.output.write(memory, self.disk.serial())?;
                Ok(u32::try_from(written).unwrap_or(0))
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.check_writable()?;
                // All ranges are checked before any is touched.
                for Range { offset, len, unmap } in ranges(&self.disk, memory, request)? {
                    if request.kind == VIRTIO_BLK_T_DISCARD {
                        self.disk.discard(offset, len)?;
                    } else {
                        self.disk.write_zeroes(offset, len, unmap)?;
                    }
                }
                self.write_through()
            }
            _ => Err(Failure::Unsupported),
        }
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.disk.is_read_only() { Err(Failure::ReadOnly) } else { Ok(()) }
    }

    fn write_through(&self) -> Result<u32, Failure> {
        if self.write_through.load(Ordering::Relaxed) {
            self.disk.flush()?;
        }
        Ok(0)
    }

    /// The offset of `sector` in bytes, if `data` from there on is whole sectors and on the disk.
    fn offset(&self, sector: u64, data: &Segments) -> Result<u64, Failure> {
        let len = data.len();
        if !len.is_multiple_of(SECTOR_SIZE.into()) {
            return Err(Failure::Size(len));
        }
        offset(&self.disk, sector, len)
    }

    fn log(&self, failure: &Failure) {
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

    fn handle(&self, memory: &GuestMemoryMmap, chain: Chain, announce: &mut dyn FnMut()) -> u32 {
        let (status_addr, result) = match Request::parse(memory, chain) {
            Ok(request) => {
                if is_slow(&request) {
                    announce();
                }
                (Some(request.status), self.execute(memory, &request))
            }
            Err(Rejected { reason, status }) => (status, Err(reason.into())),
        };
        let (status, written) = match result {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(failure) => {
                self.log(&failure);
                (failure.status(), 0)
            }
        };
        let [status, ..] = status.to_le_bytes();
        let placed = status_addr.is_some_and(|addr| memory.write_obj(status, addr).is_ok());
        if placed { written + 1 } else { 0 }
    }
}

/// Whether requests that are done should not have to wait for this one to be announced.
fn is_slow(request: &Request) -> bool {
    !matches!(request.kind, VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_GET_ID)
}

#[cfg(test)]
#[path = "device_test.rs"]
mod tests;
