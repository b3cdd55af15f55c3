//! A request on its way: which system call comes next, and what follows from its result.
//!
//! An engine asks for a step ([`next`](Job::next)), carries it out in its own way, and reports the result
//! ([`done`](Job::done)), until there is nothing left to do.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::vec;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};

use super::device::BlockDevice;
use super::disk::{SECTOR_SIZE, Step};
use super::failure::Failure;
use super::gate;
use super::means::Means;
use super::pieces::Pieces;
use super::ranges::{Range, ranges};
use super::request::{Rejected, Request};
use super::transfer::Transfer;
use crate::backend::chain::Chain;

/// A request that is being carried out.
#[derive(Debug)]
pub(super) struct Job {
    memory: Arc<GuestMemoryMmap>,
    /// Address of the status byte, if there is one.
    status: Option<GuestAddress>,
    /// Bytes of data that are written to the guest if the request succeeds.
    written: u32,
    stage: Stage,
    /// Ranges to discard or zero after this one.
    ranges: vec::IntoIter<Range>,
    discards: bool,
    /// What is changed has to be durable at the end.
    durable: bool,
    /// The range that this request has locked.
    locked: Option<gate::Bytes>,
    result: Result<(), Failure>,
}

#[derive(Debug)]
enum Stage {
    Transfer(Transfer),
    /// Frees or zeroes a range by a call made for that.
    Change(Range),
    Flush {
        /// No other flush can begin before this one has ended.
        begun: bool,
    },
    End,
}

/// What a request needs next.
#[derive(Debug)]
pub(super) enum Next<'a> {
    /// This system call.
    Step(Step<'a>),
    /// Another request has to go on first.
    Wait,
    /// Nothing.
    End,
}

impl Job {
    /// Takes a request apart and checks all of it.
    pub(super) fn new(device: &BlockDevice, memory: &Arc<GuestMemoryMmap>, chain: Chain) -> Self {
        let mut job = Self {
            memory: Arc::clone(memory),
            status: None,
            written: 0,
            stage: Stage::End,
            ranges: Vec::new().into_iter(),
            discards: false,
            durable: false,
            locked: None,
            result: Ok(()),
        };
        match Request::parse(memory, chain) {
            Ok(request) => {
                job.status = Some(request.status);
                job.result = job.begin(device, &request);
            }
            Err(Rejected { reason, status }) => {
                job.status = status;
                job.result = Err(reason.into());
            }
        }
        job
    }

    fn begin(&mut self, device: &BlockDevice, request: &Request) -> Result<(), Failure> {
        let memory = &self.memory;
        match request.kind {
            VIRTIO_BLK_T_IN => {
                let offset = device.offset(request.sector, &request.output)?;
                // The used length also counts the status, and has to fit into 32 bits.
                let len = request.output.len();
                let written = u32::try_from(len).ok().filter(|len| *len < u32::MAX);
                self.written = written.ok_or(Failure::Size(len))?;
                let pieces = Pieces::guest(memory, &request.output, Permissions::Write)?;
                self.stage = self.transfer(Transfer::read(offset, pieces));
            }
            VIRTIO_BLK_T_OUT => {
                device.check_writable()?;
                let offset = device.offset(request.sector, &request.input)?;
                let pieces = Pieces::guest(memory, &request.input, Permissions::Read)?;
                self.durable = device.is_write_through();
                self.stage = self.transfer(Transfer::write(offset, pieces));
            }
            VIRTIO_BLK_T_FLUSH => self.stage = Stage::Flush { begun: false },
            VIRTIO_BLK_T_GET_ID => {
                let written = request.output.write(memory, device.disk().serial())?;
                self.written = u32::try_from(written).unwrap_or(0);
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                device.check_writable()?;
                // All ranges are checked before any is touched.
                self.ranges = ranges(device.disk(), memory, request)?.into_iter();
                self.discards = request.kind == VIRTIO_BLK_T_DISCARD;
                self.durable = device.is_write_through();
                self.stage = self.next_stage();
            }
            _ => return Err(Failure::Unsupported),
        }
        Ok(())
    }

    fn transfer(&mut self, transfer: Transfer) -> Stage {
        if transfer.is_empty() { self.next_stage() } else { Stage::Transfer(transfer) }
    }

    /// Whether requests that are done should not have to wait for this one to be announced.
    pub(super) fn is_slow(&self) -> bool {
        matches!(self.stage, Stage::Change(_) | Stage::Flush { .. })
    }

