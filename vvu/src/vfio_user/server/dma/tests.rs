use std::os::fd::OwnedFd;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::Bytes;

use super::*;

const PAGE: u64 = 4096;

fn memfd(size: u64) -> OwnedFd {
    let fd = memfd_create("ram", MemfdFlags::CLOEXEC).expect("memfd");
    ftruncate(&fd, size).expect("ftruncate");
    fd
}

fn dup(fd: &OwnedFd) -> OwnedFd {
    fd.try_clone().expect("dup")
}

/// Opens the same file once more, for reading only.
fn read_only(fd: &OwnedFd) -> OwnedFd {
    use std::os::fd::AsRawFd;
    File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).expect("reopen").into()
}

fn read_file(fd: &OwnedFd, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rustix::io::pread(fd, &mut bytes, offset).expect("pread");
    bytes
}

fn live_files(space: &DmaSpace) -> usize {
    space.mappings.iter().filter(|(_, file)| file.strong_count() > 0).count()
}

#[test]
fn page_fragmented_memory_is_one_range() {
    let ram = memfd(4 * PAGE);
    let mut space = DmaSpace::default();
    // Pages in reverse order, as a fragmented guest would have them.
    for page in 0..4 {
        let file = Some((dup(&ram), (3 - page) * PAGE));
        space.map(Iova(0x10000 + page * PAGE), PAGE, Permissions::ReadWrite, file).expect("map");
    }
    assert_eq!(live_files(&space), 1);
    let data: Vec<u8> = (0u8..=255).cycle().take(3 * 4096).collect();
    space.write_slice(&data, GuestAddress(0x10000 + 100)).expect("write");
    let mut back = vec![0; data.len()];
    space.read_slice(&mut back, GuestAddress(0x10000 + 100)).expect("read");
    assert_eq!(back, data);
    assert_eq!(read_file(&ram, 3 * PAGE + 100, 4096 - 100), data[..4096 - 100]);
    assert_eq!(read_file(&ram, 0, 100), data[3 * 4096 - 100..]);
    let everything = 4 * 4096;
    assert!(space.check_range(GuestAddress(0x10000), everything, Permissions::ReadWrite));
    assert!(!space.check_range(GuestAddress(0x10000), everything + 1, Permissions::Read));
    assert!(!space.check_range(GuestAddress(0xffff), 1, Permissions::Read));
}

#[test]
fn an_access_that_leaves_the_maps_stops_there() {
    let ram = memfd(PAGE);
    let mut space = DmaSpace::default();
    space.map(Iova(0), PAGE, Permissions::ReadWrite, Some((ram, 0))).expect("map");
    let mut buffer = [0; 16];
    assert_eq!(space.read(&mut buffer, GuestAddress(PAGE - 6)).expect("partial"), 6);
    assert!(space.read_slice(&mut buffer, GuestAddress(PAGE - 6)).is_err());
    assert!(space.read(&mut buffer, GuestAddress(PAGE)).is_err());
    assert!(space.read(&mut buffer, GuestAddress(u64::MAX - 1)).is_err());
    assert!(space.read(&mut [], GuestAddress(u64::MAX)).is_ok());
}

#[test]
fn permissions_hold() {
    let ram = memfd(2 * PAGE);
    let mut space = DmaSpace::default();
    space.map(Iova(0), PAGE, Permissions::Read, Some((dup(&ram), 0))).expect("map");
    space.map(Iova(PAGE), PAGE, Permissions::ReadWrite, Some((ram, PAGE))).expect("map");
    assert!(space.write_obj(1u32, GuestAddress(0)).is_err());
    assert_eq!(space.read_obj::<u32>(GuestAddress(0)).expect("read"), 0);
    space.write_obj(1u32, GuestAddress(PAGE)).expect("write");
    assert!(!space.check_range(GuestAddress(0), 8192, Permissions::Write));
}

#[test]
fn read_only_files_serve_read_only_maps() {
    let ram = memfd(PAGE);
    let mut space = DmaSpace::default();
    let refused = space.map(Iova(0), PAGE, Permissions::ReadWrite, Some((read_only(&ram), 0)));
    assert_eq!(refused, Err(DmaError::ReadOnlyFile { iova: Iova(0) }));
    space.map(Iova(0), PAGE, Permissions::Read, Some((read_only(&ram), 0))).expect("map");
    space.map(Iova(PAGE), PAGE, Permissions::ReadWrite, Some((ram, 0))).expect("map");
    space.write_obj(7u8, GuestAddress(PAGE)).expect("write");
    assert_eq!(space.read_obj::<u8>(GuestAddress(0)).expect("read"), 7);
}

#[test]
fn memory_without_a_file_is_inaccessible() {
    let mut space = DmaSpace::default();
    space.map(Iova(0), PAGE, Permissions::ReadWrite, None).expect("map");
    assert!(matches!(space.read_obj::<u8>(GuestAddress(0)), Err(GuestMemoryError::HostAddressNotAvailable)));
    assert!(space.reported.get());
    assert!(matches!(space.map(Iova(0), 1, Permissions::Read, None), Err(DmaError::Overlap { .. })));
}

