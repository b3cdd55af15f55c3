//! Back-ends that are killed with requests in flight, and others that finish them.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_T_OUT;
use vvu::bridge::Retry;

use crate::chain::{Chain, FLAT, Guest, Proxy};
use crate::common::{Completion, Driver, Setup, disk, pattern};

const TRACKED: Setup =
    Setup { queues: 1, queue_size: 128, without: 0, besides: 0, acknowledged: true, inflight: true };
const OK: Completion = Completion { status: 0, used: 1 };

/// Where fields of the in-flight region are (vhost-user, `QueueRegionSplit` and `DescStateSplit`).
const LAST_BATCH_HEAD: u64 = 12;
const USED_INDEX: u64 = 14;

fn entry(head: u16) -> u64 {
    16 + u64::from(head) * 16
}

/// Both the sibling and the device VM can map it there.
#[test]
fn the_region_lies_behind_the_siblings_ram() {
    let chain = Chain::start(&FLAT, &pattern(1, 4096));
    for acknowledged in [true, false] {
        let mut driver = chain.connect(Setup { queues: 3, acknowledged, ..TRACKED });
        let (region, file) = driver.inflight.take().expect("region");
        assert_eq!((region.mmap_offset, region.num_queues, region.queue_size), (8 << 20, 3, 128));
        let (own, shared) = (file.metadata().expect("stat"), chain.memory.file().metadata().expect("stat"));
        assert_eq!((own.dev(), own.ino()), (shared.dev(), shared.ino()));
        driver.flush(2);
        let mut part = [0; 16];
        file.read_exact_at(&mut part, region.mmap_offset + region.mmap_size / 3 * 2).expect("region");
        assert_eq!(part, [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 128, 0, 0, 0, 1, 0], "one request, tracked and done");
    }
    chain.end();
}

/// What a back-end leaves behind that took three requests and was killed when it had given back the
/// second one, and before it had written that down.
#[test]
fn the_next_back_end_finishes_what_is_unfinished_and_in_order() {
    let Chain { memory, proxy, guest, mut backend, .. } = Chain::start(&FLAT, &[0; 4096]);
    let mut driver = Driver::connect(&proxy.vhost_user(), &memory, TRACKED).expect("connection");
    driver.flush(0);
    guest.kill();
    driver.wait_disconnected();
    // The old one is gone before the ring changes, or it would take what is new there.
    backend.restart();

    let data = Driver::buffers(&memory, 4);
    let write = |driver: &mut Driver, byte: u8, sector| {
        let at = data + u64::from(byte) * 512;
        driver.memory.write(at, &[byte; 512]);
        driver.prepare(0, VIRTIO_BLK_T_OUT, sector, &[(at, 512)])
    };
    let taken = [write(&mut driver, 1, 0), write(&mut driver, 2, 1), write(&mut driver, 3, 0)];
    let (region, file) = driver.inflight.as_ref().expect("region");
    let store = |at, value: &[u8]| file.write_all_at(value, region.mmap_offset + at).expect("region");
    for (counter, head) in (7u64..).zip(taken) {
        store(entry(head), &[1]);
        store(entry(head) + 8, &counter.to_le_bytes());
    }
    store(LAST_BATCH_HEAD, &taken[1].to_le_bytes());
    store(USED_INDEX, &1u16.to_le_bytes());
    driver.rings[0].use_up(&memory, taken[1], 1);
    let fresh = write(&mut driver, 4, 2);

    let guest = Guest::start(&proxy, &backend.socket, Retry::Forever);
    let mut driver = driver.reconnect(&proxy.vhost_user()).expect("connection");
    let heads: Vec<u16> = (0..4).map(|_| driver.wait(0).expect("completion").0).collect();
    assert_eq!(heads, [taken[1], taken[0], taken[2], fresh]);
    assert_eq!(driver.rings[0].pop(&memory), None);
    let content = backend.content();
    let sectors: Vec<u8> = content.chunks(512).map(|sector| sector[0]).collect();
    assert_eq!(sectors[..4], [3, 0, 4, 0], "the second one is not carried out again");
    driver.flush(0);
    guest.end();
    backend.end();
    proxy.end();
}

