//! Tests of the bridge between a vvu device in this process and a back-end that is the test.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::*;
use crate::device::LinkState;
use crate::driver::{Driver, DriverError};
use crate::event::{StopToken, wait_readable};
use crate::listening_socket::ListeningSocket;
use crate::message_socket::{Message, MessageSocket, SocketError};
use crate::pci::PciDevice;
use crate::pci::PciFunction;
use crate::rig::{Liar, LocalDevice, vvu_device};
use crate::spec::addr::{BarOffset, SiblingGpa, SiblingVa};
use crate::spec::pci::SHARED_MEMORY_BAR;
use crate::spec::vhost_user::{Header, MemoryRegion, memory_table_to_bytes};
use crate::spec::virtio::device_config::{BACKEND_UP, FRONTEND_UP};

const VERSION: u32 = 1;
const REPLY: u32 = 1 | 4;
const NEED_REPLY: u32 = 1 | 8;

/// A running bridge; dropping it stops it and checks how it ended.
struct Harness {
    fake: LocalDevice<Liar>,
    listener: UnixListener,
    stop: StopToken,
    bridge: Option<JoinHandle<Result<(), BridgeError>>>,
    /// The connection that the bridge made before it was ready.
    first: Option<MessageSocket>,
    _directory: TempDir,
}

impl Harness {
    fn new(retry: Retry) -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let socket = directory.path().join("backend");
        let listener = UnixListener::bind(&socket).expect("bind");
        let fake = LocalDevice::liar(4);
        let driver = Driver::new(fake.clone()).expect("bring-up");
        let stop = StopToken::new().expect("token");
        let stopped = stop.clone();
        let (ready, is_ready) = mpsc::channel();
        let bridge = std::thread::spawn(move || {
            let mut bridge = Bridge::new(driver, Options { backend: BackendSocket::Connect(socket), retry });
            bridge.run(&[stopped.as_fd()], || ready.send(()).expect("test waits"))
        });
        assert_eq!(fake.link(), 0, "no front-end before there is a back-end");
        let first = Some(accept(&listener));
        is_ready.recv().expect("ready");
        assert_eq!(fake.link(), BACKEND_UP);
        Self { fake, listener, stop, bridge: Some(bridge), first, _directory: directory }
    }

    /// The connection of the next session.
    fn backend(&mut self) -> MessageSocket {
        self.first.take().unwrap_or_else(|| accept(&self.listener))
    }

    /// Waits for a message that the bridge sent through the device.
    fn sent(&self) -> Vec<u8> {
        within_deadline("a sent message", || self.fake.sent_next())
    }

    fn end(mut self) -> Result<(), BridgeError> {
        self.bridge.take().expect("runs").join().expect("no panic")
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(bridge) = self.bridge.take() {
            let end = bridge.join().expect("no panic");
            // The test's end of the connection may have gone first.
            assert!(matches!(end, Ok(()) | Err(BridgeError::BackendLeft { .. })), "{end:?}");
        }
    }
}

/// Accepts a connection and answers the bridge's question whether anybody is there.
fn accept(listener: &UnixListener) -> MessageSocket {
    wait_for(listener);
    let mut socket = MessageSocket::new(listener.accept().expect("accept").0);
    answer(&mut socket);
    socket
}

/// Answers the bridge's question whether anybody is there.
fn answer(socket: &mut MessageSocket) {
    assert_eq!(receive(socket).expect("question").bytes, message(1, VERSION, &[]));
    socket.send(message(1, REPLY, &[0; 8]), Vec::new()).expect("answer");
}

fn within_deadline<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    for _ in 0..10_000 {
        if let Some(value) = attempt() {
            return value;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    panic!("no {what} within 10 s");
}

fn wait_for(fd: impl AsFd) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let first = wait_readable(&[fd.as_fd()], Some(deadline)).expect("wait");
    assert_eq!(first, Some(0), "nothing to read within 10 s");
}

fn receive(socket: &mut MessageSocket) -> Result<Message, SocketError> {
    loop {
        if let Some(message) = socket.receive()? {
            return Ok(message);
        }
        wait_for(&*socket);
    }
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).expect("small payload");
    Message::new(Header { request, flags, size }, payload).bytes
}

fn inode(fd: impl AsFd) -> u64 {
    rustix::fs::fstat(fd).expect("fstat").st_ino
}

fn signalled(fd: &OwnedFd) -> bool {
    wait_readable(&[fd.as_fd()], Some(Instant::now())).expect("look").is_some()
}

fn take(fd: &OwnedFd) {
    rustix::io::read(fd, &mut [0; 8]).expect("a signalled eventfd");
}

