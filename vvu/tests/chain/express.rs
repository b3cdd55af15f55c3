//! Notifications of the back-end through the express device.

use vhost::VhostBackend;

use vvu::bridge::Retry;

use crate::chain::{Chain, Guest};
use crate::common::{Driver, Setup, pattern, wait_until};

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
