use super::*;
use crate::backend::chain::Segments;
use crate::backend::device::Device;
use crate::backend::engine::{Engine, Finished};
use crate::backend::queue::Taken;
use crate::event::Event;
use crate::message_socket::{Message, MessageSocket, SocketError};
use rustix::event::{EventfdFlags, eventfd};
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as Protocol};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const NEED_REPLY: u32 = 1 << 3;
const QUEUES: u16 = 2;
/// Bytes of guest memory, which starts at guest address 0 and at this address in the front-end.
const MEMORY: usize = 1 << 20;
const USER: u64 = 0x7000_0000;

/// Copies what it reads to what it writes.
#[derive(Default)]
struct Echo {
    features: AtomicU64,
}

impl Device for Echo {
    fn queues(&self) -> u16 {
        QUEUES
    }

    fn features(&self) -> u64 {
        1
    }

    fn descriptors_max(&self) -> u16 {
        2
    }

    fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::SeqCst);
    }

    fn config(&self, offset: u32, size: u32) -> Vec<u8> {
        (0..8).skip(offset as usize).take(size as usize).collect()
    }

    fn engine(self: Arc<Self>, _wake_up: &Arc<Event>) -> io::Result<Box<dyn Engine>> {
        Ok(Box::new(Copies))
    }
}

#[derive(Debug)]
struct Copies;

impl Engine for Copies {
    fn begin(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        Taken { head, chain }: Taken,
        announce: &mut dyn FnMut(),
    ) -> Option<Finished> {
        announce();
        let copy = |readable: &Segments, writable: &Segments| {
            let mut bytes = vec![0; usize::try_from(readable.len()).ok()?];
            readable.read(memory, &mut bytes).ok()?;
            writable.write(memory, &bytes).ok()
        };
        let copied = copy(&chain.readable, &chain.writable).unwrap_or(0);
        Some(Finished { head, written: u32::try_from(copied).expect("small"), size: chain.len() })
    }
}

/// A front-end, and the thread that serves it.
struct Rig {
    frontend: MessageSocket,
    device: Arc<Echo>,
    stop: StopToken,
    server: std::thread::JoinHandle<()>,
}

impl Rig {
    fn new() -> Self {
        let (frontend, stream) = UnixStream::pair().expect("pair");
        let (device, stop) = (Arc::new(Echo::default()), StopToken::new().expect("token"));
        let handler = Handler::new(device.clone(), Duration::ZERO);
        let token = stop.clone();
        let server = std::thread::spawn(move || serve_frontend(stream, &token, handler, || {}));
        Self { frontend: MessageSocket::new(frontend), device, stop, server }
    }

    fn send(&mut self, request: FrontendReq, flags: u32, payload: &[u8], fds: Vec<OwnedFd>) {
        self.frontend.send(message(request, flags, payload), fds).expect("send");
    }

    fn ask(&mut self, request: FrontendReq, payload: &[u8]) -> Message {
        self.send(request, 0, payload, vec![]);
        self.answer().expect("answer")
    }

    fn answer(&mut self) -> Result<Message, SocketError> {
        let deadline = Some(Instant::now() + Duration::from_secs(20));
        loop {
            if let Some(message) = self.frontend.receive()? {
                return Ok(message);
            }
            assert_eq!(
                wait_readable(&[self.frontend.as_fd()], deadline).expect("poll"),
                Some(0),
                "no answer"
            );
        }
    }

    /// Negotiates protocol features.
    fn accept(&mut self, features: Protocol) {
        let virtio = self.ask(FrontendReq::GET_FEATURES, &[]).payload().to_vec();
        self.send(FrontendReq::SET_FEATURES, 0, &virtio, vec![]);
        self.send(FrontendReq::SET_PROTOCOL_FEATURES, 0, &features.bits().to_le_bytes(), vec![]);
    }

    fn is_disconnected(&mut self) -> bool {
        matches!(self.answer(), Err(SocketError::Closed))
    }

    fn end(self) {
        drop(self.frontend);
        self.server.join().expect("served");
    }
}

fn message(request: FrontendReq, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).expect("size");
    Message::new(Header { request: request as u32, flags: 1 | flags, size }, payload).bytes
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd")
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// An index and a number, as many requests have them.
fn state(index: u32, number: u32) -> Vec<u8> {
    [index.to_le_bytes(), number.to_le_bytes()].concat()
}

