//! The sibling's memory: one file, of which the guest sees pieces at its own addresses.

use std::fs::File;
use std::os::fd::AsRawFd;

use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Part of the memory file that the guest sees.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Where the guest sees it.
    pub gpa: u64,
    /// Bytes.
    pub size: usize,
    /// Where it is in the file.
    pub offset: u64,
}

/// Memory of the sibling.
pub struct SiblingMemory {
    file: File,
    pieces: Vec<Piece>,
    map: GuestMemoryMmap,
}

impl SiblingMemory {
    /// A new memory file of `size` bytes, all holes, seen as `pieces`.
    pub fn new(size: u64, pieces: &[Piece]) -> Self {
        let fd = rustix::fs::memfd_create("sibling", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
        let file = File::from(fd);
        file.set_len(size).expect("size of the memory file");
        Self::of(file, pieces)
    }

    /// `pieces` of an existing memory file.
    pub fn of(file: File, pieces: &[Piece]) -> Self {
        let range = |piece: &Piece| {
            let file = file.try_clone().expect("descriptor");
            (GuestAddress(piece.gpa), piece.size, Some(FileOffset::new(file, piece.offset)))
        };
        let map = GuestMemoryMmap::from_ranges_with_files(pieces.iter().map(range)).expect("mapping");
        Self { file, pieces: pieces.to_vec(), map }
    }

    /// One piece of `size` bytes, from address 0 on.
    pub fn flat(size: u64) -> Self {
        let piece = Piece { gpa: 0, size: usize::try_from(size).expect("size"), offset: 0 };
        Self::new(size, &[piece])
    }

    pub fn file(&self) -> File {
        self.file.try_clone().expect("descriptor")
    }

    /// Guest address of the first byte.
    pub fn base(&self) -> u64 {
        self.pieces[0].gpa
    }

    /// The memory table as a front-end sends it.
    pub fn table(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.pieces.iter().map(|piece| self.region(piece)).collect()
    }

    /// An entry of the table.
    pub fn region(&self, piece: &Piece) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: piece.gpa,
            memory_size: piece.size as u64,
            userspace_addr: self.user_address(piece.gpa),
            mmap_offset: piece.offset,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// Address in this process, which is the sibling's VMM.
    pub fn user_address(&self, gpa: u64) -> u64 {
        self.map.get_host_address(GuestAddress(gpa)).expect("memory of the sibling").addr() as u64
    }

    pub fn write(&self, gpa: u64, data: &[u8]) {
        self.map.write_slice(data, GuestAddress(gpa)).expect("memory of the sibling");
    }

    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.map.read_slice(&mut data, GuestAddress(gpa)).expect("memory of the sibling");
        data
    }

    /// The mapping.
    pub fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }
}
