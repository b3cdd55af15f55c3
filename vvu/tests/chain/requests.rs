//! Requests through the chain.

use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use crate::chain::{Chain, FLAT};
use crate::common::{Completion, Driver, Piece, Setup, pattern};

#[test]
fn reads_writes_flushes_and_identifies() {
    let before = pattern(1, 1 << 20);
    let chain = Chain::start(&FLAT, &before);
    let mut driver = chain.connect(Setup::default());
    let data = Driver::buffers(&chain.memory, 4);

    assert_eq!(driver.read(0, 0, data, 1 << 20), before);
    let after = pattern(2, 64 << 10);
    driver.write(0, 128, data, &after);
    driver.flush(0);
    assert_eq!(chain.backend.content()[64 << 10..128 << 10], after);
    assert_eq!(driver.read(0, 128, data + (1 << 20), 64 << 10), after);
    assert_eq!(driver.id(0, data), "disk.img");
    let beyond = driver.request(0, VIRTIO_BLK_T_IN, 2048, &[(data, 512)]);
    assert_eq!(beyond, Completion { status: 1, used: 1 });
    chain.end();
}

/// As a PC has it: memory below and above the hole for devices, and in the file without one.
#[test]
fn reaches_every_memory_region() {
    let pieces = [
        Piece { gpa: 0, size: 0xa_0000, offset: 0 },
        Piece { gpa: 0xc_0000, size: 0x34_0000, offset: 0xc_0000 },
        Piece { gpa: 1 << 32, size: 0x40_0000, offset: 0x40_0000 },
    ];
    let content = pattern(3, 64 << 10);
    let chain = Chain::start(&pieces, &content);
    let mut driver = chain.connect(Setup::default());
    let high = (1u64 << 32) + 0x3f_0000;
    for gpa in [0x9_0000, 0xc_0000, 0x3f_0000, 1 << 32, high] {
        assert_eq!(driver.read(0, 0, gpa, 64 << 10), content, "by way of {gpa:#x}");
    }
    // One request in all of them.
    let scattered = [(0x8_0000, 4096), (high, 512), (0xc_0000, 1024), (1 << 32, 2048)];
    let got = driver.request(0, VIRTIO_BLK_T_IN, 1, &scattered);
    assert_eq!(got, Completion { status: 0, used: 4096 + 512 + 1024 + 2048 + 1 });
    let parts: Vec<u8> =
        scattered.iter().flat_map(|(gpa, len)| chain.memory.read(*gpa, *len as usize)).collect();
    assert_eq!(parts, content[512..][..parts.len()]);
    // Into the hole.
    let hole = driver.request(0, VIRTIO_BLK_T_IN, 0, &[(0xa_0000 - 512, 1024)]);
    assert_eq!(hole, Completion { status: 1, used: 1 });
    chain.end();
}

#[test]
fn four_queues_work_side_by_side() {
    let chain = Chain::start(&FLAT, &pattern(4, 64 << 10));
    let mut driver = chain.connect(Setup { queues: 4, ..Setup::default() });
    let data = Driver::buffers(&chain.memory, 4);
    let block = |queue: usize| (data + queue as u64 * 0x1_0000, queue as u64 * 8);
    for round in 0..25u64 {
        for queue in 0..4 {
            let (gpa, sector) = block(queue);
            chain.memory.write(gpa, &pattern(round * 4 + queue as u64, 4096));
            driver.submit(queue, VIRTIO_BLK_T_OUT, sector, &[(gpa, 4096)]);
        }
        for queue in 0..4 {
            let (_, completion) = driver.wait(queue).expect("completion");
            assert_eq!(completion, Completion { status: 0, used: 1 }, "round {round}, queue {queue}");
            driver.rings[queue].restore((0..128).rev().collect());
        }
    }
    let want: Vec<u8> = (0..4).flat_map(|queue| pattern(24 * 4 + queue, 4096)).collect();
    assert_eq!(chain.backend.content()[..16 << 10], want);
    chain.end();
}

/// A queue full of requests with one kick.
#[test]
fn many_requests_are_in_flight_at_once() {
    let content = pattern(5, 64 << 10);
    let chain = Chain::start(&FLAT, &content);
    let mut driver = chain.connect(Setup { queue_size: 128, ..Setup::default() });
    let data = Driver::buffers(&chain.memory, 4);
    let free = driver.rings[0].snapshot();
    for _ in 0..5 {
        for index in 0..42 {
            driver.prepare(0, VIRTIO_BLK_T_IN, index, &[(data + index * 512, 512)]);
        }
        driver.rings[0].kick();
        for _ in 0..42 {
            assert_eq!(driver.wait(0).expect("completion").1, Completion { status: 0, used: 513 });
        }
        assert_eq!(chain.memory.read(data, 42 * 512), content[..42 * 512]);
        driver.rings[0].restore(free.clone());
        chain.memory.write(data, &[0; 42 * 512]);
    }
    chain.end();
}

/// The sibling may be far larger than anything that hosts the device.
#[test]
fn a_sibling_of_64_gib_is_served() {
    let low = 2 << 30;
    let pieces = [
        Piece { gpa: 0, size: low, offset: 0 },
        Piece { gpa: 1 << 32, size: (62 << 30) - low, offset: low as u64 },
        Piece { gpa: 1 << 40, size: low, offset: 62 << 30 },
    ];
    let content = pattern(6, 64 << 10);
    let chain = Chain::start(&pieces, &content);
    let mut driver = chain.connect(Setup::default());
    let last = (1 << 40) + (2u64 << 30) - 0x1_0000;
    for gpa in [1 << 30, (1 << 32) + (50 << 30), last] {
        assert_eq!(driver.read(0, 0, gpa, 64 << 10), content, "by way of {gpa:#x}");
    }
    chain.end();
}
