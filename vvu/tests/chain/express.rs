//! Notifications of the back-end through the express device.

use vhost::VhostBackend;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

use vvu::bridge::Retry;
use vvu::spec::express::PeerId;

use crate::chain::{Chain, FLAT, Guest};
use crate::common::{DEADLINE, Driver, Setup, pattern, readable, wait_until};
use crate::logs;

/// Reads from queue 0 until `count` notifications went through the express device.
fn read_until_express(chain: &Chain, driver: &mut Driver, content: &[u8], count: u64) {
    let data = Driver::buffers(&chain.memory, 4);
    let goal = chain.vmm().rung() + count;
    wait_until("notifications take the express device", || {
        assert_eq!(driver.read(0, 0, data, 4096), content);
        (chain.vmm().rung() >= goal).then_some(())
    });
}

#[test]
fn notifications_take_the_express_device() {
    let content = pattern(1, 4096);
    let chain = Chain::express(&content);
    let mut driver = chain.connect(Setup { queues: 4, ..Setup::default() });
    let data = Driver::buffers(&chain.memory, 4);
    read_until_express(&chain, &mut driver, &content, 20);
    for queue in 0..4 {
        assert_eq!(driver.read(queue, 0, data, 4096), content);
    }
    wait_until("every queue has its peer", || (chain.vmm().bound() == 4).then_some(()));
    let before = chain.vmm().rung();
    for queue in 0..4 {
        for _ in 0..10 {
            assert_eq!(driver.read(queue, 0, data, 4096), content);
        }
    }
    assert!(chain.vmm().rung() > before);
    chain.end();
}

/// As a VMM whose guest masks and unmasks an interrupt, or moves it to another CPU.
#[test]
fn call_eventfds_that_take_turns_lose_no_notification() {
    let content = pattern(2, 4096);
    let chain = Chain::express(&content);
    let mut driver = chain.connect(Setup::default());
    read_until_express(&chain, &mut driver, &content, 1);
    let data = Driver::buffers(&chain.memory, 4);
    let mut other = driver.rings[0].renew_call();
    for round in 0..300 {
        driver.frontend.set_vring_call(0, &driver.rings[0].call).expect("call");
        assert_eq!(driver.read(0, 0, data, 4096), content, "round {round}");
        std::mem::swap(&mut driver.rings[0].call, &mut other);
    }
    let (connected, ever) = chain.vmm().peers();
    assert!(connected.len() <= 2 && ever <= 3, "{connected:?} of {ever}");
    chain.end();
}

#[test]
fn new_call_eventfds_lose_no_notification() {
    let content = pattern(3, 4096);
    let chain = Chain::express(&content);
    let mut driver = chain.connect(Setup { queues: 2, ..Setup::default() });
    read_until_express(&chain, &mut driver, &content, 1);
    let data = Driver::buffers(&chain.memory, 4);
    for round in 0..300 {
        let queue = round % 2;
        let old = driver.rings[queue].renew_call();
        driver.frontend.set_vring_call(queue, &driver.rings[queue].call).expect("call");
        let _ = old.read();
        assert_eq!(driver.read(queue, 0, data, 4096), content, "round {round}");
        assert!(old.read().is_err(), "round {round}: nobody signals the old call event");
    }
    let (connected, _) = chain.vmm().peers();
    assert!(connected.len() <= 4, "{connected:?}");
    read_until_express(&chain, &mut driver, &content, 1);
    chain.end();
}