    /// What comes next. Asked again before [`done`](Self::done), the answer is the same.
    pub(super) fn next(&mut self, means: &mut Means) -> Next<'_> {
        match self.prepare(means) {
            Ok(true) => {}
            Ok(false) => return Next::Wait,
            Err(error) => self.fail(error.into(), means),
        }
        let disk = means.disk();
        match &self.stage {
            Stage::Transfer(transfer) => Next::Step(transfer.step()),
            Stage::Change(Range { offset, len, .. }) if self.discards && disk.is_device() => {
                Next::Step(Step::Discard { offset: *offset, len: *len })
            }
            Stage::Change(Range { offset, len, unmap }) => {
                let frees = self.discards || *unmap;
                let how = if frees { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
                let flags = how | FallocateFlags::KEEP_SIZE;
                Next::Step(Step::Allocate { flags, offset: *offset, len: *len })
            }
            Stage::Flush { .. } => Next::Step(Step::Flush),
            Stage::End => Next::End,
        }
    }

    /// Gets what the stage needs. Returns false if it has to wait for that.
    fn prepare(&mut self, means: &mut Means) -> io::Result<bool> {
        let range = match &mut self.stage {
            Stage::Transfer(transfer) => transfer.writes_to(),
            Stage::Change(range) => Some((range.offset, range.offset + range.len)),
            Stage::Flush { begun } => {
                *begun = *begun || means.disk().gate.begin_flush(means.waiter.as_ref())?;
                return Ok(*begun);
            }
            Stage::End => return Ok(true),
        };
        if self.locked.is_none() {
            // Where blocks are as small as sectors, nothing is changed by reading and writing what is around it.
            let direct = means.disk().direct().filter(|direct| direct.block > SECTOR_SIZE.into());
            if let (Some((start, end)), Some(direct)) = (range, direct) {
                let blocks = (direct.down(start), direct.up(end));
                if !means.disk().gate.lock(blocks, means.waiter.as_ref()) {
                    return Ok(false);
                }
                self.locked = Some(blocks);
            }
        }
        match &mut self.stage {
            Stage::Transfer(transfer) => transfer.prepare(means),
            _ => Ok(true),
        }
    }

    /// Takes the result of the step into account: the number of bytes that it moved.
    pub(super) fn done(&mut self, result: io::Result<usize>, means: &mut Means) {
        match (&mut self.stage, result) {
            (Stage::Transfer(transfer), result) => match transfer.done(result, means) {
                Ok(true) => self.go_on(means),
                Ok(false) => {}
                Err(error) => self.fail(error.into(), means),
            },
            (Stage::Change(_) | Stage::Flush { .. }, Err(error))
                if error.kind() == ErrorKind::Interrupted => {}
            (Stage::Change(range), Err(error)) if is_unsupported(&error) => {
                if self.discards {
                    // It is a hint.
                    self.go_on(means);
                } else {
                    let len = usize::try_from(range.len).unwrap_or(usize::MAX);
                    self.stage = Stage::Transfer(Transfer::write(range.offset, Pieces::zeroes(len)));
                }
            }
            (Stage::Flush { .. }, result) => {
                means.disk().gate.end_flush(result.as_ref().map(drop));
                match result {
                    Ok(_) => self.go_on(means),
                    Err(error) => self.fail(error.into(), means),
                }
            }
            (Stage::Change(_), Ok(_)) => self.go_on(means),
            (Stage::Change(_), Err(error)) => self.fail(error.into(), means),
            (Stage::End, _) => {}
        }
    }

    /// Ends the stage and begins the next one.
    fn go_on(&mut self, means: &Means) {
        if let Some(range) = self.locked.take() {
            means.disk().gate.unlock(range);
        }
        self.stage = self.next_stage();
    }

    fn next_stage(&mut self) -> Stage {
        match self.ranges.next() {
            Some(range) => Stage::Change(range),
            None if std::mem::take(&mut self.durable) => Stage::Flush { begun: false },
            None => Stage::End,
        }
    }

    fn fail(&mut self, failure: Failure, means: &mut Means) {
        if let Stage::Transfer(transfer) = &mut self.stage {
            transfer.end(means);
        }
        (self.ranges, self.durable, self.result) = (Vec::new().into_iter(), false, Err(failure));
        self.go_on(means);
    }

    /// Writes the status of a request that has come to its end, and returns the number of bytes that were written to the
    /// guest.
    pub(super) fn finish(self, device: &BlockDevice) -> u32 {
        let (status, written) = match &self.result {
            Ok(()) => (VIRTIO_BLK_S_OK, self.written),
            Err(failure) => {
                device.log(failure);
                (failure.status(), 0)
            }
        };
        let [status, ..] = status.to_le_bytes();
        let placed = self.status.is_some_and(|addr| self.memory.write_obj(status, addr).is_ok());
        if placed { written + 1 } else { 0 }
    }
}

/// Whether a file system or block device cannot do what was asked of it. A block device answers INVAL when its blocks are
/// larger than the range's alignment.
fn is_unsupported(error: &io::Error) -> bool {
    let errors = [Errno::OPNOTSUPP, Errno::NOSYS, Errno::INVAL];
    errors.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

#[cfg(test)]
#[path = "job_test.rs"]
mod tests;
