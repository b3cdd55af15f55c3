use super::*;
use crate::backend::inflight::Limits;
use crate::message_socket::Message;
use crate::spec::vhost_user::Header;
use rustix::event::{EventfdFlags, eventfd};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};

const NEED_REPLY: u32 = 1 << 3;

/// Both ends of a relay that runs in a thread.
struct Bench {
    frontend: MessageSocket,
    backend: MessageSocket,
    stop: OwnedFd,
    relay: std::thread::JoinHandle<End>,
}

impl Bench {
    fn new() -> Self {
        let (frontend, outer) = UnixStream::pair().expect("pair");
        let (backend, inner) = UnixStream::pair().expect("pair");
        let stop = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
        let stopped = stop.try_clone().expect("descriptor");
        let relay = std::thread::spawn(move || {
            let inflight = Inflight::new(Limits { queues: 2, queue_size: 256 });
            relay(outer, inner, &inflight, stopped.as_fd())
        });
        Self { frontend: MessageSocket::new(frontend), backend: MessageSocket::new(backend), stop, relay }
    }

    fn ask(&mut self, request: FrontendReq, flags: u32, payload: &[u8], fds: Vec<OwnedFd>) {
        let size = u32::try_from(payload.len()).expect("size");
        let message = Message::new(Header { request: request as u32, flags: 1 | flags, size }, payload);
        self.frontend.send(message.bytes, fds).expect("send");
    }

    fn accept(&mut self, features: VhostUserProtocolFeatures) {
        self.ask(FrontendReq::SET_PROTOCOL_FEATURES, 0, &features.bits().to_le_bytes(), vec![]);
        let seen = await_message(&mut self.backend).expect("features");
        assert_eq!(seen.payload(), features.bits().to_le_bytes());
    }

    fn end(self) -> End {
        drop((self.frontend, self.backend));
        self.relay.join().expect("relay")
    }
}

fn await_message(socket: &mut MessageSocket) -> Result<Message, SocketError> {
    loop {
        if let Some(message) = socket.receive()? {
            return Ok(message);
        }
        let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&limit)).expect("poll");
        assert_eq!(ready, 1, "no message in time");
    }
}

#[test]
fn messages_pass_with_their_descriptors_in_both_directions() {
    let mut bench = Bench::new();
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    bench.ask(FrontendReq::SET_VRING_KICK, 0, &[0; 8], vec![event]);
    let kick = await_message(&mut bench.backend).expect("kick");
    assert_eq!((kick.header.request, kick.payload(), kick.fds.len()), (12, &[0; 8][..], 1));
    bench.backend.send(kick.bytes, kick.fds).expect("send");
    let answer = await_message(&mut bench.frontend).expect("answer");
    assert_eq!((answer.header.request, answer.fds.len()), (12, 1));
    assert!(matches!(bench.end(), End::Left(SocketError::Closed) | End::Closed));
}

#[test]
fn a_region_is_made_and_handed_back() {
    let mut bench = Bench::new();
    bench.accept(VhostUserProtocolFeatures::INFLIGHT_SHMFD | VhostUserProtocolFeatures::REPLY_ACK);
    let mut wanted = [0; 24];
    (wanted[16], wanted[18]) = (2, 128);
    bench.ask(FrontendReq::GET_INFLIGHT_FD, 0, &wanted, vec![]);
    let mut region = await_message(&mut bench.frontend).expect("region");
    assert_eq!((region.header.request, region.header.flags, region.fds.len()), (31, 5, 1));
    let fds = std::mem::take(&mut region.fds);
    bench.ask(FrontendReq::SET_INFLIGHT_FD, NEED_REPLY, region.payload(), fds);
    assert_eq!(await_message(&mut bench.frontend).expect("answer").payload(), [0; 8]);

    // Nothing is offered for rings that the device does not have.
    wanted[16] = 3;
    bench.ask(FrontendReq::GET_INFLIGHT_FD, 0, &wanted, vec![]);
    let nothing = await_message(&mut bench.frontend).expect("answer");
    assert_eq!((nothing.payload(), nothing.fds.len()), (&[0; 24][..], 0));

    // What cannot be used is refused; who did not ask for an answer is disconnected.
    let event = || eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    bench.ask(FrontendReq::SET_INFLIGHT_FD, NEED_REPLY, region.payload(), vec![event()]);
    assert_eq!(await_message(&mut bench.frontend).expect("answer").payload(), [1, 0, 0, 0, 0, 0, 0, 0]);
    bench.ask(FrontendReq::SET_INFLIGHT_FD, 0, region.payload(), vec![event()]);
    assert!(matches!(await_message(&mut bench.frontend), Err(SocketError::Closed)));
    assert!(matches!(await_message(&mut bench.backend), Err(SocketError::Closed)), "it saw none of this");
    assert!(matches!(bench.end(), End::Refused(RegionError::CanShrink)));
}

#[test]
fn without_the_feature_its_messages_are_left_to_the_back_end() {
    let mut bench = Bench::new();
    for request in [FrontendReq::GET_INFLIGHT_FD, FrontendReq::SET_INFLIGHT_FD] {
        bench.ask(request, 0, &[0; 24], vec![]);
        assert_eq!(await_message(&mut bench.backend).expect("message").header.request, request as u32);
    }
    bench.end();
}

#[test]
fn either_side_and_the_order_to_stop_end_it() {
    let bench = Bench::new();
    rustix::io::write(&bench.stop, &1u64.to_ne_bytes()).expect("stop");
    assert!(matches!(bench.relay.join().expect("relay"), End::Stopped));

    let Bench { frontend, backend, relay, .. } = Bench::new();
    drop(backend);
    assert!(matches!(relay.join().expect("relay"), End::Closed));
    drop(frontend);
}

#[test]
fn what_is_no_message_ends_it() {
    let (mut frontend, outer) = UnixStream::pair().expect("pair");
    let (_backend, inner) = UnixStream::pair().expect("pair");
    let stop = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    frontend.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x80]).expect("write");
    let inflight = Inflight::new(Limits { queues: 1, queue_size: 256 });
    let end = relay(outer, inner, &inflight, stop.as_fd());
    assert!(matches!(end, End::Left(SocketError::Message(_))), "{end:?}");
}
