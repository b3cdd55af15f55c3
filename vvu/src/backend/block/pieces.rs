//! Pieces of mapped memory in the form in which system calls take them.
#![expect(unsafe_code, reason = "raw pieces of memory are sent to another thread, and copied")]

use std::sync::Arc;

use libc::iovec;
use vm_memory::{GuestMemoryMmap, MmapRegion, Permissions, VolatileMemory, VolatileSlice};

use crate::backend::chain::{ChainError, Segments};

/// Most pieces of memory in one system call (`IOV_MAX`).
const COUNT_MAX: usize = 1024;

/// Aligned for every disk.
#[repr(align(4096))]
struct Zeroes([u8; 64 << 10]);

static ZEROES: Zeroes = Zeroes([0; _]);

/// What keeps pieces mapped.
#[derive(Debug)]
enum Owner {
    Guest(Arc<GuestMemoryMmap>),
    Buffer {
        _mapped: Arc<MmapRegion>,
    },
    /// It is there as long as the program.
    Static,
}

/// Pieces of memory that make up one run of bytes. Others may change the bytes at any time.
#[derive(Debug)]
pub(super) struct Pieces {
    all: Vec<iovec>,
    /// Number of pieces that are used up.
    first: usize,
    owner: Owner,
}

// SAFETY: the pointers lead to memory that `owner` keeps mapped in every thread. Nothing but the kernel, and copies of
// volatile bytes, access it.
unsafe impl Send for Pieces {}

impl Pieces {
    /// The memory of `segments`.
    ///
    /// # Errors
    /// [`ChainError::Memory`] when the guest has no such memory.
    pub(super) fn guest(
        memory: &Arc<GuestMemoryMmap>,
        segments: &Segments,
        access: Permissions,
    ) -> Result<Self, ChainError> {
        let all = segments.slices(memory, access)?.iter().map(piece).collect();
        Ok(Self { all, first: 0, owner: Owner::Guest(Arc::clone(memory)) })
    }

    /// `len` bytes at `start` of a buffer. What of that is behind its end is left out.
    pub(super) fn buffer(buffer: &Arc<MmapRegion>, start: usize, len: usize) -> Self {
        let all = buffer.get_slice(start, len).iter().map(piece).collect();
        Self { all, first: 0, owner: Owner::Buffer { _mapped: Arc::clone(buffer) } }
    }

    /// `len` zeroes, to read.
    pub(super) fn zeroes(len: usize) -> Self {
        let size = ZEROES.0.len();
        let piece = |start: usize| iovec {
            iov_base: ZEROES.0.as_ptr().cast_mut().cast(),
            iov_len: size.min(len - start),
        };
        Self { all: (0..len).step_by(size).map(piece).collect(), first: 0, owner: Owner::Static }
    }

    /// The pieces for the next system call; none when all are used up.
    pub(super) fn next(&self) -> &[iovec] {
        let rest = &self.all[self.first..];
        &rest[..rest.len().min(COUNT_MAX)]
    }

    /// The guest memory that the pieces are in.
    pub(super) fn memory(&self) -> Option<&Arc<GuestMemoryMmap>> {
        match &self.owner {
            Owner::Guest(memory) => Some(memory),
            Owner::Buffer { .. } | Owner::Static => None,
        }
    }

    /// Bytes that are not used up.
    pub(super) fn len(&self) -> usize {
        self.all[self.first..].iter().map(|piece| piece.iov_len).sum()
    }

    /// Whether a piece has a byte in a range: the address of the first byte, and of the one behind the last.
    pub(super) fn touches(&self, range: (usize, usize)) -> bool {
        self.all[self.first..].iter().any(|piece| {
            let start = piece.iov_base.addr();
            start < range.1 && range.0 < start.saturating_add(piece.iov_len)
        })
    }

    /// Whether all pieces are inside of a range.
    pub(super) fn are_inside(&self, range: (usize, usize)) -> bool {
        self.all[self.first..].iter().all(|piece| {
            let start = piece.iov_base.addr();
            range.0 <= start && start.saturating_add(piece.iov_len) <= range.1
        })
    }

