//! Signals eventfds of the front-end in a way that cannot block.
//!
//! The front-end holds the same eventfds. It can fill a counter and clear `O_NONBLOCK` at any moment,
//! and a write of the proxy would then wait until the front-end likes to go on. The kernel itself never
//! waits when it signals an eventfd, and it does so for whoever asks at the end of an asynchronous
//! operation (`IOCB_FLAG_RESFD`, io_submit(2)). So a signal here is a read of no bytes.

#![expect(unsafe_code, reason = "no crate has a safe interface to io_submit")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use libc::{c_long, c_ulong};
use rustix::fs::{MemfdFlags, memfd_create};

/// Operations that may end before they are looked at.
const EVENTS: u32 = 64;
/// Other threads may take the room that one makes.
const ATTEMPTS: usize = 100;
/// `IOCB_CMD_PREAD` is 0, as is every other field that is not named.
const IOCB_FLAG_RESFD: u32 = 1;

/// `struct iocb` (linux/aio_abi.h) of a little-endian machine.
#[repr(C)]
#[derive(Default)]
struct Operation {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

/// `struct io_event`, of which nothing is of interest.
type Event = [u64; 4];

/// Signals eventfds.
#[derive(Debug)]
pub(crate) struct Signaller {
    context: c_ulong,
    /// What is read from.
    empty: OwnedFd,
}

/// The one of this process. It is never destroyed: the kernel takes many milliseconds for that.
static SHARED: OnceLock<Signaller> = OnceLock::new();

impl Signaller {
    /// The one of this process.
    ///
    /// # Errors
    /// When the kernel has no asynchronous I/O, or no more of it (`fs.aio-max-nr`).
    pub(crate) fn shared() -> io::Result<&'static Self> {
        if let Some(shared) = SHARED.get() {
            return Ok(shared);
        }
        let new = Self::new()?;
        Ok(SHARED.get_or_init(|| new))
    }

    fn new() -> io::Result<Self> {
        let empty = memfd_create("vvu-empty", MemfdFlags::CLOEXEC)?;
        let mut context: c_ulong = 0;
        // SAFETY: the kernel writes the identifier of the context to `context`.
        check(unsafe { libc::syscall(libc::SYS_io_setup, EVENTS, &raw mut context) }).map_err(|error| {
            let remedy = "want a kernel with CONFIG_AIO and room below fs.aio-max-nr";
            io::Error::new(error.kind(), format!("no asynchronous I/O to signal with: {error}; {remedy}"))
        })?;
        Ok(Self { context, empty })
    }

    /// Adds one to the counter of `eventfd`, or leaves it as it is if it is full.
    ///
    /// # Errors
    /// When `eventfd` is no eventfd.
    pub(crate) fn signal(&self, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        let number = |fd: BorrowedFd<'_>| fd.as_raw_fd().cast_unsigned();
        let mut operation = Operation {
            file: number(self.empty.as_fd()),
            flags: IOCB_FLAG_RESFD,
            eventfd: number(eventfd),
            ..Operation::default()
        };
        let mut result = self.submit(&mut operation);
        for _ in 0..ATTEMPTS {
            match &result {
                // Earlier operations have ended but take up all the room.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.forget_ended()?,
                _ => break,
            }
            result = self.submit(&mut operation);
        }
        result
    }

    fn submit(&self, operation: &mut Operation) -> io::Result<()> {
        let list = [&raw mut *operation];
        // SAFETY: the list has one operation, which reads no bytes and has ended when the call returns.
        check(unsafe { libc::syscall(libc::SYS_io_submit, self.context, list.len(), list.as_ptr()) })
    }

    fn forget_ended(&self) -> io::Result<()> {
        let mut events: [Event; EVENTS as usize] = [[0; 4]; _];
        let (least, most): (c_long, _) = (0, c_ulong::from(EVENTS));
        // SAFETY: there is room for `most` events; with at least none wanted, the call does not wait.
        check(unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                least,
                most,
                events.as_mut_ptr(),
                std::ptr::null_mut::<libc::timespec>(),
            )
        })
    }
}

impl Drop for Signaller {
    fn drop(&mut self) {
        // SAFETY: nobody uses the context any longer.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

fn check(result: c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn signals_are_counted_however_many() {
        let signaller = Signaller::shared().expect("asynchronous I/O");
        let fd = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
        for _ in 0..10_000 {
            signaller.signal(fd.as_fd()).expect("signal");
        }
        let mut count = [0; 8];
        rustix::io::read(&fd, &mut count).expect("read");
        assert_eq!(u64::from_ne_bytes(count), 10_000);
    }

    #[test]
    fn a_full_counter_in_blocking_mode_does_not_block() {
        let (done, is_done) = mpsc::channel();
        std::thread::spawn(move || {
            let signaller = Signaller::shared().expect("asynchronous I/O");
            let fd = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
            rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).expect("fill");
            let results: Vec<_> = (0..200).map(|_| signaller.signal(fd.as_fd()).is_ok()).collect();
            done.send(results)
        });
        let results = is_done.recv_timeout(Duration::from_secs(20)).expect("a signal blocks");
        assert!(results.iter().all(|ok| *ok));
    }

    #[test]
    fn nothing_but_an_eventfd_is_signalled() {
        let signaller = Signaller::shared().expect("asynchronous I/O");
        let (_read, write) = rustix::pipe::pipe().expect("pipe");
        assert!(signaller.signal(write.as_fd()).is_err());
    }
}
