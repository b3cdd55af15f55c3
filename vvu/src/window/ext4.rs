//! Writes the file system of a window: an ext4 whose one file is the sibling's memory.
//!
//! All metadata is in the header, the space in front of the sibling's RAM. The file begins with a hole as long as the
//! header and then has every byte up to the end of the device, in order. So an offset in the file is the same offset in
//! the device, and in the shared memory BAR. Its extents are initialised: Linux zeroes an uninitialised one at the first
//! access, which would erase the sibling's RAM. Blocks are free in the header only.
//!
//! Layout: Linux, Documentation/filesystems/ext4. Clusters ("bigalloc") of 64 KiB keep the metadata small; `sparse_super2`
//! without backups keeps copies of the superblock out of the sibling's RAM.

/// Bytes of a block, which has to be a page for DAX.
pub(super) const BLOCK: u64 = BLOCK_BYTES as u64;
/// The same, as a length.
pub(super) const BLOCK_BYTES: usize = 4096;
/// Bytes of a cluster, the unit that the block bitmaps count.
const CLUSTER: u64 = 16 * BLOCK;
/// Blocks of a group: one for each bit of a bitmap of clusters.
const GROUP: u64 = 8 * BLOCK * (CLUSTER / BLOCK);
/// Header and size are multiples of this, so that Linux maps the file with huge pages.
pub(super) const ALIGNMENT: u64 = 2 << 20;
/// Name of the file in the root directory.
pub(super) const FILE: &str = "memory";

/// Blocks of the longest initialised extent.
const EXTENT: u64 = 1 << 15;
/// Entries of an extent tree's root, which is in the inode.
const ROOT_ENTRIES: u64 = 4;
/// Entries of an extent tree's block.
const LEAF_ENTRIES: u64 = (BLOCK - 12) / 12;
/// Bytes of the largest file after its hole: two levels of extents.
const LARGEST: u64 = ROOT_ENTRIES * LEAF_ENTRIES * EXTENT * BLOCK;

/// Bytes of an inode.
const INODE_SIZE: usize = 256;
/// Inodes of a group: one block of them.
const INODES: u32 = 16;
/// Bytes of a group descriptor.
const DESCRIPTOR: u64 = 32;
const ROOT_INODE: u32 = 2;
/// The first inode that is not reserved. e2fsck wants lost+found.
const LOST_AND_FOUND_INODE: u32 = 11;
const FILE_INODE: u32 = 12;
const DIRECTORY: u8 = 2;
const REGULAR_FILE: u8 = 1;

/// There can be no window of this shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// The header is not one that `vvu proxy --window` makes.
    #[error(
        "a header of {0:#x} bytes: want a multiple of {ALIGNMENT:#x} that the metadata fits into, as `vvu proxy --window` makes it"
    )]
    Header(u64),
    /// The device is too small or too large, or ends within a page of 2 MiB.
    #[error(
        "{size:#x} bytes: want a multiple of {ALIGNMENT:#x}, between the header of {header:#x} bytes and {most:#x}"
    )]
    Size {
        /// Bytes of the device.
        size: u64,
        /// Bytes of its header.
        header: u64,
        /// Bytes of the largest device.
        most: u64,
    },
}

/// Where everything is, in blocks from the start of the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    /// Bytes of the header.
    header: u64,
    /// Bytes of the device.
    size: u64,
    groups: u64,
    block_bitmaps: u64,
    inode_bitmaps: u64,
    inode_tables: u64,
    root: u64,
    lost_and_found: u64,
    /// The first block of extents. Each is in a cluster of its own, as e2fsck wants it of blocks of different owners.
    leaves: u64,
    leaf_count: u64,
}

impl Geometry {
    /// Lays out a device of `size` bytes, of which the first `header` are not the sibling's. The last block of the header
    /// stays unused.
    ///
    /// # Errors
    /// [`GeometryError`].
    pub(super) fn new(header: u64, size: u64) -> Result<Self, GeometryError> {
        let aligned = |bytes: u64| bytes > 0 && bytes.is_multiple_of(ALIGNMENT);
        if !aligned(header) || header > LARGEST {
            return Err(GeometryError::Header(header));
        }
        let most = header + LARGEST;
        if !aligned(size) || size <= header || size > most {
            return Err(GeometryError::Size { size, header, most });
        }
        let blocks_in_cluster = CLUSTER / BLOCK;
        let groups = (size / BLOCK).div_ceil(GROUP);
        let descriptors = (groups * DESCRIPTOR).div_ceil(BLOCK);
        let block_bitmaps = 1 + descriptors;
        let inode_bitmaps = block_bitmaps + groups;
        let inode_tables = inode_bitmaps + groups;
        let root = (inode_tables + groups).next_multiple_of(blocks_in_cluster);
        let lost_and_found = root + blocks_in_cluster;
        let leaves = lost_and_found + blocks_in_cluster;
        let extents = ((size - header) / BLOCK).div_ceil(EXTENT);
        let leaf_count = if extents <= ROOT_ENTRIES { 0 } else { extents.div_ceil(LEAF_ENTRIES) };
        // The last cluster holds the block that stays unused.
        if leaves + (leaf_count + 1) * blocks_in_cluster > header / BLOCK {
            return Err(GeometryError::Header(header));
        }
        Ok(Self {
            header,
            size,
            groups,
            block_bitmaps,
            inode_bitmaps,
            inode_tables,
            root,
            lost_and_found,
            leaves,
            leaf_count,
        })
    }

