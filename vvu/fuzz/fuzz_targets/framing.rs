//! Feeds the sockets of both protocols any bytes in any pieces, with file descriptors between them.

#![no_main]

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vvu::framed_socket::{FramedSocket, Framing};
use vvu::vfio_user;
use vvu_fuzz::{Fd, Pool, send};

#[derive(Arbitrary, Debug)]
enum Piece {
    Bytes {
        fds: Vec<Fd>,
        bytes: Vec<u8>,
    },
    /// The header of a vhost-user message, and as much of its payload.
    VhostUser {
        request: u8,
        size: u16,
        sent: u8,
        fds: Vec<Fd>,
    },
    /// The same of vfio-user.
    VfioUser {
        command: u8,
        size: u16,
        sent: u8,
        fds: Vec<Fd>,
    },
    Read,
    Close,
}

fuzz_target!(|input: (bool, Vec<Piece>)| {
    let (is_vfio_user, pieces) = input;
    if is_vfio_user {
        run::<vfio_user::protocol::Header>(&pieces);
    } else {
        run::<vvu::spec::vhost_user::Header>(&pieces);
    }
});

thread_local! {
    static POOL: RefCell<Pool> = RefCell::new(Pool::new(OwnedFd::from(UnixStream::pair().expect("pair").0)));
}

/// Feeds a socket, which has to give nothing but whole messages, and as many descriptors as it got.
fn run<H: Framing>(pieces: &[Piece]) {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let mut socket = FramedSocket::<H>::new(ours);
    let mut peer = Some(theirs);
    let (mut sent, mut received) = (0, 0);
    for piece in pieces.iter().take(32) {
        let (mut bytes, fds): (Vec<u8>, &[Fd]) = match piece {
            Piece::Bytes { fds, bytes } => (bytes.clone(), fds),
            Piece::VhostUser { request, size, sent, fds } => {
                let header = [u32::from(*request), 1, u32::from(*size)].map(u32::to_le_bytes).concat();
                ([header, vec![0; (*sent).into()]].concat(), fds)
            }
            Piece::VfioUser { command, size, sent, fds } => {
                let [command, _] = u16::from(*command).to_le_bytes();
                let header = [&[1, 0, command, 0][..], &u32::from(*size).to_le_bytes(), &[0; 8]].concat();
                ([header, vec![0; (*sent).into()]].concat(), fds)
            }
            Piece::Read => (Vec::new(), &[]),
            Piece::Close => {
                peer = None;
                (Vec::new(), &[])
            }
        };
        bytes.truncate(1024);
        if let Some(peer) = &peer
            && !bytes.is_empty()
        {
            POOL.with_borrow(|pool| {
                let fds = pool.get(fds, None);
                sent += fds.len();
                send(peer, &bytes, &fds);
            });
            if !matches!(piece, Piece::Bytes { .. }) {
                // What follows is read together with this.
                continue;
            }
        }
        loop {
            match socket.receive() {
                Ok(Some(message)) => {
                    assert_eq!(message.bytes.len(), H::SIZE + message.header.payload_len());
                    assert!(message.fds.len() <= H::FDS_MAX);
                    received += message.fds.len();
                    assert!(received <= sent);
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}
