//! No peer stalls another: whatever the sibling's front-end does with its descriptors, the proxy answers the device VM, and
//! serves the next front-end.
//!
//! Nobody reads the proxy's trace here, and the VMM of the express device reads nothing either.

use std::fs::File;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use vhost::vhost_user::message::{BackendReq, FrontendReq};
use vvu::driver::{Driver, Incoming};
use vvu::message_socket::{Message, MessageSocket};
use vvu::spec::addr::QueueIndex;
use vvu::spec::vhost_user::Header;
use vvu::vfio_user::client::VfioUserDevice;

use crate::common::{DEADLINE, wait_until};
use crate::interceptor::Filter;
use crate::process::Process;
use crate::proxy::{ARGUMENTS, Proxy};

/// What anything may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(1);
/// Seconds for which the kernel waits when it closes a socket with data that nobody reads.
const LINGER: Duration = Duration::from_secs(4);
const READS: usize = 100;

/// The proxy's peers.
struct Peers {
    proxy: Proxy,
    driver: Driver<VfioUserDevice>,
    frontend: MessageSocket,
    /// Descriptors that stay open until the next front-end comes.
    kept: Vec<OwnedFd>,
}

type Stall = fn(&mut Peers);

const STALLS: &[(&str, Stall)] = &[
    ("nothing", |_| {}),
    ("a trace that nobody reads", trace),
    ("answers that nobody reads", answers),
    ("a channel for requests of the back-end that nobody reads", channel),
    ("a socket that lingers", lingering_socket),
    ("a call event that is full, in blocking mode", call_event),
    ("a kick event that is signalled all the time", kick_event),
    ("front-ends that say nothing", silent_frontends),
    ("half a message", half_a_message),
];

#[test]
fn no_front_end_stalls_the_device_vm_or_the_next_front_end() {
    let directory = tempfile::tempdir().expect("directory");
    let trace = directory.path().join("trace");
    mknodat(CWD, &trace, FileType::Fifo, Mode::RWXU, 0).expect("FIFO");
    let reader = rustix::fs::open(&trace, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty());
    let _reader = reader.expect("FIFO");
    let mut process = Process::start(Filter::One(libc::SYS_reboot), directory.path(), ARGUMENTS, |_| {});
    assert!(process.wait_ready(), "{}", process.errors());
    let proxy = Proxy::of(process, directory);
    let _vmm = UnixStream::connect(proxy.path("express")).expect("express");
    let driver = Driver::new(VfioUserDevice::connect(&proxy.path("vmm")).expect("proxy")).expect("device");
    let frontend = MessageSocket::new(UnixStream::connect(proxy.path("sibling")).expect("proxy"));
    let mut peers = Peers { proxy, driver, frontend, kept: Vec::new() };
    let mut bound = PATIENCE;
    for (name, stall) in STALLS {
        peers.await_frontend(name);
        stall(&mut peers);
        let slowest = peers.slowest_read();
        assert!(slowest < bound, "{name}: a register read took {slowest:?}, where {bound:?} are allowed");
        // The first one is an idle proxy.
        bound = bound.max(10 * slowest);
        peers.kept.clear();
        let next = MessageSocket::new(UnixStream::connect(peers.proxy.path("sibling")).expect("proxy"));
        drop(std::mem::replace(&mut peers.frontend, next));
    }
    peers.await_frontend("the end");
    let Peers { proxy, driver, .. } = peers;
    drop(driver);
    proxy.process.stop();
}

fn request(code: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).expect("small");
    Message::new(Header { request: code, flags: 1, size }, payload).bytes
}

impl Peers {
    /// Lets a front-end connect, and waits until a message of the newest one arrives. Earlier ones may come before.
    fn await_frontend(&mut self, name: &str) {
        let begun = Instant::now();
        self.frontend.send(request(FrontendReq::SET_OWNER as u32, &[]), Vec::new()).expect("send");
        loop {
            assert!(begun.elapsed() < DEADLINE, "before {name}: no front-end: {}", self.proxy.errors());
            if !self.driver.link().expect("link").backend_up {
                self.driver.set_backend_up(true).expect("link");
            }
            match self.driver.receive().expect("receive") {
                Some(Incoming::Message(message))
                    if message.header.request == FrontendReq::SET_OWNER as u32 =>
                {
                    return;
                }
                _ => std::thread::yield_now(),
            }
        }
    }