    /// Returns the bytes of the device.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Returns the file system's metadata: the bytes of the header but for its last block.
    pub(super) fn metadata(&self) -> Vec<u8> {
        let mut image = Image(vec![0; usize_of(self.header - BLOCK)]);
        self.superblock(&mut image);
        self.groups(&mut image);
        self.directories(&mut image);
        self.file(&mut image);
        image.0
    }

    /// The clusters that are free.
    fn free(&self) -> std::ops::Range<usize> {
        usize_of(self.leaves * BLOCK / CLUSTER + self.leaf_count)..usize_of(self.header / CLUSTER)
    }

    fn superblock(&self, image: &mut Image) {
        /// What Linux has to know in order to read the file system: directory entries with types, extents, metadata of all
        /// groups in one place.
        const INCOMPATIBLE: u32 = 0x2 | 0x40 | 0x200;
        /// What it has to know in order to write: files above 2 GiB and above 2 TiB, larger inodes, clusters.
        const READ_ONLY_COMPATIBLE: u32 = 0x2 | 0x8 | 0x40 | 0x200;
        /// `sparse_super2`: the groups that have a copy of the superblock are listed, and the list is empty.
        const COMPATIBLE: u32 = 0x200;
        /// An error makes the file system read-only.
        const READ_ONLY_ON_ERROR: u16 = 2;
        let groups = u32_of(self.groups);
        let at = |offset: usize| 1024 + offset;
        for (offset, value) in [
            (0x00, INODES * groups),
            (0x04, u32_of(self.size / BLOCK)),
            (0x0c, u32_of(self.free().count() as u64)),
            (0x10, INODES * groups - FILE_INODE),
            (0x18, BLOCK.ilog2() - 10),
            (0x1c, CLUSTER.ilog2() - 10),
            (0x20, u32_of(GROUP)),
            (0x24, u32_of(GROUP / (CLUSTER / BLOCK))),
            (0x28, INODES),
            (0x4c, 1),
            (0x54, LOST_AND_FOUND_INODE),
            (0x5c, COMPATIBLE),
            (0x60, INCOMPATIBLE),
            (0x64, READ_ONLY_COMPATIBLE),
        ] {
            image.u32(at(offset), value);
        }
        for (offset, value) in [
            // Mounts until a check is due: never.
            (0x36, 0xffff),
            (0x38, 0xef53),
            // Unmounted in order.
            (0x3a, 1),
            (0x3c, READ_ONLY_ON_ERROR),
            (0x58, 256),
            // Bytes of an inode beyond the first 128 that are in use.
            (0x15c, 32),
            (0x15e, 32),
        ] {
            image.u16(at(offset), value);
        }
        image.bytes(at(0x68), b"vvu-window-ext4!");
        image.bytes(at(0x78), b"vvu-window");
        // 2 to the power of this many groups have their metadata in one place.
        image.bytes(at(0x174), &[16]);
    }

    fn groups(&self, image: &mut Image) {
        for group in 0..self.groups {
            let first = group == 0;
            let used = if first { FILE_INODE } else { 0 };
            let descriptor = usize_of(BLOCK + group * DESCRIPTOR);
            for (offset, value) in [(0, self.block_bitmaps), (4, self.inode_bitmaps), (8, self.inode_tables)]
            {
                image.u32(descriptor + offset, u32_of(value + group));
            }
            image.u16(descriptor + 14, u16_of(u64::from(INODES - used)));
            image.u16(descriptor + 16, if first { 2 } else { 0 });
            let mut blocks = [0xff; BLOCK_BYTES];
            if first {
                image.u16(descriptor + 12, u16_of(self.free().count() as u64));
                self.free().for_each(|cluster| blocks[cluster / 8] &= !(1 << (cluster % 8)));
            }
            image.bytes(block(self.block_bitmaps + group), &blocks);
            let mut inodes = [0xff; BLOCK_BYTES];
            inodes[..2].copy_from_slice(&u16_of((1 << used) - 1).to_le_bytes());
            image.bytes(block(self.inode_bitmaps + group), &inodes);
        }
    }

