//! Parts that leave, fail and come back.

use vvu::bridge::{BridgeError, Retry};

use crate::chain::{Chain, FLAT, Guest};
use crate::common::{Driver, Setup, pattern};

#[test]
fn front_ends_come_and_go() {
    let content = pattern(1, 4096);
    let chain = Chain::start(&FLAT, &content);
    let data = Driver::buffers(&chain.memory, 4);
    for round in 0..8 {
        let mut driver = chain.connect(Setup { queues: 1 + round % 4, ..Setup::default() });
        assert_eq!(driver.read(round % 4 % (1 + round % 4), 0, data, 4096), content, "round {round}");
        // Half of them leave in an orderly way.
        if round % 2 == 0 {
            use vhost::VhostBackend;
            driver.frontend.get_vring_base(0).expect("stopped");
        }
    }
    chain.end();
}

/// One that leaves in the middle of a message or of its setup.
#[test]
fn front_ends_leave_at_any_point() {
    use std::io::Write;
    let content = pattern(2, 4096);
    let chain = Chain::start(&FLAT, &content);
    let data = Driver::buffers(&chain.memory, 4);
    for bytes in [&[][..], &[1], &[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0], &[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 1]]
    {
        let mut stream = std::os::unix::net::UnixStream::connect(chain.proxy.vhost_user()).expect("proxy");
        stream.write_all(bytes).expect("part of a message");
        drop(stream);
        let setup = Setup::default();
        drop(Driver::negotiate(&chain.proxy.vhost_user(), &chain.memory, setup).expect("negotiation"));
    }
    assert_eq!(chain.connect(Setup::default()).read(0, 0, data, 4096), content);
    chain.end();
}

#[test]
fn a_second_front_end_waits_for_the_first_to_leave() {
    let content = pattern(3, 4096);
    let chain = Chain::start(&FLAT, &content);
    let data = Driver::buffers(&chain.memory, 4);
    let mut first = chain.connect(Setup::default());
    let socket = chain.proxy.vhost_user();
    let waiting = std::os::unix::net::UnixStream::connect(&socket).expect("backlog");
    assert_eq!(first.read(0, 0, data, 4096), content);
    drop(first);
    drop(waiting);
    assert_eq!(chain.connect(Setup::default()).read(0, 0, data, 4096), content);
    chain.end();
}

/// The bridge stays and finds the new back-end; the front-end sees its connection end and comes again.
#[test]
fn the_back_end_restarts() {
    let content = pattern(4, 4096);
    let mut chain = Chain::start(&FLAT, &content);
    let data = Driver::buffers(&chain.memory, 4);
    for _ in 0..3 {
        let mut driver = chain.connect(Setup::default());
        assert_eq!(driver.read(0, 0, data, 4096), content);
        chain.backend.restart();
        driver.wait_disconnected();
    }
    assert_eq!(chain.connect(Setup::default()).read(0, 0, data, 4096), content);
    chain.end();
}

#[test]
fn a_bridge_that_is_not_to_wait_ends_with_its_back_end() {
    let content = pattern(5, 4096);
    let Chain { memory, proxy, guest, mut backend, .. } = Chain::start(&FLAT, &content);
    guest.end();
    let guest = Guest::start(&proxy, &backend.socket, Retry::Never);
    let mut driver = Driver::connect(&proxy.vhost_user(), &memory, Setup::default()).expect("connection");
    let data = Driver::buffers(&memory, 4);
    assert_eq!(driver.read(0, 0, data, 4096), content);
    backend.restart();
    driver.wait_disconnected();
    let outcome = guest.outcome();
    assert!(matches!(outcome, Err(BridgeError::BackendLeft { serving: true, .. })), "{outcome:?}");
    backend.end();
    proxy.end();
}

/// Bridge and back-end end while a front-end is connected, and new ones come.
#[test]
fn the_device_vm_program_restarts() {
    let content = pattern(6, 4096);
    let Chain { memory, proxy, mut guest, mut backend, .. } = Chain::start(&FLAT, &content);
    let data = Driver::buffers(&memory, 4);
    for _ in 0..3 {
        let mut driver = Driver::connect_persistently(&proxy.vhost_user(), &memory, Setup::default());
        assert_eq!(driver.read(0, 0, data, 4096), content);
        guest.end();
        driver.wait_disconnected();
        backend.restart();
        guest = Guest::start(&proxy, &backend.socket, Retry::Forever);
    }
    let mut driver = Driver::connect_persistently(&proxy.vhost_user(), &memory, Setup::default());
    assert_eq!(driver.read(0, 0, data, 4096), content);
    guest.end();
    backend.end();
    proxy.end();
}

/// The connection between VMM and proxy is cut, as when the device VM's VMM is killed.
#[test]
fn the_device_vm_is_killed() {
    let content = pattern(7, 4096);
    let Chain { memory, proxy, mut guest, backend, .. } = Chain::start(&FLAT, &content);
    let data = Driver::buffers(&memory, 4);
    for _ in 0..3 {
        let mut driver = Driver::connect_persistently(
            &proxy.vhost_user(),
            &memory,
            Setup { queues: 2, ..Setup::default() },
        );
        assert_eq!(driver.read(1, 0, data, 4096), content);
        guest.kill();
        driver.wait_disconnected();
        guest = Guest::start(&proxy, &backend.socket, Retry::Forever);
    }
    let mut driver = Driver::connect_persistently(&proxy.vhost_user(), &memory, Setup::default());
    assert_eq!(driver.read(0, 0, data, 4096), content);
    guest.end();
    backend.end();
    proxy.end();
}

/// A front-end that comes before the device VM is up is served as soon as it is.
#[test]
fn the_front_end_comes_first() {
    use crate::chain::Proxy;
    use crate::common::{Backend, Task};
    use std::sync::Arc;
    let content = pattern(8, 4096);
    let proxy = Proxy::start(8 << 20, 4);
    let memory = Arc::new(proxy.memory(&FLAT));
    let (socket, sibling) = (proxy.vhost_user(), memory.clone());
    let (sender, connected) = std::sync::mpsc::channel();
    let early = Task::spawn("front-end", move || {
        sender.send(std::os::unix::net::UnixStream::connect(&socket).expect("proxy")).expect("test");
        let mut driver = Driver::connect(&socket, &sibling, Setup::default()).expect("connection");
        driver.read(0, 0, Driver::buffers(&sibling, 4), 4096)
    });
    drop(connected.recv_timeout(crate::common::DEADLINE).expect("a connection"));
    let backend = Backend::start(&content, |_| {});
    let guest = Guest::start(&proxy, &backend.socket, Retry::Forever);
    assert_eq!(early.join(), content);
    guest.end();
    backend.end();
    proxy.end();
}
