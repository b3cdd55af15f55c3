//! What a front-end may change while it is connected.

use std::sync::Arc;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_T_IN;

use crate::chain::{Chain, FLAT};
use crate::common::{Completion, Driver, Piece, Setup, SiblingMemory, pattern};

#[test]
fn kick_and_call_events_are_replaced() {
    let content = pattern(1, 4096);
    let chain = Chain::start(&FLAT, &content);
    let mut driver = chain.connect(Setup { queues: 2, ..Setup::default() });
    let data = Driver::buffers(&chain.memory, 4);
    for round in 0..5 {
        let queue = round % 2;
        assert_eq!(driver.read(queue, 0, data, 4096), content);
        let old_kick = driver.rings[queue].renew_kick();
        driver.frontend.set_vring_kick(queue, &driver.rings[queue].kick).expect("kick");
        let old_call = driver.rings[queue].renew_call();
        driver.frontend.set_vring_call(queue, &driver.rings[queue].call).expect("call");
        // Whatever came before the change.
        let _ = old_call.read();

        // That the old event starts nothing is for the proxy's own tests, which see each interrupt.
        old_kick.write(1).expect("old kick");
        for _ in 0..3 {
            assert_eq!(driver.read(queue, 0, data, 4096), content);
        }
        assert!(old_call.read().is_err(), "nobody signals the old call event");
    }
    chain.end();
}

/// A kick that is given before its event is passed on must not be lost.
#[test]
fn a_kick_that_came_before_its_event_counts() {
    let content = pattern(2, 4096);
    let chain = Chain::start(&FLAT, &content);
    let mut driver = chain.connect(Setup::default());
    let data = Driver::buffers(&chain.memory, 4);
    for _ in 0..5 {
        driver.rings[0].renew_kick();
        let free = driver.rings[0].snapshot();
        driver.submit(0, VIRTIO_BLK_T_IN, 0, &[(data, 4096)]);
        driver.frontend.set_vring_kick(0, &driver.rings[0].kick).expect("kick");
        assert_eq!(driver.wait(0).expect("completion").1, Completion { status: 0, used: 4097 });
        driver.rings[0].restore(free);
    }
    chain.end();
}

#[test]
fn the_memory_table_is_replaced() {
    const LOW: Piece = Piece { gpa: 0, size: 0x10_0000, offset: 0 };
    const HIGH: u64 = 1 << 32;
    let content = pattern(3, 4096);
    let chain = Chain::with_ram(0x80_0000, &[LOW], &content);
    let mut driver = chain.connect(Setup::default());
    for round in 0..6u64 {
        // The same guest address, each time elsewhere in the file.
        let offset = 0x10_0000 * (1 + round);
        let high = Piece { gpa: HIGH, size: 0x10_0000, offset };
        let memory = Arc::new(chain.proxy.memory(&[LOW, high]));
        driver.frontend.set_mem_table(&memory.table()).expect("memory table");
        driver.memory = memory;
        assert_eq!(driver.read(0, 0, HIGH, 4096), content, "round {round}");
        let mut bytes = vec![0; 4096];
        std::os::unix::fs::FileExt::read_exact_at(&chain.memory.file(), &mut bytes, offset).expect("file");
        assert_eq!(bytes, content, "round {round}");
    }
    driver.frontend.set_mem_table(&chain.memory.table()).expect("memory table");
    driver.memory = chain.memory.clone();
    let gone = driver.request(0, VIRTIO_BLK_T_IN, 0, &[(HIGH, 512)]);
    assert_eq!(gone, Completion { status: 1, used: 1 });
    chain.end();
}

#[test]
fn memory_regions_come_and_go() {
    const LOW: Piece = Piece { gpa: 0, size: 0x10_0000, offset: 0 };
    const HIGH: Piece = Piece { gpa: 1 << 32, size: 0x10_0000, offset: 0x20_0000 };
    let content = pattern(4, 4096);
    let chain = Chain::with_ram(0x80_0000, &[LOW], &content);
    let setup = Setup { acknowledged: true, ..Setup::default() };
    let mut driver = Driver::negotiate(&chain.proxy.vhost_user(), &chain.memory, setup).expect("negotiation");
    let both = Arc::new(chain.proxy.memory(&[LOW, HIGH]));
    driver.memory = both.clone();
    assert!(driver.frontend.get_max_mem_slots().expect("slots") >= 2);
    driver.frontend.add_mem_region(&both.region(&LOW)).expect("add");
    driver.start_queue(0).expect("queue");
    for _ in 0..3 {
        driver.frontend.add_mem_region(&both.region(&HIGH)).expect("add");
        assert_eq!(driver.read(0, 0, HIGH.gpa, 4096), content);
        driver.frontend.remove_mem_region(&both.region(&HIGH)).expect("remove");
        let gone = driver.request(0, VIRTIO_BLK_T_IN, 0, &[(HIGH.gpa, 512)]);
        assert_eq!(gone, Completion { status: 1, used: 1 });
    }
    let foreign = SiblingMemory::new(0x40_0000, &[HIGH]);
    driver.frontend.add_mem_region(&foreign.region(&HIGH)).expect_err("foreign memory");
    assert_eq!(driver.read(0, 0, 0x8_0000, 4096), content);
    chain.end();
}

/// As a guest that reboots or loads its driver anew: queues are stopped and set up again, with the
/// events and the memory table sent again, on the same connection.
#[test]
fn a_sibling_reboots_on_one_connection() {
    let content = pattern(5, 4096);
    let chain = Chain::start(&FLAT, &content);
    let mut driver = chain.connect(Setup { queues: 4, ..Setup::default() });
    let data = Driver::buffers(&chain.memory, 4);
    for _ in 0..4 {
        for queue in 0..4 {
            assert_eq!(driver.read(queue, 0, data, 4096), content);
        }
        for queue in 0..4 {
            driver.frontend.set_vring_enable(queue, false).expect("disable");
            let base = driver.frontend.get_vring_base(queue).expect("stopped");
            assert_eq!(base, u32::from(driver.rings[queue].next_avail()));
        }
        driver.frontend.reset_device().expect("reset");
        driver.frontend.set_features(driver.features).expect("features");
        driver.frontend.set_mem_table(&chain.memory.table()).expect("memory table");
        driver.renew_rings();
        for queue in 0..4 {
            driver.start_queue(queue).expect("queue");
        }
    }
    chain.end();
}
