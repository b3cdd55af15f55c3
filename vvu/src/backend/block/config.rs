//! The features and the configuration space of a block device (virtio 1.2, 5.2.3 and 5.2.4).

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;

use super::disk::Disk;

/// Most ranges in a discard or write-zeroes request.
pub(super) const RANGES_MAX: u32 = 32;
/// Most sectors of one range to discard: 2 GiB.
pub(super) const DISCARD_SECTORS_MAX: u32 = 1 << 22;
/// Most sectors of one range to zero: 32 MiB, because the zeroes may have to be written.
pub(super) const WRITE_ZEROES_SECTORS_MAX: u32 = 1 << 16;
/// Sectors of a block of a usual file system, 4 KiB.
const DISCARD_ALIGNMENT: u32 = 8;

/// What a driver gets to see besides the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) queues: u16,
    /// Most pieces of memory in a request.
    pub(super) segments: u16,
    /// Offer `VIRTIO_F_ACCESS_PLATFORM`.
    pub(super) access_platform: bool,
}

/// Size of the configuration space that a front-end may ask for, in bytes (vhost-user, `VHOST_USER_GET_CONFIG`).
const SPACE_SIZE: usize = 256;

/// Feature bits of a block device for `disk` (virtio 1.2, 5.2.3).
pub(super) fn features(disk: &Disk, shape: Shape) -> u64 {
    let bit = |bit: u32| 1u64 << bit;
    let always = bit(VIRTIO_BLK_F_FLUSH)
        | bit(VIRTIO_BLK_F_SEG_MAX)
        | bit(VIRTIO_BLK_F_BLK_SIZE)
        | bit(VIRTIO_BLK_F_TOPOLOGY)
        | bit(VIRTIO_BLK_F_MQ);
    let access = if disk.is_read_only() {
        bit(VIRTIO_BLK_F_RO)
    } else {
        bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES)
    };
    let platform = if shape.access_platform { bit(VIRTIO_F_ACCESS_PLATFORM) } else { 0 };
    always | access | platform
}

/// Returns `size` bytes at `offset` of the configuration space, none if the range is not inside of it.
pub(super) fn read(disk: &Disk, shape: Shape, offset: u32, size: u32) -> Vec<u8> {
    let space = space(disk, shape);
    let range = || {
        let start = usize::try_from(offset).ok()?;
        space.get(start..start.checked_add(usize::try_from(size).ok()?)?)
    };
    range().map(<[u8]>::to_vec).unwrap_or_default()
}

/// Returns `struct virtio_blk_config`, filled up with zeroes.
fn space(disk: &Disk, shape: Shape) -> [u8; SPACE_SIZE] {
    let mut space = [0; SPACE_SIZE];
    let mut put = |offset: usize, value: &[u8]| space[offset..offset + value.len()].copy_from_slice(value);
    put(0, &disk.sectors().to_le_bytes());
    put(12, &u32::from(shape.segments).to_le_bytes());
    let topology = disk.topology();
    let blocks = |bytes: u32| bytes / topology.logical;
    let exponent = blocks(topology.physical).checked_ilog2().and_then(|exponent| u8::try_from(exponent).ok());
    put(20, &topology.logical.to_le_bytes());
    put(24, &[exponent.unwrap_or(0), u8::try_from(blocks(topology.alignment_offset)).unwrap_or(0)]);
    put(26, &u16::try_from(blocks(topology.minimum)).unwrap_or(0).to_le_bytes());
    put(28, &blocks(topology.optimal).to_le_bytes());
    put(32, &[1]); // writeback: writes are durable after a flush
    put(34, &shape.queues.to_le_bytes());
    if !disk.is_read_only() {
        put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
        put(40, &RANGES_MAX.to_le_bytes());
        put(44, &DISCARD_ALIGNMENT.to_le_bytes());
        put(48, &WRITE_ZEROES_SECTORS_MAX.to_le_bytes());
        put(52, &RANGES_MAX.to_le_bytes());
        put(56, &[1]); // write zeroes may unmap
    }
    space
}

#[cfg(test)]
mod tests {
    use super::super::disk::tests::disk_of;
    use super::*;

    const SHAPE: Shape = Shape { queues: 4, segments: 126, access_platform: false };

    #[test]
    fn golden_configuration() {
        let (_file, disk) = disk_of(&[7; 3 * 512], false);
        let [a, b] = u16::to_le_bytes(u16::try_from(disk.topology().minimum / 512).expect("small"));
        let exponent = u8::try_from((disk.topology().physical / 512).ilog2()).expect("small");
        #[rustfmt::skip]
        let want = [
            3, 0, 0, 0, 0, 0, 0, 0,  0, 0, 0, 0,  126, 0, 0, 0,
            0, 0, 0, 0,  0, 2, 0, 0,  exponent, 0, a, b, 0, 0, 0, 0,
            1, 0,  4, 0,  0, 0, 0x40, 0,  32, 0, 0, 0,  8, 0, 0, 0,
            0, 0, 1, 0,  32, 0, 0, 0,  1, 0, 0, 0,
        ];
        assert_eq!(read(&disk, SHAPE, 0, 60), want);
        assert_eq!(read(&disk, SHAPE, 0, 256)[60..], [0; 196]);
        assert_eq!(read(&disk, SHAPE, 34, 2), [4, 0]);
    }

    #[test]
    fn a_range_outside_of_the_space_is_empty() {
        let (_file, disk) = disk_of(&[0; 512], false);
        for (offset, size) in [(0, 257), (256, 1), (u32::MAX, u32::MAX), (1, u32::MAX)] {
            assert!(read(&disk, SHAPE, offset, size).is_empty(), "{offset} {size}");
        }
    }

    #[test]
    fn a_read_only_disk_says_so_and_offers_no_changes() {
        let (_file, disk) = disk_of(&[0; 512], true);
        let features = features(&disk, SHAPE);
        assert_ne!(features & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(features & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
        assert_eq!(read(&disk, SHAPE, 36, 24), [0; 24]);
    }
}
