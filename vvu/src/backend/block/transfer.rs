//! Moves bytes between memory and disk, straight or by way of a buffer, with as many system calls as that takes.

use std::io::{self, ErrorKind};
use std::sync::Arc;

use rustix::io::Errno;
use vm_memory::MmapRegion;

use super::buffers::BUFFER_SIZE;
use super::disk::Step;
use super::gate;
use super::means::Means;
use super::pieces::Pieces;
use super::topology::Alignment;

/// A run of bytes that is to be read from the disk, or written to it.
#[derive(Debug)]
pub(super) struct Transfer {
    writes: bool,
    /// Where the first byte is that has not been moved.
    offset: u64,
    /// Memory of the bytes that have not been moved.
    pieces: Pieces,
    /// The disk cannot use the memory as it is.
    bounces: bool,
    window: Option<Window>,
    /// System calls in a row that have moved nothing.
    fruitless: u32,
}

/// Whole blocks of the disk that a buffer stands for.
#[derive(Debug)]
struct Window {
    buffer: Arc<MmapRegion>,
    /// Where the first block is.
    start: u64,
    /// Bytes of the blocks.
    size: usize,
    /// Bytes in front of those that are transferred.
    skip: usize,
    /// Bytes that are transferred.
    len: usize,
    /// The blocks are being read: for a read, or because a write changes a part of one.
    reads: bool,
    /// What of the blocks has not been read or written.
    rest: Pieces,
    /// Bytes that were.
    moved: usize,
}

/// System calls in a row that may be interrupted or told to come again.
const FRUITLESS_MAX: u32 = 1000;

impl Transfer {
    pub(super) fn read(offset: u64, pieces: Pieces) -> Self {
        Self { writes: false, offset, pieces, bounces: false, window: None, fruitless: 0 }
    }

    pub(super) fn write(offset: u64, pieces: Pieces) -> Self {
        Self { writes: true, ..Self::read(offset, pieces) }
    }

    /// The range that is changed, as far as that is still to be done.
    pub(super) fn writes_to(&self) -> Option<gate::Bytes> {
        self.writes.then(|| (self.offset, self.offset + self.pieces.len() as u64))
    }

    /// Gets what the next system call needs. Returns false while there is no buffer for it.
    ///
    /// # Errors
    /// When there is no memory for a buffer.
    pub(super) fn prepare(&mut self, means: &mut Means) -> io::Result<bool> {
        if let Some(direct) = means.disk().direct()
            && self.window.is_none()
        {
            self.bounces = self.bounces || self.has_to_bounce(direct, means);
            if self.bounces {
                let Some(buffer) = means.buffers.take()? else { return Ok(false) };
                self.open_window(direct, buffer);
            }
        }
        Ok(true)
    }

