//! The ranges of the disk that a discard or write-zeroes request names (virtio 1.2, 5.2.6).

use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_T_DISCARD;
use vm_memory::GuestMemoryMmap;

use super::config::{DISCARD_SECTORS_MAX, RANGES_MAX, WRITE_ZEROES_SECTORS_MAX};
use super::disk::{Disk, SECTOR_SIZE};
use super::failure::Failure;
use super::request::Request;

/// Bytes of `struct virtio_blk_discard_write_zeroes`: sector (8), number of sectors (4), flags (4).
const RANGE_SIZE: usize = 16;
/// The flag that allows to free what is zeroed.
const UNMAP: u32 = 1;

/// A range of the disk, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) unmap: bool,
}

/// Reads and checks all ranges of a request.
pub(super) fn ranges(
    disk: &Disk,
    memory: &GuestMemoryMmap,
    request: &Request,
) -> Result<Vec<Range>, Failure> {
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
    records.iter().map(|record| parse(disk, request.kind, record)).collect()
}

fn parse(disk: &Disk, kind: u32, record: &[u8; RANGE_SIZE]) -> Result<Range, Failure> {
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
    Ok(Range { offset: offset(disk, sector, len)?, len, unmap: flags & UNMAP != 0 })
}

/// The offset of `sector` in bytes, if the disk has `len` bytes from there on.
pub(super) fn offset(disk: &Disk, sector: u64, len: u64) -> Result<u64, Failure> {
    let offset = sector.checked_mul(SECTOR_SIZE.into());
    let inside = |offset: &u64| offset.checked_add(len).is_some_and(|end| end <= disk.size());
    offset.filter(inside).ok_or(Failure::Range { sector, len, sectors: disk.sectors() })
}