#[test]
fn requests_reach_the_back_end_with_their_descriptors() {
    let mut harness = Harness::new(Retry::Never);
    let mut backend = harness.backend();
    harness.fake.request(1, VERSION, &[]);
    let plain = receive(&mut backend).expect("GET_FEATURES");
    assert_eq!((plain.bytes, plain.fds.len()), (message(1, VERSION, &[]), 0));

    let region = |gpa, offset| MemoryRegion {
        gpa: SiblingGpa(gpa),
        size: 0x1000,
        va: SiblingVa(gpa),
        offset: BarOffset(offset),
    };
    let table = memory_table_to_bytes(&[region(0, 0), region(0x10000, 0x1000)]);
    harness.fake.request(5, VERSION, &table);
    let memory = receive(&mut backend).expect("SET_MEM_TABLE");
    assert_eq!(memory.payload(), table);
    let shared =
        harness.fake.bar_file(SHARED_MEMORY_BAR).expect("file").file.metadata().expect("metadata").ino();
    assert_eq!(memory.fds.iter().map(inode).collect::<Vec<_>>(), [shared, shared]);

    harness.fake.request(12, VERSION, &2u64.to_le_bytes());
    let kick = receive(&mut backend).expect("SET_VRING_KICK").fds.remove(0);
    within_deadline("kick after the hand-over", || signalled(&kick).then_some(()));
    take(&kick);
    harness.fake.interrupt(4);
    assert!(signalled(&kick), "vector 2 + i is the kick of queue i");

    for (request, offset) in [(13, 4 * 2), (14, 4 * (4 + 2))] {
        harness.fake.request(request, VERSION, &2u64.to_le_bytes());
        let event = receive(&mut backend).expect("SET_VRING_CALL or ERR").fds.remove(0);
        rustix::io::write(&event, &1u64.to_ne_bytes()).expect("signal");
        within_deadline("doorbell write", || {
            harness.fake.lock().function.rung.pop_if(|(at, _)| *at == offset)
        });
    }

    harness.fake.request(13, VERSION, &0x101u64.to_le_bytes());
    assert!(receive(&mut backend).expect("no descriptor").fds.is_empty());
}

/// As the BAR of a VFIO device does where the kernel does not let it be mapped from sysfs.
#[test]
fn offsets_count_from_where_the_bar_begins_in_its_file() {
    const BEGIN: u64 = 4 << 40;
    let mut harness = Harness::new(Retry::Never);
    harness.fake.lock().bar_offset = BEGIN;
    let mut backend = harness.backend();
    let region = |offset| MemoryRegion {
        gpa: SiblingGpa(0x1000 + offset),
        size: 0x1000,
        va: SiblingVa(offset),
        offset: BarOffset(offset),
    };
    let moved = |offset| MemoryRegion { offset: BarOffset(offset + BEGIN), ..region(offset) };

    harness.fake.request(5, VERSION, &memory_table_to_bytes(&[region(0), region(0x3000)]));
    let table = receive(&mut backend).expect("SET_MEM_TABLE");
    assert_eq!(table.payload(), memory_table_to_bytes(&[moved(0), moved(0x3000)]));
    let single = |region: MemoryRegion| [&[0; 8], &region.to_bytes()[..]].concat();
    harness.fake.request(37, VERSION, &single(region(0x4000)));
    assert_eq!(receive(&mut backend).expect("ADD_MEM_REG").payload(), single(moved(0x4000)));
    let inflight = |offset: u64| [0x1000u64.to_le_bytes(), offset.to_le_bytes(), [1; 8]].concat();
    harness.fake.request(32, VERSION, &inflight(0x5000));
    assert_eq!(receive(&mut backend).expect("SET_INFLIGHT_FD").payload(), inflight(0x5000 + BEGIN));
    // No file comes with these.
    harness.fake.request(38, VERSION, &single(region(0x4000)));
    assert_eq!(receive(&mut backend).expect("REM_MEM_REG").payload(), single(region(0x4000)));
}

#[test]
fn answers_go_back_and_descriptors_in_them_do_not() {
    let mut harness = Harness::new(Retry::Never);
    let mut backend = harness.backend();
    harness.fake.request(1, VERSION, &[]);
    receive(&mut backend).expect("GET_FEATURES");
    let answer = message(1, REPLY, &7u64.to_le_bytes());
    let extra = harness.listener.as_fd().try_clone_to_owned().expect("dup");
    backend.send(answer.clone(), vec![extra]).expect("send");
    assert_eq!(harness.sent(), answer);
}