    /// The next system call.
    pub(super) fn step(&self) -> Step<'_> {
        let (reads, pieces, offset) = match &self.window {
            None => (!self.writes, self.pieces.next(), self.offset),
            Some(window) => (window.reads, window.rest.next(), window.start + window.moved as u64),
        };
        if reads { Step::Read { pieces, offset } } else { Step::Write { pieces, offset } }
    }

    /// Takes the result of the system call into account: the number of bytes that it moved. Returns whether all have
    /// been moved.
    ///
    /// # Errors
    /// That of the call, `UnexpectedEof` when the disk has become smaller, and `WriteZero` when it takes no more.
    pub(super) fn done(&mut self, result: io::Result<usize>, means: &mut Means) -> io::Result<bool> {
        let moved = match result {
            Ok(0) => return Err(self.ended()),
            Ok(moved) => moved,
            Err(error) => return self.failed(error, means).map(|()| false),
        };
        self.fruitless = 0;
        let Some(mut window) = self.window.take() else {
            if means.disk().direct().is_some() {
                means.learn_pinnable(&self.pieces);
            }
            self.offset += moved as u64;
            self.pieces.advance(moved);
            return Ok(self.is_empty());
        };
        let wanted = if self.writes { window.size } else { window.skip + window.len };
        let total = window.moved + moved;
        if total < wanted {
            // What is left of a block that was moved in part is moved again, since the disk wants whole ones.
            let whole = means.disk().direct().map_or(total, |direct| total - total % direct.block as usize);
            if whole == window.moved {
                means.buffers.put_back(window.buffer);
                return Err(self.ended());
            }
            window.rest = Pieces::buffer(&window.buffer, whole, window.size - whole);
            window.moved = whole;
            self.window = Some(window);
            return Ok(false);
        }
        if window.reads && self.writes {
            self.pieces.copy_to(&window.buffer, window.skip, window.len);
            window.rest = Pieces::buffer(&window.buffer, 0, window.size);
            (window.reads, window.moved) = (false, 0);
            self.window = Some(window);
            return Ok(false);
        }
        if !self.writes {
            self.pieces.copy_from(&window.buffer, window.skip, window.len);
        }
        self.offset += window.len as u64;
        self.pieces.advance(window.len);
        means.buffers.put_back(window.buffer);
        Ok(self.is_empty())
    }

    /// Gives back what it has of `means`. Call it when the transfer is over, also after an error.
    pub(super) fn end(&mut self, means: &mut Means) {
        if let Some(window) = self.window.take() {
            means.buffers.put_back(window.buffer);
        }
    }

    /// Whether there is nothing to move.
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.next().is_empty()
    }

    fn ended(&self) -> io::Error {
        if self.writes { ErrorKind::WriteZero.into() } else { ErrorKind::UnexpectedEof.into() }
    }

    /// Takes an error into account, and returns it if it is final.
    fn failed(&mut self, error: io::Error, means: &mut Means) -> io::Result<()> {
        let again = matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock);
        if again && self.fruitless < FRUITLESS_MAX {
            self.fruitless += 1;
            return Ok(());
        }
        let unusable = [Errno::FAULT, Errno::INVAL].map(|errno| Some(errno.raw_os_error()));
        if means.disk().direct().is_some() && !self.bounces && unusable.contains(&error.raw_os_error()) {
            if error.raw_os_error() == unusable[0] {
                means.learn_unpinnable(&self.pieces);
            }
            self.bounces = true;
            return Ok(());
        }
        Err(error)
    }

    fn has_to_bounce(&self, direct: Alignment, means: &Means) -> bool {
        direct.down(self.offset) != self.offset
            || !self.pieces.are_aligned(direct.memory as usize, direct.block as usize)
            || means.cannot_pin(&self.pieces)
    }

    fn open_window(&mut self, direct: Alignment, buffer: Arc<MmapRegion>) {
        let start = direct.down(self.offset);
        // Less than a block, and a block is less than a buffer.
        let skip = usize::try_from(self.offset - start).unwrap_or(0);
        let len = self.pieces.len().min(BUFFER_SIZE - skip);
        let end = self.offset + len as u64;
        let size = usize::try_from(direct.up(end) - start).unwrap_or(BUFFER_SIZE);
        let reads = !self.writes || skip != 0 || size != len;
        if !reads {
            self.pieces.copy_to(&buffer, 0, len);
        }
        let rest = Pieces::buffer(&buffer, 0, size);
        self.window = Some(Window { buffer, start, size, skip, len, reads, rest, moved: 0 });
    }
}

/// Carries a transfer out in this thread.
#[cfg(test)]
fn carry_out(mut transfer: Transfer, means: &mut Means) -> io::Result<()> {
    let device = Arc::clone(&means.device);
    let disk = device.disk();
    let mut run = || {
        while !transfer.is_empty() {
            assert!(transfer.prepare(means)?, "a buffer");
            let result = disk.admit(transfer.step()).and_then(|step| disk.carry_out(step));
            if transfer.done(result, means)? {
                break;
            }
        }
        Ok(())
    };
    let result = run();
    transfer.end(means);
    result
}

#[cfg(test)]
#[path = "transfer_test.rs"]
mod tests;
