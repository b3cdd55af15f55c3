use std::os::unix::fs::FileExt;
use std::process::Command;

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const HEADER: u64 = 2 * MIB;

/// Reads the file system as Linux does, and knows nothing of how it was laid out.
struct Reader(Vec<u8>);

impl Reader {
    fn new(header: u64, size: u64) -> Self {
        Self(Geometry::new(header, size).expect("a window").metadata())
    }

    fn u16(&self, at: usize) -> u64 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]]).into()
    }

    fn u32(&self, at: usize) -> u64 {
        self.u16(at) | self.u16(at + 2) << 16
    }

    /// A field of the superblock.
    fn superblock(&self, offset: usize) -> u64 {
        self.u32(1024 + offset)
    }

    fn inode(&self, number: u64) -> usize {
        let per_group = self.superblock(0x28);
        let (group, index) = ((number - 1) / per_group, (number - 1) % per_group);
        let table = self.u32(usize_of(BLOCK + group * 32 + 8));
        usize_of(table * BLOCK + index * 256)
    }

    /// The extents of an inode: first block in the file, blocks, first block in the device.
    fn extents(&self, inode: usize) -> Vec<(u64, u64, u64)> {
        assert_eq!(self.u32(inode + 0x20), 0x80000, "extents");
        self.node(inode + 0x28)
    }

    fn node(&self, at: usize) -> Vec<(u64, u64, u64)> {
        assert_eq!(self.u16(at), 0xf30a);
        let (count, room, depth) = (self.u16(at + 2), self.u16(at + 4), self.u16(at + 6));
        assert!(count <= room && depth <= 1);
        let entries = (0..count).map(|index| at + 12 + 12 * usize_of(index));
        if depth == 0 {
            return entries.map(|at| (self.u32(at), self.u16(at + 4), self.u32(at + 8))).collect();
        }
        let indices = entries.flat_map(|at| {
            let leaf = self.node(usize_of(self.u32(at + 4) * BLOCK));
            assert_eq!(leaf[0].0, self.u32(at), "an index says where its leaf begins");
            leaf
        });
        indices.collect()
    }

    /// The names in a directory, with their inodes.
    fn names(&self, inode: u64) -> Vec<(String, u64)> {
        let [(0, 1, block)] = self.extents(self.inode(inode))[..] else { panic!("one block") };
        let mut at = usize_of(block * BLOCK);
        let end = at + usize_of(BLOCK);
        let mut names = Vec::new();
        while at < end {
            let length = usize::from(self.0[at + 6]);
            let name = String::from_utf8(self.0[at + 8..at + 8 + length].to_vec()).expect("a name");
            names.push((name, self.u32(at)));
            at += usize_of(self.u16(at + 4));
        }
        assert_eq!(at, end);
        names
    }
}

/// Checks that the file is the whole device but for a hole in place of the header.
fn check(header: u64, size: u64) {
    let reader = Reader::new(header, size);
    assert_eq!(reader.0.len() as u64, header - BLOCK, "the last block of the header stays unused");
    assert_eq!(reader.superblock(0x38) & 0xffff, 0xef53);
    assert_eq!(reader.superblock(0x04), size / BLOCK);
    let (_, file) = reader.names(2).into_iter().find(|(name, _)| name == FILE).expect("the file");
    let inode = reader.inode(file);
    assert_eq!(reader.u32(inode + 4) | reader.u32(inode + 0x6c) << 32, size);
    let mut next = header / BLOCK;
    for (logical, blocks, physical) in reader.extents(inode) {
        assert_eq!((logical, physical), (next, next), "offsets in file and device are the same");
        assert!((1..=1 << 15).contains(&blocks), "an extent of {blocks} blocks is not initialised");
        next += blocks;
    }
    assert_eq!(next, size / BLOCK);
    let groups = (size / BLOCK).div_ceil(reader.superblock(0x20));
    for group in 0..groups {
        let descriptor = usize_of(BLOCK + group * 32);
        let [blocks, inodes, table] = [0, 4, 8].map(|offset| reader.u32(descriptor + offset));
        assert!(table * BLOCK < header, "metadata is in the header");
        let bitmap = &reader.0[usize_of(blocks * BLOCK)..][..4096];
        let free: Vec<u64> =
            (0..32_768).filter(|bit| bitmap[usize_of(*bit) / 8] >> (bit % 8) & 1 == 0).collect();
        assert_eq!(reader.u16(descriptor + 12), free.len() as u64);
        if group == 0 {
            assert_eq!(reader.superblock(0x0c), free.len() as u64);
            let last = free.last().expect("some of the header is free");
            assert_eq!((last + 1) * CLUSTER, header, "blocks are free in the header only");
        } else {
            assert!(free.is_empty(), "{free:?}");
        }
        assert!(reader.0[usize_of(inodes * BLOCK) + 2..][..4094].iter().all(|byte| *byte == 0xff));
    }
}