#[test]
fn maps_that_cannot_be_are_refused() {
    let mut space = DmaSpace::default();
    let map = |space: &mut DmaSpace, iova, size, offset| {
        space.map(Iova(iova), size, Permissions::Read, Some((memfd(2 * PAGE), offset)))
    };
    assert_eq!(map(&mut space, 0, 0, 0), Err(DmaError::Range { iova: Iova(0), size: 0 }));
    let wraps = DmaError::Range { iova: Iova(u64::MAX), size: 2 };
    assert_eq!(map(&mut space, u64::MAX, 2, 0), Err(wraps));
    for (size, offset) in [(2 * PAGE + 1, 0), (1, 2 * PAGE), (2, u64::MAX), (u64::MAX, 1)] {
        let beyond = DmaError::BeyondFile { offset, size, file_size: 2 * PAGE };
        assert_eq!(map(&mut space, 0, size, offset), Err(beyond));
    }
    let socket = std::os::unix::net::UnixStream::pair().expect("socketpair").0;
    let refused = space.map(Iova(0), PAGE, Permissions::Read, Some((socket.into(), 0)));
    assert_eq!(refused, Err(DmaError::NotAFile { iova: Iova(0) }));
    let refused = space.map(Iova(0), PAGE, Permissions::No, None);
    assert_eq!(refused, Err(DmaError::NoAccess { iova: Iova(0) }));
    assert!(space.maps.is_empty());
}

#[test]
fn the_last_page_of_the_address_space_works() {
    let mut space = DmaSpace::default();
    let last = u64::MAX - (PAGE - 1);
    space.map(Iova(last), PAGE, Permissions::ReadWrite, Some((memfd(PAGE), 0))).expect("map");
    space.write_obj(3u64, GuestAddress(u64::MAX - 7)).expect("write");
    assert!(space.write_obj(3u64, GuestAddress(u64::MAX - 6)).is_err());
    space.unmap(Iova(last), u64::MAX).expect("unmap");
    assert!(space.maps.is_empty());
}

#[test]
fn a_file_that_grew_is_mapped_further() {
    let ram = memfd(PAGE);
    let mut space = DmaSpace::default();
    space.map(Iova(0), PAGE, Permissions::ReadWrite, Some((dup(&ram), 0))).expect("map");
    ftruncate(&ram, 2 * PAGE).expect("grow");
    space.map(Iova(PAGE), 2 * PAGE, Permissions::ReadWrite, Some((ram, 0))).expect("map");
    space.write_obj(5u8, GuestAddress(0)).expect("write");
    assert_eq!(space.read_obj::<u8>(GuestAddress(PAGE)).expect("read"), 5);
    space.write_obj(6u8, GuestAddress(3 * PAGE - 1)).expect("write");
}

#[test]
fn files_are_bounded_and_let_go() {
    let mut space = DmaSpace::default();
    for file in 0..64 {
        space.map(Iova(file * PAGE), PAGE, Permissions::Read, Some((memfd(PAGE), 0))).expect("map");
    }
    let one_more =
        |space: &mut DmaSpace| space.map(Iova(64 * PAGE), PAGE, Permissions::Read, Some((memfd(PAGE), 0)));
    assert_eq!(one_more(&mut space), Err(DmaError::TooManyFiles));
    space.unmap(Iova(0), PAGE).expect("unmap");
    assert_eq!(live_files(&space), 63);
    one_more(&mut space).expect("map");
    space.clear();
    assert!(space.maps.is_empty() && space.mappings.is_empty());
}

/// Each growth needs a mapping of its own, and the older ones stay as long as their maps do.
#[test]
fn a_file_that_grows_again_and_again_is_bounded_too() {
    let ram = memfd(PAGE);
    let mut space = DmaSpace::default();
    let mut grow_and_map = |page| {
        ftruncate(&ram, (page + 1) * PAGE).expect("grow");
        space.map(Iova(page * PAGE), PAGE, Permissions::ReadWrite, Some((dup(&ram), 0)))
    };
    for page in 0..64 {
        grow_and_map(page).expect("map");
    }
    assert_eq!(grow_and_map(64), Err(DmaError::TooManyFiles));
    space.unmap(Iova(0), PAGE).expect("unmap");
    space.map(Iova(64 * PAGE), PAGE, Permissions::ReadWrite, Some((ram, 0))).expect("room again");
}

#[test]
fn maps_are_bounded() {
    let mut space = DmaSpace::default();
    let maps = u64::try_from(DMA_MAPS_MAX).expect("small");
    for map in 0..maps {
        space.map(Iova(map * PAGE), PAGE, Permissions::Read, None).expect("map");
    }
    let refused = space.map(Iova(maps * PAGE), PAGE, Permissions::Read, None);
    assert_eq!(refused, Err(DmaError::TooManyMaps));
    assert_eq!(space.unmap(Iova(1), 1), Err(DmaError::TooManyMaps));
    assert_eq!(space.maps.len(), DMA_MAPS_MAX);
    space.unmap(Iova(0), u64::MAX).expect("unmap");
    assert!(space.maps.is_empty());
}