/// Content that makes no sense for the ring costs the front-end its queue, no more.
#[test]
fn a_region_of_nonsense_stops_the_queue_and_nothing_else() {
    let content = pattern(3, 4096);
    let chain = Chain::start(&FLAT, &content);
    let data = Driver::buffers(&chain.memory, 4);
    for round in 0..4 {
        let driver = chain.connect(Setup { queues: 2, ..TRACKED });
        let (region, file) = driver.inflight.as_ref().expect("region");
        let mut nonsense = pattern(round, usize::try_from(region.mmap_size / 2).expect("size"));
        if round % 2 == 0 {
            nonsense[..12].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 128, 0]);
        }
        file.write_all_at(&nonsense, region.mmap_offset).expect("region");
        let mut driver = driver.reconnect(&chain.proxy.vhost_user()).expect("connection");
        assert_eq!(driver.read(1, 0, data, 4096), content, "the other queue works");
        driver.submit(0, VIRTIO_BLK_T_OUT, 0, &[(data, 512)]);
        assert_eq!(driver.read(1, 0, data, 4096), content);
        assert_eq!(driver.rings[0].pop(&chain.memory), None);
    }
    // The next one starts anew.
    assert_eq!(chain.connect(TRACKED).read(0, 0, data, 4096), content);
    chain.end();
}

/// `vvu device block` as a process, so that it can be killed.
struct Process(Child);

impl Process {
    fn start(socket: &Path, disk: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vvu"));
        command.args(["device", "block", "--socket"]).arg(socket).arg("--file").arg(disk);
        Self(command.stdout(Stdio::null()).spawn().expect("back-end"))
    }

    fn kill(mut self) {
        self.0.kill().expect("SIGKILL");
        self.0.wait().expect("the end of the back-end");
    }
}

#[test]
fn a_back_end_is_killed_again_and_again_and_every_request_completes_once() {
    const REQUESTS: u64 = 40;
    const LEN: u32 = 64 << 10;
    const TOTAL: usize = 40 * (64 << 10);
    let (dir, disk) = disk(&[0; TOTAL]).expect("disk");
    let socket = dir.path().join("s");
    let proxy = Proxy::start(8 << 20, 1);
    let memory = Arc::new(proxy.memory(&FLAT));
    let mut process = Process::start(&socket, &disk);
    let guest = Guest::start(&proxy, &socket, Retry::Forever);
    let mut driver = Driver::connect(&proxy.vhost_user(), &memory, TRACKED).expect("connection");
    let data = Driver::buffers(&memory, 1);
    let free = driver.rings[0].snapshot();
    let mut content = Vec::new();
    for round in 0..30 {
        content = pattern(100 + round, TOTAL);
        memory.write(data, &content);
        let write = |request| {
            let offset = request * u64::from(LEN);
            driver.prepare(0, VIRTIO_BLK_T_OUT, offset / 512, &[(data + offset, LEN)])
        };
        let mut outstanding: BTreeSet<u16> = (0..REQUESTS).map(write).collect();
        driver.rings[0].kick();
        let mut complete = |driver: &mut Driver, count| {
            for _ in 0..count {
                let (head, completion) =
                    driver.wait(0).unwrap_or_else(|error| panic!("round {round}: {error}"));
                assert_eq!(completion, OK);
                assert!(outstanding.remove(&head), "round {round}: {head} came back twice");
            }
        };
        let before = round % REQUESTS;
        complete(&mut driver, before);
        process.kill();
        process = Process::start(&socket, &disk);
        driver.wait_disconnected();
        driver = driver.reconnect(&proxy.vhost_user()).expect("connection");
        complete(&mut driver, REQUESTS - before);
        assert_eq!(driver.rings[0].pop(&memory), None, "round {round}: nothing came back twice");
        driver.rings[0].restore(free.clone());
    }
    assert!(std::fs::read(&disk).expect("disk") == content, "no write was lost");
    drop(driver);
    guest.end();
    process.kill();
    proxy.end();
}