#[test]
fn the_superblock_has_its_golden_bytes() {
    let Reader(bytes) = Reader::new(HEADER, 546 * MIB);
    let mut want = [0; 0x60];
    for (at, value) in [
        (0x00, 16u32),
        (0x04, 139_776),
        (0x0c, 28),
        (0x10, 4),
        (0x18, 2),
        (0x1c, 6),
        (0x20, 524_288),
        (0x24, 32_768),
        (0x28, 16),
        (0x34, 0xffff_0000),
        (0x38, 0x0001_ef53),
        (0x3c, 2),
        (0x4c, 1),
        (0x54, 11),
        (0x58, 256),
        (0x5c, 0x200),
    ] {
        want[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    assert_eq!(bytes[1024..1024 + 0x60], want);
    assert_eq!(bytes[1024 + 0x60..1024 + 0x68], [0x42, 2, 0, 0, 0x4a, 2, 0, 0]);
    assert!(bytes[..1024].iter().all(|byte| *byte == 0), "no info block of an NVDIMM");
    assert!(bytes[2048..4096].iter().all(|byte| *byte == 0), "no info block of an NVDIMM");
}

#[test]
fn names_lead_to_the_file() {
    let names = |inode| Reader::new(HEADER, 64 * MIB).names(inode);
    let name = |name: &str, inode| (name.to_owned(), inode);
    assert_eq!(names(2), [name(".", 2), name("..", 2), name("lost+found", 11), name("memory", 12)]);
    assert_eq!(names(11), [name(".", 11), name("..", 2)]);
}

#[test]
fn the_file_is_the_device_at_all_sizes() {
    let largest = HEADER + 170 * GIB;
    for size in [4 * MIB, 514 * MIB, 516 * MIB, 2 * GIB, 2 * GIB + HEADER, 44 * GIB, largest] {
        check(HEADER, size);
        check(2 * HEADER, size + HEADER);
    }
}

#[test]
fn other_shapes_are_refused() {
    for header in [0, MIB, 3 * MIB, 4096, u64::MAX, 1 << 60] {
        assert_eq!(Geometry::new(header, 64 * MIB).expect_err("header"), GeometryError::Header(header));
    }
    for size in [0, HEADER, MIB, 64 * MIB + 4096, HEADER + 172 * GIB, u64::MAX] {
        let error = Geometry::new(HEADER, size).expect_err("size").to_string();
        assert!(error.contains(&format!("{size:#x} bytes: want")), "{error}");
    }
}

#[test]
fn e2fsck_finds_nothing_wrong() {
    let Ok(version) = Command::new("e2fsck").arg("-V").output() else {
        eprintln!("there is no e2fsck here");
        return;
    };
    eprintln!("{}", String::from_utf8_lossy(&version.stderr));
    let dir = tempfile::tempdir().expect("directory");
    for size in [4 * MIB, 546 * MIB, 3 * GIB, 50 * GIB] {
        let path = dir.path().join(size.to_string());
        let file = std::fs::File::create(&path).expect("file");
        file.set_len(size).expect("sparse");
        file.write_all_at(&Geometry::new(HEADER, size).expect("a window").metadata(), 0).expect("written");
        let checked = Command::new("e2fsck").arg("-fn").arg(&path).output().expect("run");
        let said = String::from_utf8_lossy(&checked.stdout).into_owned();
        assert!(checked.status.success(), "{size}: {said}{}", String::from_utf8_lossy(&checked.stderr));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn the_file_is_the_device(pages in 1..80_000u64) {
        check(HEADER, HEADER + pages * ALIGNMENT);
    }

    #[test]
    fn no_shape_panics(header: u64, size: u64) {
        let _ = Geometry::new(header, size);
        let _ = Geometry::new(HEADER, size);
        let _ = Geometry::new(header, 64 * MIB);
    }
}
