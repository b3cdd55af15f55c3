//! What the fuzz targets share: messages, file descriptors for hostile peers to attach, and a way to send them.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vvu::message_socket::Message;
use vvu::spec::vhost_user::Header;

/// Most file descriptors that one message attaches: one more than any protocol here allows.
pub const FDS_MAX: usize = 33;

/// A kind of file descriptor that a peer attaches.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Fd {
    /// The memory file that the two sides agreed on.
    Agreed,
    /// One of two eventfds.
    Event(bool),
    /// Another sealed memfd.
    Sealed,
    /// A memfd without seals.
    Memfd,
    /// The reading end of a pipe.
    Pipe,
    /// The end of a pair of UNIX sockets whose other end the fuzz target has.
    Socket,
    /// A UNIX socket whose peer is gone.
    Orphan,
}

/// File descriptors of each kind, which all executions of a process share.
#[derive(Debug)]
pub struct Pool {
    agreed: OwnedFd,
    events: [OwnedFd; 2],
    sealed: OwnedFd,
    memfd: OwnedFd,
    pipe: (OwnedFd, OwnedFd),
    orphan: OwnedFd,
}

impl Pool {
    /// A pool whose agreed memory file is `agreed`.
    #[must_use]
    pub fn new(agreed: OwnedFd) -> Self {
        let memfd = |flags| {
            let file = memfd_create("fuzz", MemfdFlags::CLOEXEC | flags).expect("memfd");
            ftruncate(&file, 0x10000).expect("size");
            file
        };
        let sealed = memfd(MemfdFlags::ALLOW_SEALING);
        fcntl_add_seals(&sealed, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).expect("seals");
        Self {
            agreed,
            events: [event(), event()],
            sealed,
            memfd: memfd(MemfdFlags::empty()),
            pipe: rustix::pipe::pipe().expect("pipe"),
            orphan: UnixStream::pair().expect("pair").0.into(),
        }
    }

    /// The descriptors of these kinds; those that are `socket`s are left out if there is none.
    pub fn get<'p>(&'p self, kinds: &[Fd], socket: Option<&'p UnixStream>) -> Vec<BorrowedFd<'p>> {
        let get = |kind: &Fd| match kind {
            Fd::Agreed => Some(self.agreed.as_fd()),
            Fd::Event(which) => Some(self.events[usize::from(*which)].as_fd()),
            Fd::Sealed => Some(self.sealed.as_fd()),
            Fd::Memfd => Some(self.memfd.as_fd()),
            Fd::Pipe => Some(self.pipe.0.as_fd()),
            Fd::Socket => socket.map(AsFd::as_fd),
            Fd::Orphan => Some(self.orphan.as_fd()),
        };
        kinds.iter().filter_map(get).take(FDS_MAX).collect()
    }

    /// The same, for somebody who closes them.
    #[must_use]
    pub fn duplicate(&self, kinds: &[Fd]) -> Vec<OwnedFd> {
        let fds = self.get(kinds, None);
        fds.into_iter().map(|fd| fd.try_clone_to_owned().expect("descriptor")).collect()
    }

    /// Signals one of the two eventfds.
    pub fn signal(&self, which: bool) {
        // A full counter is signalled already.
        let _ = rustix::io::write(&self.events[usize::from(which)], &1u64.to_ne_bytes());
    }
}

/// An eventfd in non-blocking mode.
#[must_use]
pub fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd")
}

/// Sends bytes in one call. Neither a peer that has hung up nor one that does not read is an error.
pub fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)), "room for descriptors");
    match sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Ok(_) | Err(Errno::PIPE | Errno::CONNRESET | Errno::AGAIN | Errno::NOTCONN) => {}
        Err(error) => panic!("cannot send: {error}"),
    }
}

/// Reads and drops what has arrived.
pub fn drain(stream: &UnixStream) {
    let mut buffer = [0; 4096];
    let mut parts = [std::io::IoSliceMut::new(&mut buffer)];
    // Without room for them, the kernel closes the descriptors that come along.
    let mut control = rustix::net::RecvAncillaryBuffer::default();
    let flags = rustix::net::RecvFlags::DONTWAIT;
    while rustix::net::recvmsg(stream, &mut parts, &mut control, flags).is_ok_and(|got| got.bytes == 4096) {}
}

/// Makes a vhost-user message whose header has the right size.
#[must_use]
pub fn message(request: impl Into<u32>, flags: u32, payload: &[u8]) -> Message {
    let size = u32::try_from(payload.len()).expect("small");
    Message::new(Header { request: request.into(), flags, size }, payload)
}
