//! Requests one by one, side by side and in batches.

use std::sync::Arc;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vvu::backend::block::{BlockOptions, EngineKind};

use crate::common::{
    Completion, Driver, Piece, Ring, Setup, SiblingMemory, config_u16, config_u64, pattern, wait_until,
};
use crate::{DATA, ENGINE, IO_ERROR, OK, UNSUPPORTED, memory, start};

#[test]
fn negotiates_reads_writes_flushes_and_identifies() {
    let before = pattern(1, 64 << 10);
    let backend = start(&before, |_| {});
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup::default());
    assert_eq!(config_u64(&driver.config, 0), 128, "capacity in sectors");
    assert_eq!(config_u16(&driver.config, 34), 4, "queues");

    assert_eq!(driver.read(0, 0, DATA, 64 << 10), before);
    assert_eq!(driver.read(0, 127, DATA, 512), before[127 * 512..]);
    let after = pattern(2, 8192);
    driver.write(0, 16, DATA, &after);
    driver.flush(0);
    assert_eq!(backend.content()[8192..16384], after);
    assert_eq!(driver.read(0, 16, DATA + 65536, 8192), after);
    assert_eq!(driver.id(0, DATA), "disk.img");
    backend.end();
}

#[test]
fn a_request_may_span_memory_regions() {
    let content = pattern(3, 16 << 10);
    let backend = start(&content, |_| {});
    let pieces = [
        Piece { gpa: 0, size: 0x10_0000, offset: 0x20_0000 },
        Piece { gpa: 0x10_0000, size: 0x10_0000, offset: 0 },
        Piece { gpa: 0x1_0000_0000, size: 0x10_0000, offset: 0x10_0000 },
    ];
    let memory = Arc::new(SiblingMemory::new(0x30_0000, &pieces));
    let mut driver = backend.connect(&memory, Setup::default());
    assert_eq!(driver.read(0, 0, 0x10_0000 - 4096, 16 << 10), content, "across adjacent regions");
    assert_eq!(driver.read(0, 0, 0x1_0000_0000, 16 << 10), content, "in the region above the gap");
    let into_gap = driver.request(0, VIRTIO_BLK_T_IN, 0, &[(0x20_0000 - 512, 1024)]);
    assert_eq!(into_gap, IO_ERROR);
    backend.end();
}

#[test]
fn queues_work_side_by_side() {
    let backend = start(&pattern(4, 1 << 20), |_| {});
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup { queues: 4, ..Setup::default() });
    for round in 0..50u64 {
        for queue in 0..4u64 {
            let gpa = DATA + queue * 0x1_0000;
            memory.write(gpa, &pattern(round * 4 + queue, 4096));
            driver.submit(
                usize::try_from(queue).expect("queue"),
                VIRTIO_BLK_T_OUT,
                queue * 8,
                &[(gpa, 4096)],
            );
        }
        for queue in 0..4 {
            let (head, completion) = driver.wait(queue).expect("completion");
            assert_eq!(completion, OK);
            assert!(head < 128);
            driver.rings[queue].restore((0..128).rev().collect());
        }
    }
    let want: Vec<u8> = (0..4).flat_map(|queue| pattern(49 * 4 + queue, 4096)).collect();
    assert_eq!(backend.content()[..16384], want);
    backend.end();
}

/// Flushes exclude one another, and so do writes that are durable when they are done. Each comes back all the same.
#[test]
fn flushes_of_all_queues_come_back() {
    for without in [0, 1 << VIRTIO_BLK_F_FLUSH] {
        let backend = start(&pattern(22, 1 << 20), |_| {});
        let memory = memory();
        let mut driver = backend.connect(&memory, Setup { queues: 4, without, ..Setup::default() });
        memory.write(DATA, &pattern(23, 4096));
        for _ in 0..5 {
            for request in 0..16u64 {
                for queue in 0..4 {
                    let sector = (request * 4 + queue as u64) * 8;
                    if without == 0 && request % 2 == 1 {
                        driver.submit(queue, VIRTIO_BLK_T_FLUSH, 0, &[]);
                    } else {
                        driver.submit(queue, VIRTIO_BLK_T_OUT, sector, &[(DATA, 4096)]);
                    }
                }
            }
            for queue in 0..4 {
                for _ in 0..16 {
                    assert_eq!(driver.wait(queue).expect("completion").1, OK);
                }
                driver.rings[queue].restore((0..128).rev().collect());
            }
        }
        backend.end();
    }
}