/// Guest memory as the guest sees it, and the file it is in.
fn memory() -> (GuestMemoryMmap, File) {
    let file = tempfile::tempfile().expect("file");
    file.set_len(MEMORY as u64).expect("size");
    let part = FileOffset::new(file.try_clone().expect("descriptor"), 0);
    let range = (GuestAddress(0), MEMORY, Some(part));
    (GuestMemoryMmap::from_ranges_with_files([range]).expect("mapping"), file)
}

#[test]
fn another_device_is_served_by_the_same_engine() {
    const TABLE: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;
    let (memory, file) = memory();
    let mut rig = Rig::new();
    rig.accept(Protocol::MQ | Protocol::CONFIG);
    let table = words(&[1, 0, MEMORY as u64, USER, 0]);
    rig.send(FrontendReq::SET_MEM_TABLE, 0, &table, vec![file.into()]);
    rig.send(FrontendReq::SET_VRING_NUM, 0, &state(1, 4), vec![]);
    rig.send(FrontendReq::SET_VRING_BASE, 0, &state(1, 0), vec![]);
    let addresses = [1, USER + TABLE, USER + USED, USER + AVAILABLE, 0];
    rig.send(FrontendReq::SET_VRING_ADDR, 0, &words(&addresses), vec![]);
    let (call, kick) = (event(), event());
    let call_end = call.try_clone().expect("descriptor");
    rig.send(FrontendReq::SET_VRING_CALL, 0, &words(&[1]), vec![call_end]);
    rig.send(FrontendReq::SET_VRING_KICK, 0, &words(&[1]), vec![kick.try_clone().expect("descriptor")]);
    rig.send(FrontendReq::SET_VRING_ENABLE, 0, &state(1, 1), vec![]);

    // Two requests of one readable and one writable descriptor, 8 bytes each.
    for request in 0..2u64 {
        let (first, data) = (2 * request, 0x8000 + 0x100 * request);
        let descriptor = |flags: u64, next: u64| 8 | flags << 32 | next << 48;
        let chain = [data, descriptor(1, first + 1), data + 16, descriptor(2, 0)];
        memory.write_slice(&words(&chain), GuestAddress(TABLE + 16 * first)).expect("descriptors");
        memory
            .write_slice(&[7 + u8::try_from(request).expect("small"); 8], GuestAddress(data))
            .expect("data");
        let head = u16::try_from(first).expect("small");
        memory.write_obj(head, GuestAddress(AVAILABLE + 4 + 2 * request)).expect("available");
    }
    memory.store(2u16, GuestAddress(AVAILABLE + 2), Ordering::Release).expect("index");
    rustix::io::write(&kick, &1u64.to_ne_bytes()).expect("kick");
    let deadline = Instant::now() + Duration::from_secs(20);
    while memory.load::<u16>(GuestAddress(USED + 2), Ordering::Acquire).expect("used") != 2 {
        assert!(Instant::now() < deadline, "two requests are not done in time");
        std::thread::yield_now();
    }
    assert_eq!(wait_readable(&[call.as_fd()], Some(deadline)).expect("poll"), Some(0), "no call in time");
    for request in 0..2u64 {
        let used: [u32; 2] = memory.read_obj(GuestAddress(USED + 4 + 8 * request)).expect("used");
        assert_eq!(used, [2 * u32::try_from(request).expect("small"), 8]);
        let data: [u8; 8] = memory.read_obj(GuestAddress(0x8010 + 0x100 * request)).expect("data");
        assert_eq!(data, [7 + u8::try_from(request).expect("small"); 8]);
    }
    let base = rig.ask(FrontendReq::GET_VRING_BASE, &state(1, 0));
    assert_eq!(base.payload(), state(1, 2));
    assert_ne!(rig.device.features.load(Ordering::SeqCst), 0);
    rig.end();
}

#[test]
fn a_message_may_arrive_in_pieces() {
    let (mut frontend, stream) = UnixStream::pair().expect("pair");
    let stop = StopToken::new().expect("token");
    let handler = Handler::new(Arc::new(Echo::default()), Duration::ZERO);
    let server = std::thread::spawn(move || serve_frontend(stream, &stop, handler, || {}));
    let features = words(&[Protocol::CONFIG.bits()]);
    let config = [&state(2, 3)[..], &[0; 7]].concat();
    let stream = [
        message(FrontendReq::SET_PROTOCOL_FEATURES, 0, &features),
        message(FrontendReq::GET_CONFIG, 0, &config),
    ];
    for byte in stream.concat() {
        frontend.write_all(&[byte]).expect("write");
    }
    let mut frontend = MessageSocket::new(frontend);
    let answer = loop {
        if let Some(answer) = frontend.receive().expect("connection") {
            break answer;
        }
        let deadline = Some(Instant::now() + Duration::from_secs(20));
        assert_eq!(wait_readable(&[frontend.as_fd()], deadline).expect("poll"), Some(0), "no answer");
    };
    assert_eq!(answer.payload()[12..], [2, 3, 4]);
    drop(frontend);
    server.join().expect("served");
}

