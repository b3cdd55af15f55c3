//! System calls on a socket whose outcome the kernel notes in shared memory.
//!
//! recvmmsg(2) and sendmmsg(2) write the number of bytes into the structure that they are given. The kernel does that
//! before the call returns, and it ends a killed process only after. So whoever looks at the structure later knows what
//! the call did, even if the caller did not live to see it.

#![expect(
    unsafe_code,
    reason = "no crate lets the caller choose where the kernel writes the outcome of a call"
)]

use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

/// Most bytes of one receive.
const DATA_SIZE: usize = 64 << 10;
/// Bytes of ancillary data, with room for as many descriptors as the kernel passes with one call (`SCM_MAX_FD`, 253).
const CONTROL_SIZE: usize = 1040;

/// `struct mmsghdr`, whose padding has a use: the position in the stream at which the call began. It is in the upper half
/// of `outcome`, the number of bytes that the kernel writes in the lower one.
#[repr(C)]
struct Call {
    header: libc::msghdr,
    outcome: AtomicU64,
}

const _: () = assert!(size_of::<Call>() == size_of::<libc::mmsghdr>());
const _: () = assert!(offset_of!(Call, outcome) == offset_of!(libc::mmsghdr, msg_len));
const _: () = assert!(cfg!(target_endian = "little"));

/// The part of the shared memory that belongs to one socket.
#[repr(C, align(4096))]
pub(super) struct Page {
    send: Call,
    receive: Call,
    control: [u64; CONTROL_SIZE / 8],
    data: [u8; DATA_SIZE],
}

/// The kernel's notes about one socket, each direction by position: a number of bytes, modulo 2^32.
#[derive(Clone, Copy, Debug)]
pub struct Ledger(NonNull<Page>);

// SAFETY: a page is used by one socket at a time, and that by one thread.
unsafe impl Send for Ledger {}

/// What the kernel received in one call.
#[derive(Debug, Default)]
pub struct Landed {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Numbers of the file descriptors.
    pub fds: Vec<RawFd>,
    /// There was no room for all file descriptors.
    pub truncated: bool,
}

impl Ledger {
    /// The ledger in `page`.
    ///
    /// # Safety
    /// `page` is valid, zeroed at first, for the rest of the process's life, and nobody else uses it.
    pub(super) unsafe fn new(page: NonNull<Page>) -> Self {
        Self(page)
    }

    fn page(&self) -> *mut Page {
        self.0.as_ptr()
    }

    fn outcome(call: *mut Call) -> (u32, u32) {
        // SAFETY: `call` is a part of the page, which is valid; the kernel writes to it in calls of this thread only.
        let value = unsafe { &(*call).outcome }.load(Ordering::SeqCst);
        #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
        ((value >> 32) as u32, value as u32)
    }

    /// Begins a call at `position`: until the kernel notes something else, no bytes were moved.
    fn begin(call: *mut Call, header: libc::msghdr, position: u32) {
        // SAFETY: as in `outcome`; the header is no reference to anything.
        unsafe {
            ptr::write_volatile(&raw mut (*call).header, header);
            (*call).outcome.store(u64::from(position) << 32, Ordering::SeqCst);
        }
    }

    /// Returns positions for a new socket, sent and received, of which there are no notes.
    #[must_use]
    pub fn unused_positions(&self) -> (u32, u32) {
        // SAFETY: both are parts of the page, and no reference is made.
        let calls = unsafe { [&raw mut (*self.page()).send, &raw mut (*self.page()).receive] };
        let [sent, received] = calls.map(Self::outcome).map(|(at, len)| at.wrapping_add(len).wrapping_add(1));
        (sent, received)
    }