/// Returns how often the device calls for 20 requests that are available when the queue starts.
fn calls(without: u64, prepare: impl FnOnce(&Ring, &SiblingMemory)) -> u64 {
    let backend = start(&pattern(5, 64 << 10), |_| {});
    let memory = memory();
    let setup = Setup { without, ..Setup::default() };
    let mut driver = Driver::negotiate(&backend.socket, &memory, setup).expect("negotiation");
    driver.frontend.set_mem_table(&memory.table()).expect("memory table");
    for sector in 0..20 {
        driver.prepare(0, VIRTIO_BLK_T_IN, sector, &[(DATA + sector * 512, 512)]);
    }
    prepare(&driver.rings[0], &memory);
    driver.start_queue_at(0, 0).expect("queue");
    wait_until("all requests are done", || (driver.rings[0].used_index(&memory) == 20).then_some(()));
    // The answer comes when the queue's thread is at rest.
    driver.frontend.get_vring_base(0).expect("stopped");
    backend.end();
    driver.rings[0].call.read().unwrap_or(0)
}

#[test]
fn a_batch_is_announced_once_and_only_if_wanted() {
    let event_idx = 1 << VIRTIO_RING_F_EVENT_IDX;
    // Requests that are carried out side by side need not end together.
    let most = if ENGINE == EngineKind::Sync { 1 } else { 20 };
    let got = calls(event_idx, |_, _| {});
    assert!((1..=most).contains(&got), "{got} calls without event index");
    assert_eq!(calls(event_idx, Ring::ask_for_silence), 0, "without event index and unwanted");
    for (used_event, want) in [(0, 1), (19, 1), (20, 0), (1000, 0)] {
        let got = calls(0, |ring, memory| ring.set_used_event(memory, used_event));
        assert_eq!(got, want, "used event {used_event}");
    }
}

#[test]
fn a_driver_without_event_idx_is_served() {
    let content = pattern(6, 4096);
    let backend = start(&content, |_| {});
    let memory = memory();
    let without = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_BLK_F_FLUSH;
    let mut driver = backend.connect(&memory, Setup { without, acknowledged: false, ..Setup::default() });
    for _ in 0..300 {
        assert_eq!(driver.read(0, 0, DATA, 4096), content);
    }
    driver.write(0, 0, DATA, &pattern(7, 512));
    backend.end();
}

#[test]
fn discards_and_zeroes() {
    let before = pattern(8, 1 << 20);
    let backend = start(&before, |_| {});
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup::default());
    let mut range = |kind, sector: u64, sectors: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        memory.write(DATA, &bytes);
        driver.request(0, kind, 0, &[(DATA, 16)])
    };
    assert_eq!(range(VIRTIO_BLK_T_WRITE_ZEROES, 1, 3, 0), OK);
    assert_eq!(range(VIRTIO_BLK_T_WRITE_ZEROES, 8, 16, 1), OK);
    assert_eq!(range(VIRTIO_BLK_T_DISCARD, 1024, 1024, 0), OK);

    assert_eq!(range(VIRTIO_BLK_T_DISCARD, 0, 8, 1), UNSUPPORTED, "discard has no flags");
    assert_eq!(range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 2), UNSUPPORTED, "unknown flag");
    assert_eq!(range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 0, 0), IO_ERROR, "no sectors");
    assert_eq!(range(VIRTIO_BLK_T_WRITE_ZEROES, 2040, 9, 0), IO_ERROR, "past the end");
    assert_eq!(range(VIRTIO_BLK_T_DISCARD, u64::MAX, u32::MAX, 0), IO_ERROR, "overflow");

    let after = backend.content();
    let mut want = before.clone();
    want[512..4 * 512].fill(0);
    want[8 * 512..24 * 512].fill(0);
    assert_eq!(after[..512 << 10], want[..512 << 10]);
    assert_eq!(after.len(), before.len());
    backend.end();
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let before = pattern(9, 4096);
    let backend = start(&before, |options| options.read_only = true);
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup::default());
    for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(driver.request(0, kind, 0, &[(DATA, 512)]), IO_ERROR, "request {kind}");
    }
    assert_eq!(driver.read(0, 0, DATA, 4096), before);
    backend.end();
}