    /// The longest of many reads of a register.
    fn slowest_read(&self) -> Duration {
        let read = |_| {
            let begun = Instant::now();
            self.driver.link().expect("link");
            begun.elapsed()
        };
        (0..READS).map(read).max().expect("reads")
    }

    fn send(&mut self, code: FrontendReq, payload: &[u8], fds: Vec<OwnedFd>) {
        self.frontend.send(request(code as u32, payload), fds).expect("send");
    }

    /// The next message of the front-end, as the device VM gets it.
    fn receive(&mut self) -> Message {
        wait_until("a message arrives", || match self.driver.receive().expect("receive") {
            Some(Incoming::Message(message)) => Some(message),
            _ => None,
        })
    }
}

/// More messages than the pipe and the queue of the trace hold.
fn trace(peers: &mut Peers) {
    for _ in 0..2000 {
        peers.send(FrontendReq::SET_OWNER, &[], Vec::new());
        peers.receive();
    }
}

/// The device VM answers more than the socket holds.
fn answers(peers: &mut Peers) {
    const BYTES: u32 = 4000;
    for _ in 0..64 {
        let payload = [&[0; 4][..], &(BYTES - 12).to_le_bytes(), &[0; BYTES as usize - 8]].concat();
        peers.send(FrontendReq::GET_CONFIG, &payload, Vec::new());
        let asked = peers.receive();
        let answer = Message::new(asked.header.reply(BYTES), &payload);
        // There is no room once the proxy takes no more.
        if !peers.driver.send(&answer.bytes).expect("send") {
            return;
        }
    }
}

fn channel(peers: &mut Peers) {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    peers.send(FrontendReq::SET_BACKEND_REQ_FD, &[], vec![theirs.into()]);
    peers.receive();
    peers.kept.push(ours.into());
    let change = request(BackendReq::CONFIG_CHANGE_MSG as u32, &[]);
    for _ in 0..20_000 {
        if !peers.driver.send(&change).expect("send") {
            return;
        }
    }
}

/// The proxy refuses the socket as memory, and is the last one who has it.
fn lingering_socket(peers: &mut Peers) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listener");
    let mut socket = TcpStream::connect(listener.local_addr().expect("address")).expect("connection");
    let (unread, _) = listener.accept().expect("connection");
    socket.set_nonblocking(true).expect("non-blocking");
    while socket.write(&[0; 65536]).is_ok() {}
    socket.set_nonblocking(false).expect("blocking");
    rustix::net::sockopt::set_socket_linger(&socket, Some(LINGER)).expect("linger");
    let mut table = vec![0; 40];
    (table[0], table[18]) = (1, 1);
    peers.send(FrontendReq::SET_MEM_TABLE, &table, vec![socket.into()]);
    peers.kept.push(unread.into());
    peers.frontend.send(request(FrontendReq::GET_FEATURES as u32, &[]), Vec::new()).ok();
}

fn call_event(peers: &mut Peers) {
    let call = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).expect("fill");
    peers.send(FrontendReq::SET_VRING_CALL, &[0; 8], vec![call.try_clone().expect("dup")]);
    peers.receive();
    peers.kept.push(call);
    for _ in 0..10 {
        peers.driver.call(QueueIndex(0)).expect("queue").signal();
    }
}

fn kick_event(peers: &mut Peers) {
    let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd");
    peers.send(FrontendReq::SET_VRING_KICK, &[0; 8], vec![kick.try_clone().expect("dup")]);
    peers.receive();
    let mut file = File::from(kick.try_clone().expect("dup"));
    std::thread::spawn(move || {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(300) && file.write(&1u64.to_ne_bytes()).is_ok() {}
    });
    peers.kept.push(kick);
}

/// They come and go before the next one that is served.
fn silent_frontends(peers: &mut Peers) {
    for _ in 0..4 {
        let silent = UnixStream::connect(peers.proxy.path("sibling")).expect("backlog");
        peers.kept.push(silent.into());
    }
}

fn half_a_message(peers: &mut Peers) {
    let whole = request(FrontendReq::SET_FEATURES as u32, &[0; 8]);
    let (first, _) = whole.split_at(15);
    peers.frontend.send(first.to_vec(), Vec::new()).expect("send");
}