#[test]
fn the_back_end_can_ask_the_front_end() {
    let mut harness = Harness::new(Retry::Never);
    let mut backend = harness.backend();
    harness.fake.request(21, VERSION, &[]);
    let stream = receive(&mut backend).expect("SET_BACKEND_REQ_FD").fds.remove(0);
    let mut channel = MessageSocket::new(stream.into());

    let config_change = message(2, NEED_REPLY, &[]);
    channel.send(config_change.clone(), Vec::new()).expect("send");
    assert_eq!(harness.sent(), config_change);
    harness.fake.request(2, REPLY, &0u64.to_le_bytes());
    assert_eq!(receive(&mut channel).expect("answer").bytes, message(2, REPLY, &0u64.to_le_bytes()));

    let fd = harness.listener.as_fd().try_clone_to_owned().expect("dup");
    channel.send(message(9, NEED_REPLY, &[0; 40]), vec![fd]).expect("send");
    assert_eq!(receive(&mut channel).expect("refusal").bytes, message(9, REPLY, &1u64.to_le_bytes()));
    assert!(harness.fake.sent().is_empty());

    // A back-end that closes its channel is still served.
    drop(channel);
    backend.send(message(1, REPLY, &[]), Vec::new()).expect("send");
    assert_eq!(harness.sent(), message(1, REPLY, &[]));
}

#[test]
fn what_cannot_be_carried_is_refused_with_an_answer_or_ends_the_session() {
    let mut harness = Harness::new(Retry::Never);
    let mut backend = harness.backend();
    harness.fake.request(12, NEED_REPLY, &4u64.to_le_bytes());
    assert_eq!(harness.sent(), message(12, REPLY, &1u64.to_le_bytes()));

    harness.fake.request(7, VERSION, &[]);
    assert!(matches!(receive(&mut backend), Err(SocketError::Closed)));
    let mut next = harness.backend();
    within_deadline("link up again", || (harness.fake.link() == BACKEND_UP).then_some(()));
    harness.fake.request(1, VERSION, &[]);
    receive(&mut next).expect("the next front-end is served");
}

#[test]
fn the_next_front_end_gets_a_new_connection() {
    let mut harness = Harness::new(Retry::Never);
    let mut backend = harness.backend();
    harness.fake.set_link(BACKEND_UP | FRONTEND_UP);
    for _ in 0..3 {
        harness.fake.request(3, VERSION, &[]);
        receive(&mut backend).expect("SET_OWNER");
        // As the proxy does it: a mark in the queue, then both bits cleared.
        harness.fake.request(1, VERSION, &[]);
        assert!(harness.fake.deliver(&[]));
        harness.fake.set_link(0);
        receive(&mut backend).expect("what came before the mark is delivered");
        assert!(matches!(receive(&mut backend), Err(SocketError::Closed)));
        backend = harness.backend();
        within_deadline("link up again", || (harness.fake.link() == BACKEND_UP).then_some(()));
    }
}

#[test]
fn a_front_end_that_leaves_without_a_mark_is_noticed() {
    let mut harness = Harness::new(Retry::Never);
    let mut backend = harness.backend();
    harness.fake.request(3, VERSION, &[]);
    receive(&mut backend).expect("SET_OWNER");
    harness.fake.set_link(0);
    assert!(matches!(receive(&mut backend), Err(SocketError::Closed)));
    let _next = harness.backend();
}

#[test]
fn a_front_end_that_sent_nothing_costs_no_connection() {
    let mut harness = Harness::new(Retry::Never);
    let mut backend = harness.backend();
    assert!(harness.fake.deliver(&[]));
    harness.fake.set_link(0);
    within_deadline("link up again", || (harness.fake.link() == BACKEND_UP).then_some(()));
    harness.fake.request(3, VERSION, &[]);
    receive(&mut backend).expect("SET_OWNER on the first connection");
}

#[test]
fn a_back_end_that_hangs_up_ends_the_bridge_or_is_waited_for() {
    let mut harness = Harness::new(Retry::Never);
    let mut backend = harness.backend();
    harness.fake.request(3, VERSION, &[]);
    receive(&mut backend).expect("SET_OWNER");
    let fake = harness.fake.clone();
    drop(backend);
    assert!(matches!(harness.end(), Err(BridgeError::BackendLeft { serving: true, .. })));
    assert_eq!(fake.status(), 0, "the device is reset");

    let mut harness = Harness::new(Retry::Forever);
    let mut backend = harness.backend();
    harness.fake.request(3, VERSION, &[]);
    receive(&mut backend).expect("SET_OWNER");
    drop(backend);
    let mut backend = harness.backend();
    within_deadline("link up again", || (harness.fake.link() == BACKEND_UP).then_some(()));
    harness.fake.request(3, VERSION, &[]);
    receive(&mut backend).expect("SET_OWNER");
}