/// QEMU gives a guest as many queues as it has CPUs, and ends if the back-end offers fewer.
#[test]
fn all_queues_of_a_device_are_offered_by_default() {
    let (dir, disk) = crate::common::disk(&pattern(20, 4096)).expect("disk");
    let socket = dir.path().join("s");
    let block = vvu::backend::block::BlockBackend::open(&BlockOptions::new(disk)).expect("disk");
    let listener = std::os::unix::net::UnixListener::bind(&socket).expect("socket");
    let stop = vvu::event::StopToken::new().expect("token");
    std::thread::scope(|scope| {
        scope.spawn(|| block.serve(&listener, &stop).expect("served"));
        let memory = memory();
        let mut driver = Driver::negotiate(&socket, &memory, Setup::default()).expect("negotiation");
        assert_eq!(driver.frontend.get_queue_num().expect("queues"), 16);
        stop.stop();
    });
}

/// QEMU asks for the feature where its user does, and clears it again unless it has an IOMMU that translates addresses.
#[test]
fn access_platform_is_offered_on_demand_and_refused_with_an_iommu() {
    let content = pattern(22, 4096);
    let access_platform = 1 << VIRTIO_F_ACCESS_PLATFORM;
    for on in [false, true] {
        let backend = start(&content, |options| options.access_platform = on);
        let memory = memory();
        let mut driver = backend.connect(&memory, Setup { without: access_platform, ..Setup::default() });
        assert_eq!(driver.offered & access_platform != 0, on);
        let channel = VhostUserProtocolFeatures::BACKEND_REQ;
        assert_eq!(driver.protocol_features.contains(channel), on, "a channel to ask for translations");
        assert_eq!(driver.read(0, 0, DATA, 4096), content);
        drop(driver);
        let with_iommu = Setup { besides: access_platform, ..Setup::default() };
        assert!(Driver::connect(&backend.socket, &memory, with_iommu).is_err(), "nothing translates");
        backend.end();
    }
}

/// A driver learns how long a request may be before the back-end learns how long a queue is.
#[test]
fn requests_can_be_kept_as_short_as_a_queue() {
    let content = pattern(21, 7 << 10);
    let backend = start(&content, |options| options.segments = 14);
    let memory = memory();
    let setup = Setup { queue_size: 16, without: 1 << VIRTIO_RING_F_INDIRECT_DESC, ..Setup::default() };
    let mut driver = backend.connect(&memory, setup);
    assert_eq!(u32::from_le_bytes(driver.config[12..16].try_into().expect("four bytes")), 14);
    let pieces: Vec<_> = (0..14).map(|piece| (DATA + piece * 1024, 512)).collect();
    let got = driver.request(0, VIRTIO_BLK_T_IN, 0, &pieces);
    assert_eq!(got, Completion { status: 0, used: (7 << 10) + 1 });
    for (piece, want) in (0..).zip(content.chunks(512)) {
        assert_eq!(memory.read(DATA + piece * 1024, 512), want);
    }
    backend.end();
}