#[test]
fn errors_have_the_errno_of_the_protocol() {
    let (iova, size) = (Iova(0), 1);
    assert_eq!(DmaError::Overlap { iova, size, other: iova }.errno(), Errno::EXIST);
    assert_eq!(DmaError::TooManyMaps.errno(), Errno::NOSPC);
    assert_eq!(DmaError::Range { iova, size }.errno(), Errno::INVAL);
    assert_eq!(DmaError::Mmap { iova, errno: Errno::NOMEM }.errno(), Errno::NOMEM);
}

/// Addresses of the model; each step maps or unmaps a part of them.
const SPAN: usize = 64;

#[derive(Debug, Clone)]
enum Step {
    Map { iova: usize, size: usize, offset: usize, writable: bool, shared: bool },
    Unmap { iova: usize, size: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..SPAN, 1..SPAN / 4);
    prop_oneof![
        3 => (range(), 0..SPAN, any::<bool>(), prop::bool::weighted(0.8)).prop_map(
            |((iova, size), offset, writable, shared)| Step::Map { iova, size, offset, writable, shared }
        ),
        2 => range().prop_map(|(iova, size)| Step::Unmap { iova, size }),
    ]
}

/// What the model knows of one address: where in the file it is, if anywhere, and who may write.
#[derive(Clone, Copy, PartialEq)]
struct Byte {
    offset: Option<usize>,
    writable: bool,
}

/// A space and what it should be, byte by byte from address `base` on.
struct Pair {
    space: DmaSpace,
    model: Vec<Option<Byte>>,
    base: u64,
    ram: OwnedFd,
}

/// Byte `at` of the file.
fn content(at: usize) -> u8 {
    u8::try_from(at % 251).expect("a byte")
}

impl Pair {
    /// An empty space; `ram` is a file with its [`content`].
    fn new(ram: &OwnedFd, bytes: usize, base: u64) -> Self {
        Self { space: DmaSpace::default(), model: vec![None; bytes], base, ram: dup(ram) }
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Map { iova, size, offset, writable, shared } => {
                let access = if writable { Permissions::ReadWrite } else { Permissions::Read };
                let file = shared.then(|| (dup(&self.ram), offset as u64));
                let mapped = self.space.map(Iova(self.base + iova as u64), size as u64, access, file);
                let free = self.model[iova..iova + size].iter().all(Option::is_none);
                assert_eq!(mapped.is_ok(), free);
                for at in 0..if free { size } else { 0 } {
                    self.model[iova + at] = Some(Byte { offset: shared.then_some(offset + at), writable });
                }
            }
            Step::Unmap { iova, size } => {
                self.space.unmap(Iova(self.base + iova as u64), size as u64).expect("few maps");
                self.model[iova..iova + size].fill(None);
            }
        }
    }

    fn check(&self) {
        for (index, byte) in self.model.iter().enumerate() {
            let at = GuestAddress(self.base + index as u64);
            let expected = byte.and_then(|byte| byte.offset).map(content);
            assert_eq!(self.space.read_obj::<u8>(at).ok(), expected);
            let writable = byte.is_some_and(|byte| byte.writable && byte.offset.is_some());
            assert_eq!(self.space.check_range(at, 1, Permissions::Write), writable);
        }
        // A run of readable addresses is one range, and no longer.
        let run = self.model.iter().take_while(|byte| byte.is_some_and(|byte| byte.offset.is_some())).count();
        assert!(self.space.check_range(GuestAddress(self.base), run, Permissions::Read));
        assert!(!self.space.check_range(GuestAddress(self.base), run + 1, Permissions::Read));
    }
}

fn ram() -> OwnedFd {
    let ram = memfd(2 * SPAN as u64);
    let bytes: Vec<u8> = (0..2 * SPAN).map(content).collect();
    rustix::io::pwrite(&ram, &bytes, 0).expect("pwrite");
    ram
}

/// Every sequence of three maps and unmaps of three bytes, at the start and at the end of the address space.
#[test]
fn every_short_sequence_behaves_like_a_table_of_bytes() {
    const BYTES: usize = 3;
    let ram = ram();
    let ranges = (0..BYTES).flat_map(|iova| (1..=BYTES - iova).map(move |size| (iova, size)));
    let steps: Vec<Step> = ranges
        .flat_map(|(iova, size)| {
            let map = |writable, shared| Step::Map { iova, size, offset: 7 + 2 * iova, writable, shared };
            [map(true, true), map(false, true), map(true, false), Step::Unmap { iova, size }]
        })
        .collect();
    for base in [0, u64::MAX - (BYTES as u64 - 1)] {
        for (first, second) in steps.iter().flat_map(|first| steps.iter().map(move |second| (first, second)))
        {
            for third in &steps {
                let mut pair = Pair::new(&ram, BYTES, base);
                [first, second, third].into_iter().for_each(|step| pair.apply(step));
                pair.check();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn behaves_like_a_table_of_bytes(steps in prop::collection::vec(step(), 1..40)) {
        let mut pair = Pair::new(&ram(), 2 * SPAN, 0);
        for step in &steps {
            pair.apply(step);
            pair.check();
        }
    }
}
