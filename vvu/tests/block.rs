//! The block back-end, end to end over a plain vhost-user socket.

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use common::{
    Backend, Completion, Descriptor, Driver, INDIRECT, NEXT, Piece, Ring, Setup, SiblingMemory, WRITE,
    config_u16, config_u64, pattern, wait_until,
};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vvu::backend::block::{Block, Options};

const OK: Completion = Completion { status: 0, used: 1 };
const IO_ERROR: Completion = Completion { status: 1, used: 1 };
const UNSUPPORTED: Completion = Completion { status: 2, used: 1 };

fn memory() -> Arc<SiblingMemory> {
    Arc::new(SiblingMemory::flat(4 << 20))
}

const DATA: u64 = 1 << 20;

#[test]
fn negotiates_reads_writes_flushes_and_identifies() {
    let before = pattern(1, 64 << 10);
    let backend = Backend::start(&before, |_| {});
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
    let backend = Backend::start(&content, |_| {});
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
    let backend = Backend::start(&pattern(4, 1 << 20), |_| {});
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

/// How often the device calls for 20 requests that it finds at once when the queue starts.
fn calls(without: u64, prepare: impl FnOnce(&Ring, &SiblingMemory)) -> u64 {
    let backend = Backend::start(&pattern(5, 64 << 10), |_| {});
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
    // The queue's thread is at rest when the answer to this comes.
    driver.frontend.get_vring_base(0).expect("stopped");
    backend.end();
    driver.rings[0].call.read().unwrap_or(0)
}

#[test]
fn a_batch_is_announced_once_and_only_if_wanted() {
    let event_idx = 1 << VIRTIO_RING_F_EVENT_IDX;
    assert_eq!(calls(event_idx, |_, _| {}), 1, "without event index");
    assert_eq!(calls(event_idx, Ring::ask_for_silence), 0, "without event index and unwanted");
    for (used_event, want) in [(0, 1), (19, 1), (20, 0), (1000, 0)] {
        let got = calls(0, |ring, memory| ring.set_used_event(memory, used_event));
        assert_eq!(got, want, "used event {used_event}");
    }
}

#[test]
fn a_driver_without_event_idx_is_served() {
    let content = pattern(6, 4096);
    let backend = Backend::start(&content, |_| {});
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
    let backend = Backend::start(&before, |_| {});
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
    let backend = Backend::start(&before, |options| options.read_only = true);
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup::default());
    for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(driver.request(0, kind, 0, &[(DATA, 512)]), IO_ERROR, "request {kind}");
    }
    assert_eq!(driver.read(0, 0, DATA, 4096), before);
    backend.end();
}

#[test]
fn an_indirect_table_is_followed_once() {
    let content = pattern(10, 4096);
    let backend = Backend::start(&content, |_| {});
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup::default());
    let table = DATA + 0x8000;
    let header = Driver::header(&memory, 0, 0);
    let read = |addr, len, flags, next| Descriptor { addr, len, flags, next }.to_bytes();
    memory.write(header, &[0; 17]);
    let direct =
        [read(header, 16, NEXT, 1), read(DATA, 4096, NEXT | WRITE, 2), read(header + 16, 1, WRITE, 0)];
    memory.write(table, &direct.concat());
    let ring = &mut driver.rings[0];
    ring.store(&memory, 0, Descriptor { addr: table, len: 48, flags: INDIRECT, next: 0 });
    ring.push(&memory, 0);
    ring.kick();
    assert_eq!(ring.wait(&memory), Ok((0, 4097)));
    assert_eq!(memory.read(DATA, 4096), content);

    // A table within a table.
    memory.write(table, &read(table, 48, INDIRECT, 0));
    ring.store(&memory, 1, Descriptor { addr: table, len: 48, flags: INDIRECT, next: 0 });
    ring.push(&memory, 1);
    ring.kick();
    assert_eq!(ring.wait(&memory), Ok((1, 0)));
    backend.end();
}