#[test]
fn a_back_end_that_does_not_read_holds_messages_in_the_device() {
    let mut harness = Harness::new(Retry::Never);
    let mut backend = harness.backend();
    let payload = |i: u32| [&i.to_le_bytes()[..], &[0; 4000]].concat();
    // More than socket buffers hold: the bridge stops taking messages and the receive queue fills.
    let mut count = 0;
    let mut refusals = 0;
    while refusals < 200 {
        if harness.fake.deliver(&message(1000, VERSION, &payload(count))) {
            (count, refusals) = (count + 1, 0);
        } else {
            refusals += 1;
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(count < 10_000, "messages pile up in the bridge");
    }
    for i in 0..count {
        assert_eq!(receive(&mut backend).expect("message").payload()[..4], i.to_le_bytes());
    }
}

#[test]
fn a_device_that_does_not_send_holds_messages_in_the_back_end() {
    let mut harness = Harness::new(Retry::Never);
    let mut backend = harness.backend();
    let mut count = 0u32;
    while count < 64 || !backend.is_congested() {
        let payload = [&count.to_le_bytes()[..], &[0; 4000]].concat();
        backend.send(message(1, REPLY, &payload), Vec::new()).expect("send");
        count += 1;
        assert!(count < 10_000, "messages pile up in the bridge");
    }
    for i in 0..count {
        let got = within_deadline("sent message", || {
            backend.flush().expect("flush");
            harness.fake.sent_next()
        });
        assert_eq!(got[12..16], i.to_le_bytes());
    }
}

#[test]
fn a_device_that_breaks_the_rules_ends_the_bridge() {
    let mut harness = Harness::new(Retry::Forever);
    let _backend = harness.backend();
    let fake = harness.fake.clone();
    assert!(fake.deliver_as(&message(1, VERSION, &[]), 13));
    assert!(matches!(harness.end(), Err(BridgeError::Driver(DriverError::Length { got: 13, want: 12 }))));
    assert_eq!(fake.status(), 0);
}

#[test]
fn a_back_end_that_accepts_and_hangs_up_is_not_used() {
    let directory = tempfile::tempdir().expect("directory");
    let socket = directory.path().join("backend");
    let listener = UnixListener::bind(&socket).expect("bind");
    let fake = LocalDevice::liar(1);
    let driver = Driver::new(fake.clone()).expect("bring-up");
    let stop = StopToken::new().expect("token");
    let stopped = stop.clone();
    let options = Options { backend: BackendSocket::Connect(socket.clone()), retry: Retry::Forever };
    let bridge = std::thread::spawn(move || {
        let mut ready = false;
        let end = Bridge::new(driver, options).run(&[stopped.as_fd()], || ready = true);
        (end, ready)
    });
    // In the backlog of a socket that is closed, and then accepted but not answered.
    wait_for(&listener);
    std::fs::remove_file(&socket).expect("remove");
    drop(listener);
    let listener = UnixListener::bind(&socket).expect("bind");
    wait_for(&listener);
    drop(listener.accept().expect("accept"));
    assert_eq!(fake.link(), 0);
    let mut backend = accept(&listener);
    within_deadline("link up", || (fake.link() == BACKEND_UP).then_some(()));
    fake.request(3, VERSION, &[]);
    receive(&mut backend).expect("SET_OWNER");
    stop.stop();
    let (end, ready) = bridge.join().expect("no panic");
    end.expect("a clean stop");
    assert!(ready);
}

#[test]
fn nobody_listening_is_an_error_that_says_so() {
    let directory = tempfile::tempdir().expect("directory");
    let driver = Driver::new(LocalDevice::liar(1)).expect("bring-up");
    let stop = StopToken::new().expect("token");
    let options =
        Options { backend: BackendSocket::Connect(directory.path().join("none")), retry: Retry::Never };
    let error = Bridge::new(driver, options).run(&[stop.as_fd()], || ()).expect_err("nobody there");
    assert!(error.to_string().contains("start the back-end first"), "{error}");
}

#[test]
fn a_device_that_goes_without_a_word_is_found_out() {
    let harness = Harness::new(Retry::Forever);
    harness.fake.lie(|liar| liar.stick_status(0xff));
    let outcome = harness.end();
    assert!(matches!(outcome, Err(BridgeError::Driver(DriverError::Gone))), "{outcome:?}");
}

#[test]
fn a_device_that_somebody_else_resets_is_found_out() {
    let device = LocalDevice::new(vvu_device(4));
    let driver = Driver::new(device.clone()).expect("bring-up");
    let (sender, streams) = mpsc::channel();
    let options = Options { backend: BackendSocket::Pair(sender), retry: Retry::Forever };
    let stop = StopToken::new().expect("token");
    let bridge = std::thread::spawn(move || Bridge::new(driver, options).run(&[stop.as_fd()], || ()));
    let mut backend = MessageSocket::new(streams.recv().expect("a connection"));
    answer(&mut backend);
    within_deadline("link up", || (device.lock().function.link() == LinkState::Waiting).then_some(()));
    // As a function level reset through sysfs does.
    device.lock().function.reset();
    let outcome = bridge.join().expect("no panic");
    assert!(matches!(outcome, Err(BridgeError::Driver(DriverError::WasReset { .. }))), "{outcome:?}");
}

#[test]
fn a_link_that_goes_down_without_an_interrupt_is_found_out() {
    let mut harness = Harness::new(Retry::Never);
    let mut backend = harness.backend();
    harness.fake.request(3, VERSION, &[]);
    receive(&mut backend).expect("SET_OWNER");
    harness.fake.lie(|liar| liar.link = 0);
    assert!(matches!(receive(&mut backend), Err(SocketError::Closed)));
    let _next = harness.backend();
}

#[test]
fn a_back_end_that_asks_on_the_socket_for_answers_is_disconnected() {
    let mut harness = Harness::new(Retry::Forever);
    let mut backend = harness.backend();
    harness.fake.request(3, VERSION, &[]);
    receive(&mut backend).expect("SET_OWNER");
    backend.send(message(2, NEED_REPLY, &[]), Vec::new()).expect("send");
    assert!(matches!(receive(&mut backend), Err(SocketError::Closed)));
    assert!(harness.fake.sent().is_empty());
    let _next = harness.backend();
}

#[test]
fn a_back_end_that_sends_no_messages_is_disconnected() {
    for bytes in
        [[1, 0, 0, 0, 5, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], [1, 0, 0, 0, 6, 0, 0, 0, 8, 0, 0, 0], [0xff; 12]]
    {
        let mut harness = Harness::new(Retry::Forever);
        let mut backend = harness.backend();
        harness.fake.request(3, VERSION, &[]);
        receive(&mut backend).expect("SET_OWNER");
        backend.send(bytes.to_vec(), Vec::new()).expect("send");
        assert!(matches!(receive(&mut backend), Err(SocketError::Closed)), "{bytes:?}");
        assert!(harness.fake.sent().is_empty());
        let _next = harness.backend();
    }
}

#[test]
fn a_back_end_that_connects_is_served_one_connection_after_the_other() {
    let directory = tempfile::tempdir().expect("directory");
    let socket = directory.path().join("bridge");
    let listening = ListeningSocket::bind(&socket).expect("bind");
    let fake = LocalDevice::liar(1);
    let driver = Driver::new(fake.clone()).expect("bring-up");
    let stop = StopToken::new().expect("token");
    let stopped = stop.clone();
    let options = Options {
        backend: BackendSocket::Listen(listening.listener().try_clone().expect("dup")),
        retry: Retry::Forever,
    };
    let bridge = std::thread::spawn(move || Bridge::new(driver, options).run(&[stopped.as_fd()], || ()));
    for _ in 0..2 {
        let mut backend = MessageSocket::new(UnixStream::connect(&socket).expect("connect"));
        let question = receive(&mut backend).expect("question");
        assert_eq!(question.header.request, 1);
        backend.send(message(1, REPLY, &[0; 8]), Vec::new()).expect("answer");
        within_deadline("link up", || (fake.link() == BACKEND_UP).then_some(()));
        fake.request(3, VERSION, &[]);
        receive(&mut backend).expect("SET_OWNER");
        drop(backend);
        within_deadline("link down", || (fake.link() == 0).then_some(()));
    }
    stop.stop();
    bridge.join().expect("no panic").expect("a clean stop");
}

#[test]
fn a_back_end_that_does_not_come_in_time_is_an_error() {
    let directory = tempfile::tempdir().expect("directory");
    let driver = Driver::new(LocalDevice::liar(1)).expect("bring-up");
    let stop = StopToken::new().expect("token");
    let backend = BackendSocket::Connect(directory.path().join("none"));
    let options = Options { backend, retry: Retry::For(Duration::from_millis(1)) };
    let error = Bridge::new(driver, options).run(&[stop.as_fd()], || ()).expect_err("nobody came");
    assert!(matches!(error, BridgeError::Connect { .. }), "{error}");
}
