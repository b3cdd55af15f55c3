//! The io_uring engine: has the kernel carry out many requests at a time, which end in any order.
//!
//! Each request has at most one system call in the ring, so the ring always has room. Requests that have to wait for another one
//! are tried again whenever one has got further.
#![expect(unsafe_code, reason = "the kernel uses memory that entries of the ring point to")]

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::squeue::Entry;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode};
use vm_memory::GuestMemoryMmap;

use super::device::BlockDevice;
use super::disk::Step;
use super::job::{Job, Next};
use super::means::Means;
use crate::backend::engine::{Engine, Finished};
use crate::backend::queue::Taken;
use crate::event::{Event, wait_readable};

/// Most requests of a queue in flight.
const ENTRIES: u16 = 128;
/// How often, and how long apart, a submission is tried that the kernel refuses for want of memory.
const ATTEMPTS: u32 = 100;
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// The engine of one queue.
pub(super) struct UringEngine {
    ring: IoUring,
    means: Means,
    wake_up: Arc<Event>,
    slots: Vec<Option<Slot>>,
    /// Slots that are empty.
    free: Vec<u16>,
    /// Slots whose system call is in the ring and not yet taken by the kernel, in this order.
    pushed: VecDeque<u16>,
    /// System calls that the kernel has.
    in_kernel: usize,
    /// Slots that wait for another request.
    waiting: VecDeque<u16>,
    finished: VecDeque<Finished>,
    /// The kernel takes nothing more: steps are carried out by system calls.
    broken: bool,
}

/// A request in flight.
#[derive(Debug)]
struct Slot {
    head: u16,
    size: u64,
    job: Job,
}

/// Finds out whether the kernel has an io_uring with all that the engine needs for this process.
///
/// # Errors
/// When it has not.
pub(super) fn probe() -> io::Result<()> {
    let ring = IoUring::new(ENTRIES.into())?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
    if needed.iter().all(|code| probe.is_supported(*code)) {
        Ok(())
    } else {
        Err(ErrorKind::Unsupported.into())
    }
}

impl UringEngine {
    /// # Errors
    /// When there is no memory or file descriptor left.
    pub(super) fn new(device: Arc<BlockDevice>, wake_up: &Arc<Event>) -> io::Result<Self> {
        Ok(Self {
            ring: IoUring::new(ENTRIES.into())?,
            means: Means::new(device, Some(Arc::clone(wake_up))),
            wake_up: Arc::clone(wake_up),
            slots: (0..ENTRIES).map(|_| None).collect(),
            free: (0..ENTRIES).rev().collect(),
            pushed: VecDeque::new(),
            in_kernel: 0,
            waiting: VecDeque::new(),
            finished: VecDeque::new(),
            broken: false,
        })
    }

    /// Brings the request of a slot to its next system call, and returns it if it needs none any more.
    fn advance(&mut self, index: u16) -> Option<Finished> {
        let device = Arc::clone(&self.means.device);
        let disk = device.disk();
        let place = self.slots.get_mut(usize::from(index))?;
        let slot = place.as_mut()?;
        loop {
            let step = match slot.job.next(&mut self.means) {
                Next::Step(step) => step,
                Next::Wait => {
                    self.waiting.push_back(index);
                    return None;
                }
                Next::End => break,
            };
            let result = disk.admit(step).and_then(|step| match entry(disk.fd(), step) {
                Some(entry) if !self.broken => {
                    // SAFETY: what the entry points to belongs to the request in this slot, which stays as it is until the
                    // kernel has completed the entry.
                    let pushed = unsafe { self.ring.submission().push(&entry.user_data(index.into())) };
                    pushed.map(|()| None).map_err(io::Error::other)
                }
                _ => disk.carry_out(step).map(Some),
            });
            let Some(result) = result.transpose() else {
                self.pushed.push_back(index);
                return None;
            };
            slot.job.done(result, &mut self.means);
        }
        let Slot { head, size, job } = place.take()?;
        self.free.push(index);
        Some(Finished { head, written: job.finish(&device), size })
    }

