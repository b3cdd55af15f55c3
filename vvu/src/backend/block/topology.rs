//! What a file or block device says about its blocks.
#![expect(unsafe_code, reason = "rustix has no safe form of some ioctls of block devices")]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, Setter, ioctl};

use super::disk::SECTOR_SIZE;

/// ioctl(2) numbers of block devices (linux/fs.h).
const BLKDISCARD: Opcode = 0x1277;
const BLKIOMIN: Opcode = 0x1278;
const BLKIOOPT: Opcode = 0x1279;
const BLKALIGNOFF: Opcode = 0x127a;

/// Largest block that is believed in, in bytes: no disk or file system has larger ones.
const BLOCK_MAX: u32 = 64 << 10;

/// What direct I/O (`O_DIRECT`) asks of a request, in bytes. All are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of addresses in memory.
    pub(super) memory: u32,
    /// Of offsets on the disk, and of the length of each piece of memory.
    pub(super) block: u32,
}

/// The blocks of a disk (virtio 1.2, 5.2.4), in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Topology {
    /// Bytes that can be written without reading what is around them. A power of two, as is `physical`.
    pub(super) logical: u32,
    /// Bytes that the disk writes at once, at least `logical`.
    pub(super) physical: u32,
    /// Offset of the first physical block.
    pub(super) alignment_offset: u32,
    /// Least size of a request that does not take more than its share of the disk's time.
    pub(super) minimum: u32,
    /// Best size of a request; 0 if the disk does not say.
    pub(super) optimal: u32,
}

impl Topology {
    /// Asks a block device or regular file. `direct` is what requests have to be aligned to, if it is opened for that.
    ///
    /// # Errors
    /// Those of ioctl(2) and fstat(2).
    pub(super) fn of(file: &File, is_device: bool, direct: Option<Alignment>) -> io::Result<Self> {
        let logical = direct.map_or(SECTOR_SIZE.into(), |direct| direct.block);
        let block = |got: u32| if is_block(got) { got.max(logical) } else { logical };
        if !is_device {
            let physical = block(u32::try_from(file.metadata()?.blksize()).unwrap_or(0));
            return Ok(Self { logical, physical, alignment_offset: 0, minimum: physical, optimal: 0 });
        }
        let physical = block(rustix::fs::ioctl_blkpbszget(file)?);
        // SAFETY: these three write an unsigned or signed int.
        let (minimum, optimal, offset) = unsafe {
            (
                ioctl(file, Getter::<BLKIOMIN, u32>::new())?,
                ioctl(file, Getter::<BLKIOOPT, u32>::new())?,
                ioctl(file, Getter::<BLKALIGNOFF, i32>::new())?,
            )
        };
        // -1 says that the device is made of several that do not agree.
        let alignment_offset = u32::try_from(offset).unwrap_or(0);
        Ok(Self { logical, physical, alignment_offset, minimum: minimum.max(physical), optimal })
    }
}

impl Alignment {
    /// Asks what direct I/O on `file` wants; `None` if there is no direct I/O on it. A kernel before Linux 6.1 does not say
    /// it of a regular file: the blocks of the file system are safe then.
    ///
    /// # Errors
    /// Those of ioctl(2) and statx(2).
    pub(super) fn of(file: &File, is_device: bool) -> io::Result<Option<Self>> {
        let said = match statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
            Ok(got) if StatxFlags::from_bits_retain(got.stx_mask).contains(StatxFlags::DIOALIGN) => {
                Some((got.stx_dio_mem_align, got.stx_dio_offset_align))
            }
            Ok(_) | Err(Errno::NOSYS) => None,
            Err(error) => return Err(error.into()),
        };
        let (memory, block) = match said {
            Some(said) => said,
            None if is_device => {
                let block = rustix::fs::ioctl_blksszget(file)?;
                (block, block)
            }
            None => {
                let block = u32::try_from(file.metadata()?.blksize()).unwrap_or(0);
                (block.min(4096), block.min(4096))
            }
        };
        let (memory, block) = (memory.max(1), block.max(SECTOR_SIZE.into()));
        Ok((said.is_none_or(|said| said.1 != 0)
            && is_block(block)
            && memory.is_power_of_two()
            && memory <= 4096)
            .then_some(Self { memory, block }))
    }

    /// `offset` rounded down to a block.
    pub(super) fn down(self, offset: u64) -> u64 {
        offset & !(u64::from(self.block) - 1)
    }

    /// `offset` rounded up to a block.
    pub(super) fn up(self, offset: u64) -> u64 {
        self.down(offset.saturating_add(u64::from(self.block) - 1))
    }
}

fn is_block(size: u32) -> bool {
    size.is_power_of_two() && (u32::from(SECTOR_SIZE)..=BLOCK_MAX).contains(&size)
}

/// Frees `len` bytes at `offset` of a block device, which may read as anything afterwards.
///
/// # Errors
/// Those of ioctl(2).
pub(super) fn discard(device: impl AsFd, offset: u64, len: u64) -> Result<(), Errno> {
    // SAFETY: it reads two u64.
    unsafe { ioctl(device, Setter::<BLKDISCARD, [u64; 2]>::new([offset, len])) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_the_blocks_of_its_file_system() {
        let file = tempfile::tempfile().expect("file");
        let topology = Topology::of(&file, false, None).expect("topology");
        assert_eq!((topology.logical, topology.optimal), (512, 0));
        let blocks = u32::try_from(file.metadata().expect("file").blksize()).expect("small");
        assert_eq!((topology.physical, topology.minimum), (blocks, blocks));
        let direct = Some(Alignment { memory: 512, block: 4096 });
        assert_eq!(Topology::of(&file, false, direct).expect("topology").logical, 4096);
    }

    #[test]
    fn offsets_are_rounded_to_blocks() {
        let alignment = Alignment { memory: 4, block: 4096 };
        assert_eq!([0, 1, 4095, 4096].map(|offset| alignment.down(offset)), [0, 0, 0, 4096]);
        assert_eq!([0, 1, 4096, 4097].map(|offset| alignment.up(offset)), [0, 4096, 4096, 8192]);
    }
}