/// Chains that no driver would make; each comes back, and the device goes on.
#[test]
fn hostile_chains_come_back_and_change_nothing() {
    let content = pattern(11, 64 << 10);
    let backend = Backend::start(&content, |_| {});
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup::default());
    let header = Driver::header(&memory, 0, 100);
    let write = |kind: u32, sector: u64| {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        bytes.push(0xff);
        memory.write(header, &bytes);
    };
    let d = |addr, len, flags, next| Descriptor { addr, len, flags, next };
    let head = d(header, 16, NEXT, 1);
    let status = d(header + 16, 1, WRITE, 0);
    type Case<'a> = (&'a str, u32, u64, &'a [Descriptor], (u32, u8));
    let cases: &[Case<'_>] = &[
        ("loop of one", 0, 0, &[d(header, 16, NEXT, 0)], (0, 0xff)),
        ("loop behind the header", 0, 0, &[head, d(DATA, 512, NEXT | WRITE, 1)], (1, 0xff)),
        ("next outside of the table", 0, 0, &[d(header, 16, NEXT, 500)], (0, 0xff)),
        ("no descriptor but the status", 0, 0, &[status], (1, 1)),
        ("no status", 1, 0, &[head, d(DATA, 512, 0, 0)], (0, 0xff)),
        ("short header", 0, 0, &[d(header, 15, NEXT, 1), status], (1, 1)),
        ("header of no memory", 0, 0, &[d(1 << 40, 16, NEXT, 1), status], (1, 1)),
        (
            "readable behind writable",
            1,
            0,
            &[head, d(DATA, 512, NEXT | WRITE, 2), d(DATA, 512, NEXT, 3), status],
            (1, 0xff),
        ),
        ("data outside of memory", 0, 0, &[head, d(1 << 40, 512, NEXT | WRITE, 2), status], (1, 1)),
        (
            "data at the end of the address space",
            0,
            0,
            &[head, d(u64::MAX - 255, 512, NEXT | WRITE, 2), status],
            (1, 1),
        ),
        ("data across the end of memory", 1, 0, &[head, d((4 << 20) - 256, 512, NEXT, 2), status], (1, 1)),
        ("huge data", 0, 0, &[head, d(0, u32::MAX - 511, NEXT | WRITE, 2), status], (1, 1)),
        (
            "more data than a chain may have",
            0,
            0,
            &[head, d(0, u32::MAX, NEXT | WRITE, 2), status],
            (0, 0xff),
        ),
        ("data of 511 bytes", 1, 0, &[head, d(DATA, 511, NEXT, 2), status], (1, 1)),
        ("sector past the end", 0, 128, &[head, d(DATA, 512, NEXT | WRITE, 2), status], (1, 1)),
        ("last sector and one more", 1, 127, &[head, d(DATA, 1024, NEXT, 2), status], (1, 1)),
        ("sector that overflows", 0, u64::MAX, &[head, d(DATA, 512, NEXT | WRITE, 2), status], (1, 1)),
        ("offset that overflows", 1, 1 << 55, &[head, d(DATA, 512, NEXT, 2), status], (1, 1)),
        (
            "status outside of memory",
            0,
            0,
            &[head, d(DATA, 512, NEXT | WRITE, 2), d(1 << 40, 1, WRITE, 0)],
            (0, 0xff),
        ),
        ("unknown request", 77, 0, &[head, status], (1, 2)),
        ("discard without a range", 11, 0, &[head, status], (1, 1)),
        ("discard of half a range", 11, 0, &[head, d(DATA, 8, NEXT, 2), status], (1, 1)),
        ("empty descriptors", 1, 0, &[head, d(0, 0, NEXT, 2), d(0, 0, NEXT | WRITE, 3), status], (1, 0)),
    ];
    for (name, kind, sector, chain, (used, want)) in cases {
        write(*kind, *sector);
        for (index, descriptor) in chain.iter().enumerate() {
            driver.rings[0].store(&memory, u16::try_from(index).expect("index"), *descriptor);
        }
        driver.rings[0].push(&memory, 0);
        driver.rings[0].kick();
        let got = driver.rings[0].wait(&memory).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((got, memory.read(header + 16, 1)[0]), ((0, *used), *want), "{name}");
    }
    driver.rings[0].restore((0..100).rev().collect());
    assert_eq!(driver.read(0, 0, DATA, 64 << 10), content);
    assert_eq!(backend.content(), content);
    backend.end();
}

/// A driver that breaks its ring loses that queue; the others and a new start are fine.
#[test]
fn a_broken_ring_stops_one_queue_until_it_is_started_again() {
    let content = pattern(12, 4096);
    let backend = Backend::start(&content, |_| {});
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup { queues: 2, ..Setup::default() });
    assert_eq!(driver.read(0, 0, DATA, 4096), content);
    let far = driver.rings[0].next_avail().wrapping_add(1000);
    driver.rings[0].set_avail_index(&memory, far);
    driver.rings[0].kick();
    assert_eq!(driver.read(1, 0, DATA, 4096), content);

    // The device has to have seen the index before it is set right again.
    driver.frontend.get_vring_base(0).expect("stopped");
    let right = driver.rings[0].next_avail();
    driver.rings[0].set_avail_index(&memory, right);
    driver.start_queue(0).expect("started");
    assert_eq!(driver.read(0, 0, DATA, 4096), content);
    backend.end();
}

