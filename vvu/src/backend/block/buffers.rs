//! Aligned memory of our own, for requests whose memory the disk cannot use as it is.

use std::io;
use std::sync::Arc;

use vm_memory::MmapRegion;

/// Bytes of a buffer. A larger request goes through one in parts.
pub(super) const BUFFER_SIZE: usize = 256 << 10;
/// Most buffers of a queue.
const BUFFERS_MAX: usize = 16;

/// The buffers of one queue, made when they are needed for the first time. They are aligned to pages.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    free: Vec<Arc<MmapRegion>>,
    made: usize,
}

impl Buffers {
    /// Takes a buffer; `None` while all are taken.
    ///
    /// # Errors
    /// When there is no memory for another one.
    pub(super) fn take(&mut self) -> io::Result<Option<Arc<MmapRegion>>> {
        if self.free.is_empty() && self.made < BUFFERS_MAX {
            self.free.push(Arc::new(MmapRegion::new(BUFFER_SIZE).map_err(io::Error::other)?));
            self.made += 1;
        }
        Ok(self.free.pop())
    }

    /// Returns a buffer that was taken.
    pub(super) fn put_back(&mut self, buffer: Arc<MmapRegion>) {
        self.free.push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_so_many_and_no_more() {
        let mut buffers = Buffers::default();
        let taken: Vec<_> = (0..BUFFERS_MAX).map(|_| buffers.take().expect("memory").expect("one")).collect();
        assert!(buffers.take().expect("memory").is_none());
        for buffer in taken {
            assert!(buffer.as_ptr().addr().is_multiple_of(4096));
            buffers.put_back(buffer);
        }
        assert!(buffers.take().expect("memory").is_some());
    }
}