#[test]
fn a_region_is_made_and_handed_back() {
    let mut rig = Rig::new();
    rig.accept(Protocol::INFLIGHT_SHMFD | Protocol::REPLY_ACK);
    let mut wanted = [0; 24];
    (wanted[16], wanted[18]) = (2, 128);
    let mut region = rig.ask(FrontendReq::GET_INFLIGHT_FD, &wanted);
    assert_eq!((region.header.request, region.header.flags, region.fds.len()), (31, 5, 1));
    let fds = std::mem::take(&mut region.fds);
    rig.send(FrontendReq::SET_INFLIGHT_FD, NEED_REPLY, region.payload(), fds);
    assert_eq!(rig.answer().expect("answer").payload(), [0; 8]);

    // Nothing is offered for queues that the device does not have.
    wanted[16] = 3;
    let nothing = rig.ask(FrontendReq::GET_INFLIGHT_FD, &wanted);
    assert_eq!(nothing.payload()[..20], [0; 20]);

    // A region that cannot be used is refused, and the front-end disconnected.
    rig.send(FrontendReq::SET_INFLIGHT_FD, NEED_REPLY, region.payload(), vec![event()]);
    assert_eq!(rig.answer().expect("answer").payload(), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert!(rig.is_disconnected());
    rig.end();
}

#[test]
fn messages_of_a_feature_that_was_not_accepted_are_refused() {
    for request in [FrontendReq::GET_INFLIGHT_FD, FrontendReq::SET_INFLIGHT_FD] {
        let mut rig = Rig::new();
        rig.send(request, 0, &[1; 24], vec![]);
        assert!(rig.is_disconnected(), "{request:?}");
        rig.end();
    }
}

#[test]
fn a_stop_ends_the_connection_and_so_does_the_front_end() {
    let mut rig = Rig::new();
    rig.ask(FrontendReq::GET_FEATURES, &[]);
    rig.stop.stop();
    assert!(rig.is_disconnected());
    rig.end();

    let mut rig = Rig::new();
    rig.ask(FrontendReq::GET_FEATURES, &[]);
    rig.end();
}

#[test]
fn a_front_end_that_stops_half_way_through_a_message_is_no_obstacle_to_a_stop() {
    for part in [5, 12, 15] {
        let mut rig = Rig::new();
        let bytes = message(FrontendReq::SET_FEATURES, 0, &[0; 8])[..part].to_vec();
        rig.frontend.send(bytes, vec![]).expect("send");
        rig.stop.stop();
        assert!(rig.is_disconnected());
        rig.end();
    }
}

/// The socket is full of answers, and a further one would have to wait for the front-end.
#[test]
fn a_front_end_that_reads_no_answers_is_no_obstacle_to_a_stop() {
    let mut rig = Rig::new();
    while !rig.frontend.is_congested() {
        rig.send(FrontendReq::GET_FEATURES, 0, &[], vec![]);
    }
    rig.stop.stop();
    rig.server.join().expect("served");
}

#[test]
fn more_descriptors_than_any_message_has_end_the_connection() {
    let mut rig = Rig::new();
    let events: Vec<_> = (0..33).map(|_| event()).collect();
    let borrowed: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(33))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&borrowed)));
    let bytes = message(FrontendReq::SET_VRING_CALL, 0, &[0; 8]);
    let flags = rustix::net::SendFlags::empty();
    rustix::net::sendmsg(&rig.frontend, &[std::io::IoSlice::new(&bytes)], &mut control, flags).expect("send");
    assert!(rig.is_disconnected());
    rig.end();
}

#[test]
fn what_is_no_message_ends_the_connection() {
    for bytes in [[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x80], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]] {
        let mut rig = Rig::new();
        rig.frontend.send(bytes.to_vec(), vec![]).expect("send");
        assert!(rig.is_disconnected(), "{bytes:?}");
        rig.end();
    }
}
