//! Ranges of the disk that a discard or write-zeroes request is about (virtio 1.2, 5.2.6).

use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_T_DISCARD;
use vm_memory::GuestMemoryMmap;

use super::{Device, Failure};
use crate::backend::block::config::{DISCARD_SECTORS_MAX, RANGES_MAX, WRITE_ZEROES_SECTORS_MAX};
use crate::backend::block::disk::SECTOR_SIZE;
use crate::backend::block::request::Request;

/// Bytes of `struct virtio_blk_discard_write_zeroes`.
const RANGE_SIZE: usize = 16;
/// Its flag to free what is zeroed.
const UNMAP: u32 = 1;

/// Bytes of the disk to discard or zero.
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) unmap: bool,
}

impl Device {
    /// Reads and checks all ranges of a discard or write-zeroes request before any is touched.
    pub(super) fn ranges(&self, memory: &GuestMemoryMmap, request: &Request) -> Result<Vec<Range>, Failure> {
        let len = request.input.len();
        let size = usize::try_from(len).map_err(|_| Failure::Size(len))?;
        let count = size / RANGE_SIZE;
        let fits = u32::try_from(count).is_ok_and(|count| (1..=RANGES_MAX).contains(&count));
        if !fits || !size.is_multiple_of(RANGE_SIZE) {
            return Err(Failure::Size(len));
        }
        let mut bytes = vec![0; size];
        request.input.read(memory, &mut bytes)?;
        let (records, _) = bytes.as_chunks::<RANGE_SIZE>();
        records.iter().map(|record| self.parse_range(request.kind, record)).collect()
    }

    fn parse_range(&self, kind: u32, record: &[u8; RANGE_SIZE]) -> Result<Range, Failure> {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *record;
        let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let sectors = u32::from_le_bytes([i, j, k, l]);
        let flags = u32::from_le_bytes([m, n, o, p]);
        let (known, most) = match kind {
            VIRTIO_BLK_T_DISCARD => (0, DISCARD_SECTORS_MAX),
            _ => (UNMAP, WRITE_ZEROES_SECTORS_MAX),
        };
        if flags & !known != 0 {
            return Err(Failure::Unsupported);
        }
        let len = u64::from(sectors) * u64::from(SECTOR_SIZE);
        if !(1..=most).contains(&sectors) {
            return Err(Failure::Size(len));
        }
        Ok(Range { offset: self.offset(sector, len)?, len, unmap: flags & UNMAP != 0 })
    }
}