    fn directories(&self, image: &mut Image) {
        for (inode, at, links) in [(ROOT_INODE, self.root, 3), (LOST_AND_FOUND_INODE, self.lost_and_found, 2)]
        {
            let extent = Extent { logical: 0, blocks: 1, physical: at };
            self.inode(
                image,
                &Inode {
                    number: inode,
                    mode: 0o40700,
                    links,
                    size: BLOCK,
                    clusters: 1,
                    depth: 0,
                    entries: vec![extent.to_bytes()],
                },
            );
            let mut entries = vec![(inode, DIRECTORY, "."), (ROOT_INODE, DIRECTORY, "..")];
            if inode == ROOT_INODE {
                entries.push((LOST_AND_FOUND_INODE, DIRECTORY, "lost+found"));
                entries.push((FILE_INODE, REGULAR_FILE, FILE));
            }
            let end = block(at + 1);
            let mut place = block(at);
            let last = entries.len() - 1;
            for (index, (number, kind, name)) in entries.into_iter().enumerate() {
                let length = if index == last { end - place } else { (8 + name.len()).next_multiple_of(4) };
                image.u32(place, number);
                image.u16(place + 4, u16_of(length as u64));
                image.bytes(place + 6, &[u8::try_from(name.len()).unwrap_or(0), kind]);
                image.bytes(place + 8, name.as_bytes());
                place += length;
            }
        }
    }

    fn file(&self, image: &mut Image) {
        let first = self.header / BLOCK;
        let end = self.size / BLOCK;
        let extents: Vec<[u8; 12]> = (first..end)
            .step_by(usize_of(EXTENT))
            .map(|at| Extent { logical: at, blocks: EXTENT.min(end - at), physical: at }.to_bytes())
            .collect();
        let (depth, entries) = if self.leaf_count == 0 {
            (0, extents)
        } else {
            let per_leaf = usize_of(LEAF_ENTRIES);
            let indices = extents.chunks(per_leaf).zip(0..).map(|(chunk, leaf)| {
                let at = self.leaves + leaf * (CLUSTER / BLOCK);
                node(image, block(at), LEAF_ENTRIES, 0, chunk);
                let logical = first + leaf * LEAF_ENTRIES * EXTENT;
                let mut index = [0; 12];
                index[..4].copy_from_slice(&u32_of(logical).to_le_bytes());
                index[4..8].copy_from_slice(&u32_of(at).to_le_bytes());
                index
            });
            (1, indices.collect())
        };
        let clusters = (self.size - self.header) / CLUSTER + self.leaf_count;
        self.inode(
            image,
            &Inode {
                number: FILE_INODE,
                mode: 0o100_600,
                links: 1,
                size: self.size,
                clusters,
                depth,
                entries,
            },
        );
    }

    fn inode(&self, image: &mut Image, inode: &Inode) {
        const EXTENTS: u32 = 0x80000;
        let at = block(self.inode_tables) + usize_of(u64::from(inode.number - 1)) * INODE_SIZE;
        let sectors = inode.clusters * (CLUSTER / 512);
        image.u16(at, inode.mode);
        image.u32(at + 0x04, low(inode.size));
        image.u16(at + 0x1a, inode.links);
        image.u32(at + 0x1c, low(sectors));
        image.u32(at + 0x20, EXTENTS);
        node(image, at + 0x28, ROOT_ENTRIES, inode.depth, &inode.entries);
        image.u32(at + 0x6c, low(inode.size >> 32));
        image.u16(at + 0x74, u16_of(sectors >> 32));
        image.u16(at + 0x80, 32);
    }
}

/// What differs between inodes.
struct Inode {
    number: u32,
    /// Type and permissions.
    mode: u16,
    links: u16,
    /// Bytes.
    size: u64,
    /// Clusters that belong to it.
    clusters: u64,
    /// Levels below the root of its extent tree.
    depth: u16,
    /// The root's entries.
    entries: Vec<[u8; 12]>,
}

/// A run of blocks of a file.
struct Extent {
    /// The first block in the file.
    logical: u64,
    blocks: u64,
    /// The first block in the device.
    physical: u64,
}

impl Extent {
    fn to_bytes(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&u32_of(self.logical).to_le_bytes());
        // 1 << 15 is the longest that is initialised; above it, they are not.
        bytes[4..6].copy_from_slice(&u16_of(self.blocks).to_le_bytes());
        bytes[8..].copy_from_slice(&u32_of(self.physical).to_le_bytes());
        bytes
    }
}

/// Writes a node of an extent tree that has room for `room` entries.
fn node(image: &mut Image, at: usize, room: u64, depth: u16, entries: &[[u8; 12]]) {
    image.u16(at, 0xf30a);
    image.u16(at + 2, u16_of(entries.len() as u64));
    image.u16(at + 4, u16_of(room));
    image.u16(at + 6, depth);
    image.bytes(at + 12, entries.as_flattened());
}

/// The metadata in the making.
struct Image(Vec<u8>);

impl Image {
    fn bytes(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn u16(&mut self, at: usize, value: u16) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn u32(&mut self, at: usize, value: u32) {
        self.bytes(at, &value.to_le_bytes());
    }
}

/// The offset of a block of the header.
fn block(number: u64) -> usize {
    usize_of(number * BLOCK)
}

/// The low half.
fn low(value: u64) -> u32 {
    u32_of(value & u64::from(u32::MAX))
}

// The limits on header and size keep all values in range.
fn usize_of(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn u32_of(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn u16_of(value: u64) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}

#[cfg(test)]
#[path = "ext4_test.rs"]
mod tests;