#[test]
fn a_slow_vmm_costs_speed_alone() {
    let content = pattern(4, 4096);
    let chain = Chain::express(&content);
    chain.vmm().set_paused(true);
    let mut driver = chain.connect(Setup::default());
    let data = Driver::buffers(&chain.memory, 4);
    for _ in 0..1000 {
        driver.rings[0].renew_call();
        driver.frontend.set_vring_call(0, &driver.rings[0].call).expect("call");
        assert_eq!(driver.read(0, 0, data, 4096), content);
    }
    assert_eq!(chain.vmm().rung(), 0);
    chain.vmm().set_paused(false);
    wait_until("the VMM has caught up", || (chain.vmm().peers().0.len() <= 2).then_some(()));
    driver.rings[0].renew_call();
    driver.frontend.set_vring_call(0, &driver.rings[0].call).expect("call");
    read_until_express(&chain, &mut driver, &content, 3);
    chain.end();
}

#[test]
fn a_vmm_that_hangs_up_costs_speed_alone() {
    let content = pattern(5, 4096);
    let chain = Chain::express(&content);
    let mut driver = chain.connect(Setup::default());
    read_until_express(&chain, &mut driver, &content, 1);
    chain.vmm().hang_up();
    let data = Driver::buffers(&chain.memory, 4);
    for _ in 0..20 {
        assert_eq!(driver.read(0, 0, data, 4096), content);
        driver.rings[0].renew_call();
        driver.frontend.set_vring_call(0, &driver.rings[0].call).expect("call");
    }
    wait_until("the driver has left the express device", || (chain.vmm().bound() == 0).then_some(()));
    assert_eq!(driver.read(0, 0, data, 4096), content);
    chain.end();
}

/// As a VMM that takes a last look at the old call event and waits for no acknowledgement.
#[test]
fn a_front_end_that_waits_for_no_acknowledgement_loses_nothing() {
    let content = pattern(9, 4096);
    for express in [false, true] {
        let chain = if express { Chain::express(&content) } else { Chain::start(&FLAT, &content) };
        let mut driver = chain.connect(Setup { acknowledged: false, ..Setup::default() });
        let data = Driver::buffers(&chain.memory, 4);
        if express {
            read_until_express(&chain, &mut driver, &content, 1);
        }
        for round in 0..300 {
            let free = driver.rings[0].snapshot();
            driver.submit(0, VIRTIO_BLK_T_IN, 0, &[(data, 4096)]);
            let old = driver.rings[0].renew_call();
            driver.frontend.set_vring_call(0, &driver.rings[0].call).expect("call");
            let ring = &mut driver.rings[0];
            let mut done = old.read().is_ok() && ring.pop(&chain.memory).is_some();
            while !done {
                assert!(readable(&ring.call, DEADLINE), "round {round} of express {express}: nothing came");
                ring.call.read().expect("call event");
                done = ring.pop(&chain.memory).is_some();
            }
            ring.restore(free);
        }
        chain.end();
    }
}

/// The numbers of peers are used up while requests go on.
#[test]
fn numbers_that_are_used_up_cost_speed_alone() {
    const NUMBERS: u16 = 100;
    let content = pattern(10, 4096);
    let last = PeerId::new(NUMBERS).expect("a peer");
    let chain = Chain::express_with(&content, |device| device.limit_express(128, last));
    let mut driver = chain.connect(Setup { queues: 2, ..Setup::default() });
    read_until_express(&chain, &mut driver, &content, 1);
    wait_until("both queues have their peers", || (chain.vmm().bound() == 2).then_some(()));
    let data = Driver::buffers(&chain.memory, 4);
    for round in 0..2 * NUMBERS {
        driver.rings[0].renew_call();
        driver.frontend.set_vring_call(0, &driver.rings[0].call).expect("call");
        for queue in [0, 1] {
            assert_eq!(driver.read(queue, 0, data, 4096), content, "round {round}");
        }
    }
    wait_until("the other queue keeps its peer, and this one has none", || {
        assert_eq!(driver.read(0, 0, data, 4096), content);
        (chain.vmm().bound() == 1 && chain.vmm().peers().1 == usize::from(NUMBERS)).then_some(())
    });
    let before = chain.vmm().rung();
    for _ in 0..20 {
        assert_eq!(driver.read(1, 0, data, 4096), content);
    }
    assert!(chain.vmm().rung() > before);
    assert!(logs::contain(&["the express device is out of peers"]));
    chain.end();
}

