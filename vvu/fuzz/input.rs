//! Parses the fuzzer's bytes, and makes the file descriptors that hostile peers attach.

use std::os::fd::OwnedFd;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// The fuzzer's bytes, read from first to last. Bytes after the end read as 0.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Whether all bytes are read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Reads up to `count` bytes.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.bytes(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// Reads a length of one byte, then as many bytes.
    pub fn block(&mut self) -> &'a [u8] {
        let count = self.u8();
        self.bytes(count.into())
    }

    /// Reads a number below `end`.
    pub fn below(&mut self, end: u8) -> u8 {
        self.u8() % end
    }
}

/// Makes file descriptors. `pattern` says how many and of which kinds: an eventfd, a memfd, a pipe, or one
/// from `own`, which the peer was given before.
pub fn fds(pattern: u8, own: &impl Fn() -> OwnedFd) -> Vec<OwnedFd> {
    let count = pattern & 3;
    (0..count).map(|index| fd(pattern >> (2 + 2 * index) & 3, own)).collect()
}

fn fd(kind: u8, own: &impl Fn() -> OwnedFd) -> OwnedFd {
    match kind {
        0 => own(),
        1 => eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd"),
        2 => {
            let file = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("memfd");
            ftruncate(&file, 0x10000).expect("size");
            file
        }
        _ => rustix::pipe::pipe().expect("pipe").0,
    }
}
