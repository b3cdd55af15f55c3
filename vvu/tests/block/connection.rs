//! Queues stop and start, a running connection changes, and several back-ends open one disk.

use std::os::unix::fs::FileExt;
use std::path::Path;

use vhost::VhostBackend;
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_T_IN;
use vvu::backend::block::{BlockBackend, BlockOptions};

use crate::common::{Setup, pattern, wait_until};
use crate::{DATA, memory, start};

#[test]
fn a_queue_stops_where_it_is_and_goes_on_from_there() {
    let content = pattern(13, 4096);
    let backend = start(&content, |_| {});
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

/// A queue stops between two requests, never within one, however many are waiting.
#[test]
fn a_stopped_queue_has_finished_what_it_took() {
    const LEN: u32 = 512 << 10;
    let backend = start(&pattern(19, LEN as usize), |_| {});
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup::default());
    let free = driver.rings[0].snapshot();
    for _ in 0..20 {
        for _ in 0..40 {
            driver.prepare(0, VIRTIO_BLK_T_IN, 0, &[(DATA, LEN)]);
        }
        driver.rings[0].kick();
        let base = driver.frontend.get_vring_base(0).expect("stopped");
        assert_eq!(base, u32::from(driver.rings[0].used_index(&memory)));

        driver.start_queue_at(0, u16::try_from(base).expect("index")).expect("started");
        for _ in 0..40 {
            assert_eq!(driver.wait(0).expect("completion").1.status, 0);
        }
        driver.rings[0].restore(free.clone());
    }
    backend.end();
}

#[test]
fn events_and_memory_are_replaced_on_a_running_connection() {
    let content = pattern(14, 4096);
    let backend = start(&content, |_| {});
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup::default());
    for _ in 0..5 {
        assert_eq!(driver.read(0, 0, DATA, 4096), content);
        let old_kick = driver.rings[0].renew_kick();
        driver.frontend.set_vring_kick(0, &driver.rings[0].kick).expect("kick");
        let old_call = driver.rings[0].renew_call();
        driver.frontend.set_vring_call(0, &driver.rings[0].call).expect("call");
        driver.frontend.set_mem_table(&memory.table()).expect("memory table");
        // Takes signals from before the change.
        let _ = (old_kick.read(), old_call.read());

        old_kick.write(1).expect("old kick");
        assert_eq!(driver.read(0, 0, DATA, 4096), content);
        assert_eq!(old_kick.read().expect("old kick"), 1, "nobody listens to the old kick event");
        assert!(old_call.read().is_err(), "nobody signals the old call event");
    }
    backend.end();
}

/// The back-end before may have died between giving a request back and signalling the driver.
#[test]
fn a_driver_that_waits_for_a_call_gets_one_from_the_next_back_end() {
    let mut backend = start(&pattern(16, 512), |_| {});
    let memory = memory();
    for inflight in [false, true] {
        let mut driver = backend.connect(&memory, Setup { inflight, ..Setup::default() });
        driver.read(0, 0, DATA, 512);
        let _ = driver.rings[0].call.read();
        backend.restart();
        let driver = driver.reconnect(&backend.socket).expect("connection");
        wait_until("the driver is called", || driver.rings[0].call.read().ok());
    }
    backend.end();
}

#[test]
fn stops_while_a_front_end_is_connected() {
    let backend = start(&pattern(17, 512), |_| {});
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup::default());
    driver.read(0, 0, DATA, 512);
    backend.stop.stop();
    driver.wait_disconnected();
    backend.end();
}

#[test]
fn one_writer_or_many_readers() {
    let backend = start(&pattern(18, 512), |_| {});
    let open = |path: &Path, read_only| {
        let options = BlockOptions { read_only, ..BlockOptions::new(path) };
        BlockBackend::open(&options).map_err(|error| error.to_string())
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