#[test]
fn a_queue_stops_where_it_is_and_goes_on_from_there() {
    let content = pattern(13, 4096);
    let backend = Backend::start(&content, |_| {});
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup::default());
    for _ in 0..3 {
        driver.read(0, 0, DATA, 512);
        let base = driver.frontend.get_vring_base(0).expect("stopped");
        assert_eq!(base, u32::from(driver.rings[0].next_avail()));
        // A request that is made while the queue is stopped is found when it starts.
        driver.prepare(0, VIRTIO_BLK_T_IN, 0, &[(DATA, 4096)]);
        driver.rings[0].kick();
        assert_eq!(driver.rings[0].pop(&memory), None);
        driver.start_queue_at(0, driver.rings[0].next_avail() - 1).expect("started");
        let (_, completion) = driver.wait(0).expect("completion");
        assert_eq!(completion.status, 0);
        assert_eq!(memory.read(DATA, 4096), content);
    }
    backend.end();
}

#[test]
fn events_and_memory_are_replaced_on_a_running_connection() {
    let content = pattern(14, 4096);
    let backend = Backend::start(&content, |_| {});
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup::default());
    for _ in 0..5 {
        assert_eq!(driver.read(0, 0, DATA, 4096), content);
        let old_kick = driver.rings[0].renew_kick();
        driver.frontend.set_vring_kick(0, &driver.rings[0].kick).expect("kick");
        let old_call = driver.rings[0].renew_call();
        driver.frontend.set_vring_call(0, &driver.rings[0].call).expect("call");
        driver.frontend.set_mem_table(&memory.table()).expect("memory table");
        // Whatever came before the change.
        let _ = (old_kick.read(), old_call.read());

        old_kick.write(1).expect("old kick");
        assert_eq!(driver.read(0, 0, DATA, 4096), content);
        assert_eq!(old_kick.read().expect("old kick"), 1, "nobody listens to the old kick event");
        assert!(old_call.read().is_err(), "nobody signals the old call event");
    }
    backend.end();
}

#[test]
fn a_front_end_that_breaks_the_protocol_costs_only_itself() {
    use std::io::{Read, Write};
    let backend = Backend::start(&pattern(16, 512), |_| {});
    for garbage in [&[0xff; 64][..], &[1, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], &[1, 0, 0]] {
        let mut stream = std::os::unix::net::UnixStream::connect(&backend.socket).expect("connect");
        stream.set_read_timeout(Some(common::DEADLINE)).expect("timeout");
        stream.write_all(garbage).expect("garbage");
        stream.shutdown(std::net::Shutdown::Write).expect("end");
        let mut rest = Vec::new();
        // A reset is as good an end as any.
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty());
    }
    // Addresses before there is memory, a queue that does not exist, a queue size of 0.
    for attempt in 0..3 {
        let memory = memory();
        let mut driver = Driver::negotiate(&backend.socket, &memory, Setup::default()).expect("negotiation");
        let config = driver.rings[0].config(&memory);
        let refused = match attempt {
            0 => driver.frontend.set_vring_addr(0, &config),
            1 => driver.frontend.set_vring_num(0, 0),
            _ => driver.frontend.set_vring_num(0, 2048),
        };
        assert!(refused.is_err(), "attempt {attempt}");
        drop(driver.frontend.get_queue_num());
    }
    let memory = memory();
    backend.connect(&memory, Setup::default()).read(0, 0, DATA, 512);
    backend.end();
}

#[test]
fn stops_while_a_front_end_is_connected() {
    let backend = Backend::start(&pattern(17, 512), |_| {});
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup::default());
    driver.read(0, 0, DATA, 512);
    backend.stop.stop();
    driver.wait_disconnected();
    backend.end();
}

#[test]
fn one_writer_or_many_readers() {
    let backend = Backend::start(&pattern(18, 512), |_| {});
    let open = |path: &Path, read_only| {
        let options = Options { path: path.to_owned(), read_only, queues: 1, serial: None };
        Block::open(&options).map_err(|error| error.to_string())
    };
    let busy = open(&backend.disk, false).expect_err("second writer");
    assert!(busy.contains("stop that one, or serve it read-only in both"), "{busy}");
    open(&backend.disk, true).expect_err("reader beside a writer");
    let other = backend.dir.path().join("other.img");
    std::fs::File::create(&other).expect("file").write_all_at(&[1; 512], 0).expect("content");
    let first = open(&other, true).expect("reader");
    let second = open(&other, true).expect("second reader");
    open(&other, false).expect_err("writer beside readers");
    drop((first, second));
    open(&other, false).expect("writer on its own");
    backend.end();
}
