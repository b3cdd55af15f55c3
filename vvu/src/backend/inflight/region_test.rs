use super::*;

const LIMITS: Limits = Limits { queues: 4, queue_size: 1024 };

fn description(size: u64, offset: u64, queues: u16, queue_size: u16) -> VhostUserInflight {
    VhostUserInflight::new(size, offset, queues, queue_size)
}

fn fields(description: &VhostUserInflight) -> (u64, u64, u16, u16) {
    let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *description;
    (mmap_size, mmap_offset, num_queues, queue_size)
}

fn made(queues: u16, queue_size: u16) -> (VhostUserInflight, File) {
    create(&description(0, 0, queues, queue_size), LIMITS).expect("region")
}

fn open(description: &VhostUserInflight, file: File) -> Result<Region, RegionError> {
    Region::open(description, file, LIMITS, None)
}

/// As large as QEMU's back-ends make it, so that they and ours can take over from each other.
#[test]
fn what_is_made_has_room_for_all_rings_and_keeps_its_size() {
    let (offered, file) = made(3, 5);
    assert_eq!(fields(&offered), (3 * 128, 0, 3, 5));
    assert_eq!(fstat(&file).expect("stat").st_size, 3 * 128);
    assert!(ftruncate(&file, 0).is_err() && ftruncate(&file, 4096).is_err());
    let region = open(&offered, file).expect("region");
    region.place(2, 5).expect("the last one").recover(0, 0).expect("memory");
    assert!(matches!(region.place(3, 5), Err(RegionError::NoPlace { index: 3, .. })));
    assert!(matches!(region.place(0, 6), Err(RegionError::NoPlace { size: 6, .. })));
}

/// The front-end's fault, but the ring works without.
#[test]
fn a_ring_that_is_too_large_does_without_and_one_that_is_unknown_is_refused() {
    let (offered, file) = made(2, 128);
    let region = open(&offered, file).expect("region");
    assert!(region.tracker(1, 128).expect("a place").is_some());
    assert!(region.tracker(1, 1024).expect("no place").is_none());
    assert!(matches!(region.tracker(2, 128), Err(RegionError::NoPlace { index: 2, .. })));
}

/// As with a window, whose file no path leads to.
#[test]
fn a_file_that_is_known_to_last_is_taken_and_no_other() {
    let file = || {
        let file = tempfile::tempfile().expect("file");
        file.set_len(1 << 20).expect("size");
        file
    };
    let (lasting, other) = (file(), file());
    let asked = description(1 << 20, 0, 1, 128);
    let open = |file: &File, lasting: Option<&File>| {
        let lasting = lasting.map(|file| FileId::of(file).expect("stat"));
        Region::open(&asked, file.try_clone().expect("dup"), LIMITS, lasting)
    };
    open(&lasting, Some(&lasting)).expect("taken");
    assert!(matches!(open(&other, Some(&lasting)), Err(RegionError::CanShrink)));
    assert!(matches!(open(&lasting, None), Err(RegionError::CanShrink)));
}

#[test]
fn rings_have_parts_of_their_own() {
    let (offered, file) = made(2, 4);
    let region = open(&offered, file).expect("region");
    let start = |ring, used| {
        let mut tracker = region.place(ring, 4).expect("tracker");
        let recovered = tracker.recover(used, used + 4).expect("recovery");
        (tracker, recovered)
    };
    let (mut first, _) = start(0, 0);
    let (mut second, _) = start(1, 7);
    for head in 0..4 {
        first.begin(head).expect("begin");
    }
    second.begin(3).expect("begin");
    assert_eq!(start(0, 0).1, Some(vec![0, 1, 2, 3]));
    assert_eq!(start(1, 7).1, Some(vec![3]));
}

#[test]
fn descriptions_that_lie_are_refused() {
    for (queues, queue_size) in [(0, 128), (5, 128), (u16::MAX, 128), (1, 0), (1, 1025), (1, u16::MAX)] {
        let asked = description(0, 0, queues, queue_size);
        let refused = create(&asked, LIMITS).map(drop).expect_err("no such device");
        assert!(
            matches!(refused, RegionError::Queues { .. } | RegionError::QueueSize { .. }),
            "{queues} {queue_size}"
        );
        let (_, file) = made(1, 128);
        open(&description(1 << 20, 0, queues, queue_size), file).expect_err("no such device");
    }
    for (size, offset) in [(2111, 0), (0, 0), (2112, 1), (2112, 64)] {
        let refused = open(&description(size, offset, 1, 128), made(1, 128).1);
        assert!(matches!(refused, Err(RegionError::Place { want: 2112, .. })), "{size} {offset}");
    }
    for (size, offset) in [(2112, 4096), (2112, 1 << 62), (u64::MAX, !0xfff)] {
        let refused = open(&description(size, offset, 1, 128), made(1, 128).1);
        assert!(matches!(refused, Err(RegionError::Map(_))), "{size} {offset}: {refused:?}");
    }
}

/// Or an access to memory that is no longer there would kill us (SIGBUS).
#[test]
fn files_that_can_shrink_are_refused() {
    let (offered, _) = made(1, 128);
    let unsealed = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("memfd");
    let ordinary = std::os::fd::OwnedFd::from(tempfile::tempfile().expect("file"));
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("eventfd");
    for fd in [unsealed, ordinary, event] {
        assert!(matches!(open(&offered, fd.into()), Err(RegionError::CanShrink)));
    }
}

/// A PCI device's memory, which no seal can protect and nobody can shrink, is a file in there.
#[test]
fn files_of_sysfs_pass() {
    assert!(fixed_length(File::open("/sys").expect("sysfs")).expect("seals").is_some());
}

/// No page need be there for the file to have its size, and an access without one would kill us (SIGBUS).
#[test]
fn huge_pages_are_refused() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    let file = memfd_create("test", flags).expect("a kernel with huge pages");
    ftruncate(&file, 2 << 20).expect("size");
    fcntl_add_seals(&file, SealFlags::SHRINK).expect("seal");
    let (offered, _) = made(1, 128);
    assert!(matches!(open(&offered, file.into()), Err(RegionError::HugePages)));
}