/// There are more queues than the VMM takes peers for.
#[test]
fn room_that_is_used_up_costs_speed_alone() {
    let content = pattern(11, 4096);
    let chain = Chain::express_with(&content, |device| device.limit_express(3, PeerId::LAST));
    let mut driver = chain.connect(Setup { queues: 4, ..Setup::default() });
    let data = Driver::buffers(&chain.memory, 4);
    for round in 0..50 {
        for queue in 0..4 {
            assert_eq!(driver.read(queue, 0, data, 4096), content, "round {round}");
            driver.rings[queue].renew_call();
            driver.frontend.set_vring_call(queue, &driver.rings[queue].call).expect("call");
        }
        assert!(chain.vmm().peers().0.len() <= 3, "round {round}");
    }
    wait_until("all the room is taken", || (chain.vmm().bound() >= 2).then_some(()));
    for queue in 0..4 {
        assert_eq!(driver.read(queue, 0, data, 4096), content);
    }
    chain.end();
}

#[test]
fn an_express_device_that_fails_costs_speed_alone() {
    let content = pattern(12, 4096);
    for registered in [false, true] {
        let chain = Chain::express(&content);
        chain.vmm().set_paused(!registered);
        let mut driver = chain.connect(Setup { queues: 2, ..Setup::default() });
        if registered {
            read_until_express(&chain, &mut driver, &content, 1);
        }
        chain.vmm().fail();
        let data = Driver::buffers(&chain.memory, 4);
        for round in 0..20 {
            let queue = round % 2;
            assert_eq!(driver.read(queue, 0, data, 4096), content);
            driver.rings[queue].renew_call();
            driver.frontend.set_vring_call(queue, &driver.rings[queue].call).expect("call");
        }
        wait_until("the driver has left the express device", || (chain.vmm().bound() == 0).then_some(()));
        assert_eq!(driver.read(0, 0, data, 4096), content);
        chain.end();
    }
}

/// The driver looks at the page once a second when nothing happens.
#[test]
fn a_driver_leaves_a_dead_express_device_by_itself() {
    let content = pattern(6, 4096);
    let chain = Chain::express(&content);
    let mut driver = chain.connect(Setup::default());
    read_until_express(&chain, &mut driver, &content, 1);
    chain.vmm().hang_up();
    wait_until("the driver has left the express device", || (chain.vmm().bound() == 0).then_some(()));
    let data = Driver::buffers(&chain.memory, 4);
    assert_eq!(driver.read(0, 0, data, 4096), content);
    chain.end();
}

#[test]
fn front_ends_come_and_go() {
    let content = pattern(7, 4096);
    let chain = Chain::express(&content);
    for _ in 0..5 {
        let mut driver = chain.connect(Setup::default());
        read_until_express(&chain, &mut driver, &content, 2);
        drop(driver);
        wait_until("peers go with the front-end", || chain.vmm().peers().0.is_empty().then_some(()));
    }
    chain.end();
}

#[test]
fn drivers_and_vmms_come_and_go() {
    let content = pattern(8, 4096);
    let mut chain = Chain::express(&content);
    for round in 0..4 {
        let mut driver = chain.connect(Setup::default());
        read_until_express(&chain, &mut driver, &content, 2);
        drop(driver);
        let Chain { memory, proxy, guest, backend, vmm } = chain;
        let vmm = if round % 2 == 0 {
            guest.end();
            vmm
        } else {
            // The whole device VM dies, and another one starts.
            drop(vmm);
            guest.kill();
            Some(proxy.express())
        };
        let guest = Guest::start_with(&proxy, &backend.socket, Retry::Forever, vmm.as_ref());
        chain = Chain { memory, proxy, guest, backend, vmm };
    }
    chain.end();
}
