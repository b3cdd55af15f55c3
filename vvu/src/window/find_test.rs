use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use tempfile::TempDir;

use super::*;
use crate::device::{DeviceConfig, MemoryOptions, SiblingMemory, VvuDevice};
use crate::rig::LocalDevice;

const HEADER: u64 = 2 << 20;
const RAM: u64 = 4 << 20;
const WINDOW: MemoryOptions = MemoryOptions { huge_pages: false, window: true };

/// A machine with persistent memory: names, sizes, and the files that are the memory.
fn machine(memories: &[(&str, u64, &File)]) -> (TempDir, Machine) {
    let root = tempfile::tempdir().expect("directory");
    let machine = Machine { sys: root.path().join("sys"), dev: root.path().join("dev"), open_flags: 0 };
    fs::create_dir_all(&machine.dev).expect("directory");
    for (name, size, file) in memories {
        let block = machine.sys.join("block").join(name);
        fs::create_dir_all(&block).expect("directory");
        fs::write(block.join("size"), format!("{}\n", size / SECTOR)).expect("size");
        let target = format!("/proc/self/fd/{}", file.as_raw_fd());
        symlink(target, machine.dev.join(name)).expect("link");
    }
    (root, machine)
}

fn memory(options: MemoryOptions) -> (SiblingMemory, File) {
    let memory = SiblingMemory::create_as(RAM, options).expect("memory");
    let file = memory.file().try_clone().expect("dup");
    (memory, file)
}

fn driver(memory: SiblingMemory) -> Driver<LocalDevice<VvuDevice>> {
    let directory = tempfile::tempdir().expect("directory");
    let listener = UnixListener::bind(directory.path().join("s")).expect("bind");
    let device = VvuDevice::new(DeviceConfig { memory, listener, queues: 1, uuid: [7; 16] }).expect("device");
    Driver::new(LocalDevice::new(device)).expect("up")
}

fn sizes(driver: &Driver<LocalDevice<VvuDevice>>) -> WindowSizes {
    driver.window_sizes().expect("read").expect("sizes")
}

#[test]
fn the_memory_of_the_device_is_found_among_others() {
    let ((own, file), (_other, foreign)) = (memory(WINDOW), memory(WINDOW));
    let size = file.metadata().expect("size").len();
    let (_root, machine) = machine(&[
        ("pmem0", size, &foreign),
        ("pmem1", size - HEADER, &file),
        ("pmem2s", size, &file),
        ("pmem3.1", size, &file),
        ("sda", size, &file),
    ]);
    let driver = driver(own);
    assert_eq!(sizes(&driver), WindowSizes { header: HEADER, size });
    let found = find(&machine, &driver, sizes(&driver)).expect("found");
    assert_eq!((found.name.as_str(), found.path), ("pmem3.1", machine.dev.join("pmem3.1")));
}

#[test]
fn memory_of_another_sibling_is_not_taken_nor_changed() {
    let ((own, file), (_other, foreign)) = (memory(WINDOW), memory(WINDOW));
    let size = file.metadata().expect("size").len();
    let driver = driver(own);
    let (_root, one) = machine(&[("pmem0", size, &foreign)]);
    let error = find(&one, &driver, sizes(&driver)).expect_err("foreign").to_string();
    assert!(error.contains("(pmem0), none is its sibling's"), "{error}");
    let mut bytes = vec![9; usize::try_from(HEADER).expect("small")];
    foreign.read_exact_at(&mut bytes, 0).expect("read");
    assert!(bytes.iter().all(|byte| *byte == 0));
    let (_root, none) = machine(&[("pmem0", size + HEADER, &file)]);
    let error = find(&none, &driver, sizes(&driver)).expect_err("absent").to_string();
    assert!(error.contains("virtio-pmem-pci") && error.contains(&format!("size={size} ")), "{error}");
}

#[test]
fn memory_without_a_header_is_not_written_to() {
    let (own, file) = memory(MemoryOptions::default());
    let size = file.metadata().expect("size").len();
    let driver = driver(own);
    assert_eq!(sizes(&driver), WindowSizes { header: 0, size });
    let (_root, one) = machine(&[("pmem0", size, &file)]);
    let error = refuse_unguarded(&one, size).expect_err("unguarded").to_string();
    assert!(error.contains("pmem0") && error.contains("--window"), "{error}");
    let (_root, none) = machine(&[]);
    refuse_unguarded(&none, size).expect("there is none");
    let mut bytes = vec![9; 4096];
    file.read_exact_at(&mut bytes, HEADER - BLOCK).expect("read");
    assert!(bytes.iter().all(|byte| *byte == 0), "the sibling's RAM is untouched");
}

#[test]
fn a_search_waits_for_another_one() {
    let (own, file) = memory(WINDOW);
    let size = file.metadata().expect("size").len();
    let (_root, machine) = machine(&[("pmem0", size, &file)]);
    let driver = driver(own);
    let first = find(&machine, &driver, sizes(&driver)).expect("found");
    let late = lock(&machine, "pmem0", Instant::now()).expect_err("locked").to_string();
    assert!(late.contains("kept pmem0 locked"), "{late}");
    drop(first);
    find(&machine, &driver, sizes(&driver)).expect("found again");
}

#[test]
fn a_kernel_that_believes_info_blocks_shows_it() {
    let (_root, machine) = machine(&[]);
    assert!(!believes_info_blocks(&machine), "no NVDIMM at all");
    let region = machine.sys.join("bus/nd/devices/region0");
    fs::create_dir_all(&region).expect("directory");
    for (name, text, believes) in [
        ("btt_seed", "btt0.0\n", false),
        ("pfn_seed", "\n", false),
        ("dax_seed", "\n", false),
        ("dax_seed", "dax0.0\n", true),
        ("dax_seed", "\n", false),
        ("pfn_seed", "pfn0.0\n", true),
    ] {
        fs::write(region.join(name), text).expect("written");
        assert_eq!(believes_info_blocks(&machine), believes, "{name} is {text:?}");
    }
}
