use super::*;
use crate::spec::addr::{SiblingGpa, SiblingVa};

fn region(offset: u64, size: u64) -> MemoryRegion {
    MemoryRegion { gpa: SiblingGpa(0), size, va: SiblingVa(0), offset: BarOffset(offset) }
}

#[test]
fn only_ranges_of_this_very_file_are_accepted() {
    let memory = SiblingMemory::create(0x4000).expect("memory");
    let other = SiblingMemory::create(0x4000).expect("memory");
    let same = memory.file().try_clone().expect("dup");
    assert!(memory.check(&region(0x1000, 0x3000), &same).is_ok());
    assert!(matches!(memory.check(&region(0, 0x1000), other.file()), Err(MemoryError::Foreign { .. })));
    for (offset, size) in [(0x1000, 0x4000), (0x4000, 0x1000), (u64::MAX - 0xfff, 0x1000)] {
        assert!(matches!(memory.check(&region(offset, size), &same), Err(MemoryError::Beyond { .. })));
    }
}

#[test]
fn nobody_can_resize_it() {
    let memory = SiblingMemory::create(0x4000).expect("memory");
    assert!(memory.file().set_len(0x1000).is_err());
    assert!(memory.file().set_len(0x4000_0000).is_err());
}

#[test]
fn trapped_accesses_reach_the_file_and_nothing_beyond() {
    let memory = SiblingMemory::create(0x1000).expect("memory");
    let end = memory.size();
    memory.write(end - 4, &[1, 2, 3, 4, 5, 6]);
    let mut data = [9; 6];
    memory.read(end - 4, &mut data);
    assert_eq!(data, [1, 2, 3, 4, 0, 0]);
    memory.write(u64::MAX, &[1]);
    memory.read(u64::MAX, &mut data);
    assert_eq!(data, [0; 6]);
}

/// As with huge pages, of which this machine may have none.
#[test]
fn a_write_through_a_mapping_lands_where_it_belongs() {
    let memory = SiblingMemory::create(0x4000).expect("memory");
    let end = memory.size();
    for offset in [0, 7, 0xffc, 0x1000, end - 8] {
        let data: Vec<u8> = (1..=8).collect();
        memory.write_mapped(&data, offset, PAGE_SIZE).expect("write");
        let mut read = [0; 8];
        memory.read(offset, &mut read);
        assert_eq!(read, data[..], "{offset:#x}");
        memory.write(offset, &[0; 8]);
    }
    memory.write_mapped(&[], 3, PAGE_SIZE).expect("nothing to write");
}

#[test]
fn an_in_flight_region_is_zeroed_and_has_one_place() {
    let memory = SiblingMemory::create(0x1000).expect("memory");
    memory.write(0x1000, &[1; 8]);
    let area = memory.allocate_inflight(0x2000).expect("area");
    assert_eq!(area, InflightArea { size: 0x2000, offset: BarOffset(0x1000) });
    let mut data = [9; 8];
    memory.read(0x1000, &mut data);
    assert_eq!(data, [0; 8]);
    assert!(memory.check_inflight(area, memory.file()).is_ok());
    let other = SiblingMemory::create(0x1000).expect("memory");
    assert!(memory.check_inflight(area, other.file()).is_err());
    assert!(memory.check_inflight(InflightArea { offset: BarOffset(0), ..area }, memory.file()).is_err());
    assert!(memory.allocate_inflight(INFLIGHT_SIZE + 1).is_err());
}

/// Opens the file of `memory` a second time.
fn reopen(memory: &SiblingMemory) -> File {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", memory.file().as_raw_fd());
    File::options().read(true).write(true).open(path).expect("reopen")
}

#[test]
fn devices_that_share_a_file_have_in_flight_regions_of_their_own() {
    let first = SiblingMemory::create(0x1000).expect("memory");
    let mut others: Vec<_> =
        (1..INFLIGHT_REGIONS).map(|_| SiblingMemory::open(reopen(&first)).expect("shared")).collect();
    assert!(matches!(SiblingMemory::open(reopen(&first)), Err(OpenError::Full)));
    let last = others.last().expect("last").allocate_inflight(0x1000).expect("area");
    assert_eq!(last.offset.0, 0x1000 + (INFLIGHT_REGIONS - 1) * INFLIGHT_SIZE);
    assert!(first.check_inflight(last, first.file()).is_err());
    others.remove(2);
    let again = SiblingMemory::open(reopen(&first)).expect("freed");
    assert_eq!(again.inflight, 0x1000 + 3 * INFLIGHT_SIZE);
}

/// The VMMs of both VMs hold the file for longer than a proxy lives.
#[test]
fn a_claim_ends_with_its_device_although_others_hold_the_file() {
    let first = SiblingMemory::create(0x1000).expect("memory");
    let mut lent = Vec::new();
    for _ in 0..2 * INFLIGHT_REGIONS {
        let device = SiblingMemory::open(reopen(&first)).expect("a free region");
        assert_eq!(device.inflight, 0x1000 + INFLIGHT_SIZE);
        lent.push(device.file().try_clone().expect("dup"));
    }
}