    /// Takes the results that the kernel has, and brings the requests on.
    fn reap(&mut self) {
        loop {
            let completed = self.ring.completion().next();
            let Some(completed) = completed else { break };
            self.in_kernel -= 1;
            let Ok(index) = u16::try_from(completed.user_data()) else { continue };
            let Some(Some(slot)) = self.slots.get_mut(usize::from(index)) else { continue };
            let got = completed.result();
            let result = usize::try_from(got).map_err(|_| io::Error::from_raw_os_error(got.saturating_neg()));
            slot.job.done(result, &mut self.means);
            let finished = self.advance(index);
            self.finished.extend(finished);
        }
        // One that can go on may let another one go on.
        loop {
            let before = self.waiting.len();
            for index in std::mem::take(&mut self.waiting) {
                let finished = self.advance(index);
                self.finished.extend(finished);
            }
            if self.waiting.len() == before {
                return;
            }
        }
    }

    /// Carries out by system calls, from now on, what the kernel does not take from the ring.
    fn give_up_ring(&mut self, error: &io::Error) {
        log::error!(
            "the kernel takes no more requests from an io_uring, so they are carried out one by one: {error}"
        );
        self.broken = true;
        for index in std::mem::take(&mut self.pushed) {
            let finished = self.advance(index);
            self.finished.extend(finished);
        }
    }

    fn ring_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring keeps its descriptor open as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Engine for UringEngine {
    fn begin(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        Taken { head, chain }: Taken,
        announce: &mut dyn FnMut(),
    ) -> Option<Finished> {
        let index = self.free.pop()?;
        let size = chain.len();
        let job = Job::new(&self.means.device, memory, chain);
        // The kernel has no way to discard a range of a block device but a call that waits.
        if job.is_slow() && self.means.disk().is_device() {
            announce();
        }
        self.slots[usize::from(index)] = Some(Slot { head, size, job });
        self.advance(index)
    }

    fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.finished.len()
    }

    fn submit(&mut self) {
        let mut failure = None;
        for _ in 0..ATTEMPTS {
            if self.pushed.is_empty() {
                return;
            }
            let result = self.ring.submit();
            let left = self.ring.submission().len();
            let taken = self.pushed.len().saturating_sub(left);
            self.pushed.drain(..taken);
            self.in_kernel += taken;
            match result {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    failure = Some(error);
                    // The end of a request gives memory back. Whatever the wait comes to, the attempts are counted.
                    let _ = wait_readable(&[self.ring_fd()], Some(Instant::now() + RETRY_INTERVAL));
                }
            }
        }
        self.give_up_ring(&failure.unwrap_or_else(|| ErrorKind::Interrupted.into()));
    }

    fn next_finished(&mut self) -> Option<Finished> {
        if self.finished.is_empty() && self.in_flight() > 0 {
            self.reap();
            self.submit();
        }
        self.finished.pop_front()
    }

    fn wait(&mut self) {
        self.reap();
        self.submit();
        if !self.finished.is_empty() || self.in_flight() == 0 {
            return;
        }
        let woken = wait_readable(&[self.ring_fd(), self.wake_up.as_fd()], None);
        if let Ok(Some(1)) = woken {
            self.wake_up.drain();
        }
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.ring_fd())
    }
}

impl Drop for UringEngine {
    /// The kernel uses the memory of the requests that it has.
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            self.wait();
            while self.next_finished().is_some() {}
        }
    }
}

impl fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringEngine").field("slots", &self.slots).finish_non_exhaustive()
    }
}

/// The entry of the ring for `step`; `None` if the ring has none.
fn entry(disk: i32, step: Step<'_>) -> Option<Entry> {
    let fd = Fd(disk);
    let count = |pieces: &[libc::iovec]| u32::try_from(pieces.len()).ok();
    Some(match step {
        Step::Read { pieces, offset } => {
            opcode::Readv::new(fd, pieces.as_ptr(), count(pieces)?).offset(offset).build()
        }
        Step::Write { pieces, offset } => {
            opcode::Writev::new(fd, pieces.as_ptr(), count(pieces)?).offset(offset).build()
        }
        Step::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        Step::Allocate { flags, offset, len } => {
            let mode = i32::try_from(flags.bits()).ok()?;
            opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
        }
        Step::Discard { .. } => return None,
    })
}