    /// Receives at most `most` bytes, and the descriptors that come with them; no bytes at all are the end of the stream.
    ///
    /// # Errors
    /// An errno of recvmsg(2), `EAGAIN` if there is nothing to receive now.
    pub fn receive(&self, socket: impl AsFd, position: u32, most: usize) -> Result<Landed, Errno> {
        let page = self.page();
        // SAFETY: the pointers are to parts of the page, which outlives the call; lengths are those of the parts.
        let result = unsafe {
            let mut part =
                libc::iovec { iov_base: (&raw mut (*page).data).cast(), iov_len: most.min(DATA_SIZE) };
            let mut header: libc::msghdr = std::mem::zeroed();
            header.msg_iov = &raw mut part;
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut (*page).control).cast();
            header.msg_controllen = CONTROL_SIZE as _;
            let call = &raw mut (*page).receive;
            Self::begin(call, header, position);
            let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
            libc::syscall(libc::SYS_recvmmsg, socket.as_fd().as_raw_fd(), call, 1, flags, ptr::null::<u8>())
        };
        check(result)?;
        Ok(self.landed(position))
    }

    /// Returns what was received at `position` and not beyond, if that was the last call.
    #[must_use]
    pub fn landed(&self, position: u32) -> Landed {
        let page = self.page();
        // SAFETY: the page is valid, and the kernel writes to it in calls of this thread only. Lengths are checked
        // against the parts.
        unsafe {
            let call = &raw mut (*page).receive;
            let (at, len) = Self::outcome(call);
            let len = usize::try_from(len).unwrap_or(0).min(DATA_SIZE);
            if at != position || len == 0 {
                return Landed::default();
            }
            let mut bytes = vec![0; len];
            ptr::copy_nonoverlapping((&raw const (*page).data).cast(), bytes.as_mut_ptr(), len);
            let mut header = ptr::read_volatile(&raw const (*call).header);
            // The page may be mapped elsewhere than it was.
            header.msg_control = (&raw mut (*page).control).cast();
            header.msg_controllen = header.msg_controllen.min(CONTROL_SIZE as _);
            let truncated = header.msg_flags & libc::MSG_CTRUNC != 0;
            Landed { bytes, fds: descriptors(&header), truncated }
        }
    }

    /// Sends as much of `bytes` as the peer takes, with `fds`, and returns how much that is.
    ///
    /// # Errors
    /// An errno of sendmsg(2), `EAGAIN` if the peer takes nothing now.
    pub fn send(
        &self,
        socket: impl AsFd,
        position: u32,
        bytes: &[u8],
        fds: &[impl AsFd],
    ) -> Result<usize, Errno> {
        let numbers: Vec<RawFd> = fds.iter().map(|fd| fd.as_fd().as_raw_fd()).collect();
        let mut control = [0u64; CONTROL_SIZE / 8];
        let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        // SAFETY: the pointers are to values that outlive the call. `numbers` fit, since a message has few descriptors.
        let (result, sent) = unsafe {
            let mut header: libc::msghdr = std::mem::zeroed();
            header.msg_iov = &raw mut part;
            header.msg_iovlen = 1;
            if !numbers.is_empty() {
                let size = u32::try_from(size_of_val(&*numbers)).map_err(|_| Errno::INVAL)?;
                let space = libc::CMSG_SPACE(size) as usize;
                if space > CONTROL_SIZE {
                    return Err(Errno::INVAL);
                }
                header.msg_control = control.as_mut_ptr().cast();
                header.msg_controllen = space as _;
                let message = libc::CMSG_FIRSTHDR(&raw const header);
                (*message).cmsg_level = libc::SOL_SOCKET;
                (*message).cmsg_type = libc::SCM_RIGHTS;
                (*message).cmsg_len = libc::CMSG_LEN(size) as _;
                let data = libc::CMSG_DATA(message).cast::<RawFd>();
                ptr::copy_nonoverlapping(numbers.as_ptr(), data, numbers.len());
            }
            let call = &raw mut (*self.page()).send;
            Self::begin(call, header, position);
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            let result = libc::syscall(libc::SYS_sendmmsg, socket.as_fd().as_raw_fd(), call, 1, flags);
            (result, Self::outcome(call).1)
        };
        check(result)?;
        Ok(usize::try_from(sent).unwrap_or(0))
    }

    /// Returns the number of bytes that were sent from `position` on.
    #[must_use]
    pub fn sent_since(&self, position: u32) -> usize {
        // SAFETY: it is a part of the page, and no reference is made.
        let (at, len) = Self::outcome(unsafe { &raw mut (*self.page()).send });
        // A negative distance is that of a note about an earlier socket.
        let distance = at.wrapping_add(len).wrapping_sub(position).cast_signed();
        usize::try_from(distance).unwrap_or(0)
    }
}