    /// Whether each piece begins at a multiple of `address` and has a multiple of `len` bytes.
    pub(super) fn are_aligned(&self, address: usize, len: usize) -> bool {
        let aligned = |piece: &iovec| {
            piece.iov_base.addr().is_multiple_of(address) && piece.iov_len.is_multiple_of(len)
        };
        self.all[self.first..].iter().all(aligned)
    }

    /// Uses up the first `count` bytes.
    pub(super) fn advance(&mut self, mut count: usize) {
        while let Some(piece) = self.all.get_mut(self.first) {
            if count < piece.iov_len {
                piece.iov_base = piece.iov_base.wrapping_byte_add(count);
                piece.iov_len -= count;
                return;
            }
            count -= piece.iov_len;
            self.first += 1;
        }
    }

    /// Copies the first `len` bytes to a buffer, from `start` on.
    pub(super) fn copy_to(&self, buffer: &MmapRegion, start: usize, len: usize) {
        self.copy(buffer, start, len, |piece, buffer| piece.copy_to_volatile_slice(buffer));
    }

    /// Copies `len` bytes of a buffer, from `start` on, to the first bytes.
    pub(super) fn copy_from(&self, buffer: &MmapRegion, start: usize, len: usize) {
        self.copy(buffer, start, len, |piece, buffer| buffer.copy_to_volatile_slice(piece));
    }

    fn copy(
        &self,
        buffer: &MmapRegion,
        mut start: usize,
        mut len: usize,
        copy: impl Fn(VolatileSlice<'_>, VolatileSlice<'_>),
    ) {
        for piece in &self.all[self.first..] {
            let count = piece.iov_len.min(len);
            let Ok(there) = buffer.get_slice(start, count) else { return };
            // SAFETY: the piece is memory that `owner` keeps mapped, in which Rust has no references, since others may change
            // it at any time. Zeroes are only copied from.
            copy(unsafe { VolatileSlice::new(piece.iov_base.cast(), count) }, there);
            (start, len) = (start + count, len - count);
            if len == 0 {
                return;
            }
        }
    }
}

fn piece(slice: &VolatileSlice<'_>) -> iovec {
    iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_transfers_go_on_where_they_ended() {
        let base = std::ptr::null_mut::<libc::c_void>();
        let piece = |at: usize, len| iovec { iov_base: base.wrapping_byte_add(at), iov_len: len };
        let after = |moved| {
            let all = vec![piece(100, 10), piece(200, 0), piece(300, 20)];
            let mut pieces = Pieces { all, first: 0, owner: Owner::Static };
            pieces.advance(moved);
            pieces.next().iter().map(|piece| (piece.iov_base.addr(), piece.iov_len)).collect::<Vec<_>>()
        };
        assert_eq!(after(4), [(104, 6), (200, 0), (300, 20)]);
        assert_eq!(after(10), [(300, 20)]);
        assert_eq!(after(29), [(319, 1)]);
        assert_eq!(after(30), []);
    }

    #[test]
    fn zeroes_are_aligned_and_as_many_as_asked_for() {
        for len in [512, 64 << 10, (64 << 10) + 512, 32 << 20] {
            let pieces = Pieces::zeroes(len);
            assert!(pieces.len() == len && pieces.are_aligned(4096, 512), "{len}");
        }
    }

    #[test]
    fn copies_cross_the_borders_of_pieces() {
        let source = Arc::new(MmapRegion::new(4096).expect("memory"));
        let bytes: Vec<u8> = (0..=255).cycle().take(4096).collect();
        source.as_volatile_slice().copy_from(&bytes);
        let mut pieces = Pieces::buffer(&source, 0, 10);
        pieces.all.extend(Pieces::buffer(&source, 100, 10).all);
        let target = MmapRegion::new(4096).expect("memory");
        pieces.advance(3);
        pieces.copy_to(&target, 1, 12);
        let mut got = [0u8; 14];
        target.as_volatile_slice().copy_to(&mut got);
        assert_eq!(got, [0, 3, 4, 5, 6, 7, 8, 9, 100, 101, 102, 103, 104, 0]);
        target.as_volatile_slice().copy_from(&[7u8; 20]);
        pieces.copy_from(&target, 0, 8);
        let mut got = vec![0u8; 4096];
        source.as_volatile_slice().copy_to(&mut got);
        assert_eq!([got[2], got[3], got[9], got[10], got[100], got[101]], [2, 7, 7, 10, 7, 101]);
    }
}