/// Nobody finds the file any more: the link to it leads to the proxy that made it.
#[test]
fn a_file_whose_maker_has_ended_is_told_from_one_whose_sibling_has_other_memory() {
    let maker = SiblingMemory::create(PAGE_SIZE).expect("memfd");
    let other = SiblingMemory::create(PAGE_SIZE).expect("memfd");
    let user = SiblingMemory::open(reopen(&maker)).expect("shared");
    let region = region(0, PAGE_SIZE);
    assert!(matches!(user.check(&region, other.file()), Err(MemoryError::Foreign { .. })));
    drop(maker);
    assert!(matches!(user.check(&region, other.file()), Err(MemoryError::Orphaned)));
    user.check(&region, user.file()).expect("a sibling that still runs has it");
    let plain = tempfile::tempfile().expect("file");
    assert!(matches!(user.check(&region, &plain), Err(MemoryError::Foreign { .. })));
    assert!(matches!(other.check(&region, user.file()), Err(MemoryError::Foreign { .. })));
}

#[test]
fn any_other_file_is_refused() {
    let plain = tempfile::tempfile().expect("file");
    plain.set_len(TAIL_SIZE + 0x1000).expect("size");
    assert!(matches!(SiblingMemory::open(plain), Err(OpenError::Kind)));
    let unsealed = memfd_create("plain", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("memfd");
    ftruncate(&unsealed, TAIL_SIZE + 0x1000).expect("size");
    assert!(matches!(SiblingMemory::open(unsealed.into()), Err(OpenError::Kind)));
}

const HUGE: MemoryOptions = MemoryOptions { huge_pages: true, window: false };
const WINDOW: MemoryOptions = MemoryOptions { huge_pages: false, window: true };

#[test]
fn a_file_for_a_window_has_a_header_that_is_no_ram() {
    const HEADER: u64 = 2 << 20;
    let memory = SiblingMemory::create_as(4 << 20, WINDOW).expect("memory");
    assert_eq!((memory.header(), memory.size()), (HEADER, (6 << 20) + TAIL_SIZE));
    assert!(memory.check(&region(HEADER, 4 << 20), memory.file()).is_ok());
    for offset in [0, 0x1000, HEADER - 0x1000] {
        let error = memory.check(&region(offset, 0x1000), memory.file()).expect_err("header").to_string();
        assert!(error.contains("add offset=2M"), "{error}");
    }
    let beyond = memory.check(&region(HEADER, (4 << 20) + 0x1000), memory.file());
    assert!(matches!(beyond, Err(MemoryError::Beyond { .. })));
    assert_eq!(memory.inflight, HEADER + (4 << 20));
    let odd = SiblingMemory::create_as((4 << 20) + 0x1000, WINDOW).expect_err("odd").to_string();
    assert!(odd.contains("want a multiple of 2097152"), "{odd}");
}

#[test]
fn every_proxy_of_a_sibling_knows_whether_there_is_a_header() {
    for (options, header) in [(WINDOW, 2 << 20), (MemoryOptions::default(), 0)] {
        let first = SiblingMemory::create_as(4 << 20, options).expect("memory");
        let second = SiblingMemory::open(reopen(&first)).expect("shared");
        assert_eq!((second.header(), second.ram), (header, 4 << 20));
        let (file, claims, inflight) = first.parts();
        let [file, claims] = [file, claims].map(|file| file.try_clone().expect("dup"));
        let third = SiblingMemory::inherit(file, claims, inflight).expect("inherited");
        assert_eq!((third.header(), third.size()), (header, first.size()));
    }
}

/// Tests with huge pages if the machine has some, and the error if not. The output says which.
#[test]
fn huge_pages_are_all_there_or_their_lack_is_explained() {
    match SiblingMemory::create_as(4 << 20, HUGE) {
        Ok(memory) => {
            eprintln!("with the huge pages of this machine");
            assert_eq!(fstatfs(memory.file()).expect("fstatfs").f_type, libc::HUGETLBFS_MAGIC);
            let allocated = fstat(memory.file()).expect("fstat").st_blocks * 512;
            assert_eq!(u64::try_from(allocated), Ok(memory.size()));
            let area = memory.allocate_inflight(0x2000).expect("area");
            assert_eq!((area.offset.0, area.size), (4 << 20, HUGE_PAGE_SIZE));
            let after = fstat(memory.file()).expect("fstat").st_blocks * 512;
            assert_eq!(after, allocated);
            memory.write((2 << 20) - 2, &[1, 2, 3, 4]);
            let mut read = [0; 4];
            memory.read((2 << 20) - 2, &mut read);
            assert_eq!(read, [1, 2, 3, 4], "a trapped write reaches huge pages");
            let shared = SiblingMemory::open(reopen(&memory)).expect("shared");
            assert!(shared.check(&region(0, 4 << 20), memory.file()).is_ok());
        }
        Err(error) => {
            eprintln!("without huge pages: {error}");
            assert!(matches!(error, OpenError::HugePages { wanted: 18, .. }), "{error}");
            assert!(error.to_string().contains("sysctl vm.nr_hugepages=18"), "{error}");
        }
    }
    let odd = SiblingMemory::create_as(1 << 20, HUGE).expect_err("odd").to_string();
    assert!(odd.contains("want a multiple of 2097152"), "{odd}");
}

#[test]
fn odd_sizes_are_refused() {
    for ram in [0, 1000, !0xfff] {
        assert!(SiblingMemory::create(ram).is_err());
    }
}