/// The numbers of the descriptors in the ancillary data of `header`.
///
/// # Safety
/// The control data of `header` is readable memory of the length it says.
unsafe fn descriptors(header: &libc::msghdr) -> Vec<RawFd> {
    let mut numbers = Vec::new();
    // SAFETY: the macros stay within the control data.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while let Some(found) = message.as_ref() {
            if (found.cmsg_level, found.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                #[allow(clippy::unnecessary_cast, reason = "the width depends on the C library")]
                let bytes = (found.cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
                let count = bytes.min(CONTROL_SIZE) / size_of::<RawFd>();
                let data = libc::CMSG_DATA(message).cast::<RawFd>();
                numbers.extend((0..count).map(|index| data.add(index).read_unaligned()));
            }
            message = libc::CMSG_NXTHDR(header, message);
        }
    }
    numbers
}

impl Landed {
    /// Takes the descriptors, right after the call that received them.
    #[must_use]
    pub fn take_fds(&mut self) -> Vec<OwnedFd> {
        let numbers = std::mem::take(&mut self.fds);
        // SAFETY: the kernel has just made these descriptors for this process, and nobody else owns them.
        numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect()
    }
}

fn check(result: libc::c_long) -> Result<(), Errno> {
    match result {
        1 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{SocketSlot, Store};
    use super::*;
    use crate::event::Event;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn ledger() -> Ledger {
        Store::create().expect("store").ledger(SocketSlot::Client)
    }

    #[test]
    fn what_was_received_is_there_until_the_next_call() {
        let ledger = ledger();
        let (ours, mut peer) = UnixStream::pair().expect("pair");
        let (_, position) = ledger.unused_positions();
        assert_eq!(ledger.receive(&ours, position, 8).expect_err("nothing"), Errno::AGAIN);
        assert_eq!(ledger.landed(position).bytes, b"");
        peer.write_all(b"abcdefghij").expect("write");
        assert_eq!(ledger.receive(&ours, position, 8).expect("bytes").bytes, b"abcdefgh");
        assert_eq!(ledger.landed(position).bytes, b"abcdefgh");
        assert_eq!(ledger.landed(position + 8).bytes, b"");
        assert_eq!(ledger.receive(&ours, position + 8, 8).expect("bytes").bytes, b"ij");
        drop(peer);
        assert_eq!(ledger.receive(&ours, position + 10, 8).expect("the end").bytes, b"");
    }

    #[test]
    fn what_was_sent_is_known_by_position() {
        let ledger = ledger();
        let (ours, mut peer) = UnixStream::pair().expect("pair");
        let (position, _) = ledger.unused_positions();
        assert_eq!(ledger.sent_since(position), 0);
        let none: &[OwnedFd] = &[];
        assert_eq!(ledger.send(&ours, position, b"abc", none), Ok(3));
        assert_eq!(ledger.send(&ours, position + 3, b"de", none), Ok(2));
        assert_eq!((ledger.sent_since(position), ledger.sent_since(position + 3)), (5, 2));
        let (next, _) = ledger.unused_positions();
        assert_eq!(ledger.sent_since(next), 0);
        let mut got = [0; 5];
        peer.read_exact(&mut got).expect("bytes");
        assert_eq!(&got, b"abcde");
        while ledger.send(&ours, position + 5, &[0; 4096], none).is_ok() {}
        assert_eq!(ledger.sent_since(position + 5), 0);
    }

    #[test]
    fn descriptors_come_with_their_bytes() {
        let (one, other) = (ledger(), ledger());
        let (ours, peer) = UnixStream::pair().expect("pair");
        let events = [Event::new().expect("event"), Event::new().expect("event")];
        assert_eq!(one.send(&ours, 7, b"x", &events), Ok(1));
        let mut landed = other.receive(&peer, 9, 4).expect("bytes");
        assert_eq!((landed.fds.len(), other.landed(9).fds), (2, landed.fds.clone()));
        let received = landed.take_fds();
        rustix::io::write(&received[1], &1u64.to_ne_bytes()).expect("an eventfd");
        assert_eq!((events[0].drain(), events[1].drain()), (0, 1));
    }
}
