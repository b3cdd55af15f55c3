//! The device as a whole, between a driver played by the test and a front-end played by the test.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::device::SiblingMemory;
use crate::device::rig::{BAR0, BAR2, BUFFER, QUEUE_SIZE, Rig};
use crate::message_socket::{Message, MessageSocket};
use crate::spec::pci::{self, Region};
use crate::spec::vhost_user::{BackendReq, FrontendReq, HEADER_SIZE, Header};
use crate::spec::virtio::{common, device_config, feature, status};

fn request(request: FrontendReq, flags: u32, payload: &[u8]) -> Message {
    let size = u32::try_from(payload.len()).expect("small");
    Message::new(Header { request: request as u32, flags: 1 | flags, size }, payload)
}

const NEED_REPLY: u32 = 8;
const REPLY_ACK: u64 = 8;

#[test]
fn a_front_end_that_comes_first_waits_and_is_told_nothing() {
    let mut rig = Rig::new();
    let mut frontend = rig.connect();
    frontend.send(request(FrontendReq::GET_FEATURES, 0, &[]).bytes, vec![]).expect("send");
    rig.process();
    assert_eq!(rig.device.link(), LinkState::Down);
    rig.bring_up(feature::OFFERED);
    assert_eq!(rig.device.link(), LinkState::Connected);
    assert_eq!(rig.link_status(), device_config::BACKEND_UP | device_config::FRONTEND_UP);
    assert_eq!(rig.used(0).expect("relayed")[..4], [1, 0, 0, 0]);
}

#[test]
fn messages_are_relayed_both_ways_and_queries_are_answered() {
    let mut rig = Rig::new();
    rig.bring_up(feature::VERSION_1);
    let mut frontend = rig.connect();
    frontend.send(request(FrontendReq::GET_FEATURES, 0, &[]).bytes, vec![]).expect("send");
    rig.process();
    let relayed = rig.used(0).expect("relayed");
    let header = Header::parse(&relayed).expect("header");
    rig.send(&Message::new(header.reply(8), &u64::MAX.to_le_bytes()));
    let reply = frontend.receive().expect("receive").expect("complete");
    assert_eq!(reply.payload(), (!(1u64 << 26)).to_le_bytes());
    assert_eq!(rig.used(1).expect("completed").len(), 0);
    assert_eq!(*rig.host.signals.borrow(), [0, 0, 1]);
}

#[test]
fn an_answer_that_nobody_asked_for_is_dropped() {
    let mut rig = Rig::new();
    rig.bring_up(feature::VERSION_1);
    let mut frontend = rig.connect();
    rig.send(&Message::new(Header { request: 1, flags: 5, size: 8 }, &[0; 8]));
    rig.process();
    assert!(frontend.receive().expect("receive").is_none());
    assert_eq!(rig.device.link(), LinkState::Connected);
}

#[test]
fn what_was_meant_for_the_last_front_end_does_not_reach_the_next() {
    let mut rig = Rig::new();
    rig.bring_up(feature::OFFERED);
    drop(rig.connect());
    rig.process();
    assert_eq!(rig.device.link(), LinkState::Down);
    let late = Message::new(Header { request: 1, flags: 5, size: 8 }, &[0; 8]);
    rig.offer(1, &late.bytes, 0);
    rig.backend_up();
    assert_eq!(rig.used(1), Some(vec![]));
    let mut frontend = rig.connect();
    frontend.send(request(FrontendReq::GET_FEATURES, 0, &[]).bytes, vec![]).expect("send");
    rig.process();
    assert!(frontend.receive().expect("receive").is_none());
}

#[test]
fn the_end_of_a_session_is_marked_and_the_next_one_served() {
    let mut rig = Rig::new();
    rig.bring_up(feature::OFFERED);
    for _ in 0..20 {
        let mut frontend = rig.connect();
        frontend.send(request(FrontendReq::SET_OWNER, 0, &[]).bytes, vec![]).expect("send");
        rig.process();
        assert_eq!(rig.used(0).expect("relayed").len(), HEADER_SIZE);
        drop(frontend);
        rig.process();
        assert!(rig.used(0).expect("end mark").is_empty());
        assert_eq!((rig.link_status(), rig.device.link()), (0, LinkState::Down));
        (0..2).for_each(|_| rig.offer(0, &[], BUFFER));
        rig.backend_up();
    }
}

#[test]
fn the_mark_of_the_end_waits_for_a_buffer() {
    let mut rig = Rig::new();
    rig.bring_up(feature::OFFERED);
    let mut frontend = rig.connect();
    for _ in 0..QUEUE_SIZE + 3 {
        frontend.send(request(FrontendReq::SET_OWNER, 0, &[]).bytes, vec![]).expect("send");
    }
    rig.process();
    (0..QUEUE_SIZE).for_each(|_| assert_eq!(rig.used(0).expect("relayed").len(), HEADER_SIZE));
    assert_eq!(rig.used(0), None);
    drop(frontend);
    rig.process();
    assert_eq!(rig.device.link(), LinkState::Connected);
    (0..QUEUE_SIZE).for_each(|_| rig.offer(0, &[], BUFFER));
    rig.notify(0);
    (0..3).for_each(|_| assert_eq!(rig.used(0).expect("relayed").len(), HEADER_SIZE));
    assert!(rig.used(0).expect("end mark").is_empty());
    assert_eq!(rig.device.link(), LinkState::Down);
}

#[test]
fn kicks_become_vectors_and_doorbells_calls_until_they_are_replaced() {
    let mut rig = Rig::new();
    rig.bring_up(feature::OFFERED);
    rig.write(BAR2, pci::VECTOR_SELECT_CFG.offset, &3u16.to_le_bytes());
    rig.write(BAR2, pci::VECTOR_SELECT_CFG.offset + 2, &5u16.to_le_bytes());
    let mut frontend = rig.connect();
    let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd");
    let dup = |fd: &OwnedFd| vec![fd.try_clone().expect("dup")];
    let ring = |fd: &OwnedFd| rustix::io::write(fd, &1u64.to_ne_bytes()).expect("kick");
    let [old_kick, kick, old_call, call] = [event(), event(), event(), event()];
    let queue = [3, 0, 0, 0, 0, 0, 0, 0];
    for (code, fd) in [
        (FrontendReq::SET_VRING_CALL, &old_call),
        (FrontendReq::SET_VRING_KICK, &old_kick),
        (FrontendReq::SET_VRING_CALL, &call),
        (FrontendReq::SET_VRING_KICK, &kick),
    ] {
        frontend.send(request(code, 0, &queue).bytes, dup(fd)).expect("send");
    }
    rig.process();
    let mut count = [0; 8];
    for call in [&old_call, &call] {
        rustix::io::read(call, &mut count).expect("a notification may have gone to the one before");
        assert_eq!(u64::from_ne_bytes(count), 1);
    }
    rig.host.signals.borrow_mut().clear();
    ring(&old_kick);
    rig.process();
    assert!(rig.host.signals.borrow().is_empty());
    for _ in 0..3 {
        ring(&kick);
        rig.process();
    }
    assert_eq!(*rig.host.signals.borrow(), [5, 5, 5]);
    rig.write(BAR2, 3 * 4, &[1]);
    rig.write(BAR2, 3 * 4, &[1, 0]);
    rustix::io::read(&call, &mut count).expect("called");
    assert_eq!(u64::from_ne_bytes(count), 2);
    assert!(rustix::io::read(&old_call, &mut count).is_err());
    drop(frontend);
    rig.process();
    rig.host.signals.borrow_mut().clear();
    ring(&kick);
    rig.process();
    assert!(rig.host.signals.borrow().is_empty());
}

#[test]
fn foreign_memory_is_refused_by_an_answer_or_by_hanging_up() {
    let mut table = vec![1, 0, 0, 0, 0, 0, 0, 0];
    table.extend([0u64, 0x1000, 0, 0].map(u64::to_le_bytes).concat());
    let foreign =
        || vec![SiblingMemory::create(0x1000).expect("memory").file().try_clone().expect("dup").into()];
    let mut rig = Rig::new();
    rig.bring_up(feature::OFFERED);
    let mut frontend = rig.connect();
    let features = request(FrontendReq::SET_PROTOCOL_FEATURES, 0, &REPLY_ACK.to_le_bytes());
    frontend.send(features.bytes, vec![]).expect("send");
    let message = request(FrontendReq::SET_MEM_TABLE, NEED_REPLY, &table);
    frontend.send(message.bytes, foreign()).expect("send");
    rig.process();
    let answer = frontend.receive().expect("receive").expect("answer");
    assert_eq!((answer.header.request, answer.payload()), (5, &1u64.to_le_bytes()[..]));
    assert_eq!(rig.device.link(), LinkState::Connected);
    frontend.send(request(FrontendReq::SET_MEM_TABLE, 0, &table).bytes, foreign()).expect("send");
    rig.process();
    assert!(frontend.receive().is_err());
    assert_eq!(rig.device.link(), LinkState::Down);
}

#[test]
fn a_request_of_the_back_end_takes_the_channel_or_is_refused() {
    let mut rig = Rig::new();
    rig.bring_up(feature::OFFERED);
    let mut frontend = rig.connect();
    let ask = |code| Message::new(Header { request: code, flags: 1 | NEED_REPLY, size: 0 }, &[]);
    rig.send(&ask(BackendReq::CONFIG_CHANGE_MSG as u32));
    let refused = rig.used(0).expect("refused");
    assert_eq!((refused[0], refused[4], refused[HEADER_SIZE]), (2, 5, 1));
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let set = request(FrontendReq::SET_BACKEND_REQ_FD, 0, &[]);
    frontend.send(set.bytes, vec![theirs.into()]).expect("send");
    rig.process();
    rig.used(0).expect("relayed");
    let mut channel = MessageSocket::new(ours);
    rig.send(&ask(BackendReq::CONFIG_CHANGE_MSG as u32));
    let asked = channel.receive().expect("receive").expect("asked");
    channel.send(Message::new(asked.header.reply(8), &[0; 8]).bytes, vec![]).expect("send");
    rig.process();
    let answer = rig.used(0).expect("answer");
    assert_eq!((answer[0], answer[4], answer.len()), (2, 5, HEADER_SIZE + 8));
    rig.send(&ask(BackendReq::SHMEM_MAP as u32));
    assert_eq!(rig.used(0).expect("refused")[HEADER_SIZE], 1);
}

#[test]
fn a_driver_that_breaks_the_protocol_has_to_reset() {
    for bytes in [&[0; 4][..], &[1, 0, 0, 0, 1, 0, 0, 0, 9, 0, 0, 0], &[0; 12]] {
        let mut rig = Rig::new();
        rig.bring_up(feature::OFFERED);
        let mut frontend = rig.connect();
        rig.offer(1, bytes, 0);
        rig.notify(1);
        assert_eq!(rig.device.link(), LinkState::Broken);
        assert_ne!(rig.status() & status::NEEDS_RESET, 0);
        assert!(frontend.receive().is_err());
        rig.bring_up(feature::OFFERED);
        rig.connect();
        assert_eq!(rig.device.link(), LinkState::Connected);
    }
}

#[test]
fn a_message_larger_than_the_drivers_buffers_disconnects_only_the_front_end() {
    let mut rig = Rig::new();
    rig.bring_up(feature::OFFERED);
    rig.write(BAR0, pci::COMMON_CFG.offset + common::DEVICE_STATUS, &[0]);
    rig.bring_up(feature::OFFERED);
    // Shrink every buffer that is on offer.
    for slot in 0..u64::from(QUEUE_SIZE) {
        let length = GuestAddress(rig.rings[0].base + 16 * slot + 8);
        rig.host.memory.write_obj(16u32, length).expect("length");
    }
    let mut frontend = rig.connect();
    frontend.send(request(FrontendReq::SET_FEATURES, 0, &[0; 8]).bytes, vec![]).expect("send");
    rig.process();
    assert!(frontend.receive().is_err());
    assert!(rig.used(0).expect("end mark").is_empty());
    assert_eq!(rig.device.link(), LinkState::Down);
}

#[test]
fn every_kind_of_reset_ends_the_session_and_the_device_comes_up_again() {
    type Reset = fn(&mut Rig);
    let resets: [(&str, Reset); 5] = [
        ("virtio", |rig| rig.common(common::DEVICE_STATUS, &[0])),
        ("function level", |rig| rig.write(Region::Config, 0x4c + 4, &[1])),
        ("host", |rig| rig.device.reset()),
        ("bus master off", |rig| rig.write(Region::Config, 4, &[2, 0])),
        ("back-end down", |rig| rig.write(BAR0, pci::DEVICE_CFG.offset, &[0; 4])),
    ];
    let mut rig = Rig::new();
    for (name, reset) in resets {
        rig.bring_up(feature::OFFERED);
        let mut frontend = rig.connect();
        assert_eq!(rig.device.link(), LinkState::Connected, "{name}");
        reset(&mut rig);
        assert_eq!(rig.device.link(), LinkState::Down, "{name}");
        assert!(frontend.receive().is_err(), "{name}");
        assert_eq!(rig.link_status() & device_config::FRONTEND_UP, 0, "{name}");
    }
}

#[test]
fn a_second_front_end_waits_for_the_first_to_leave() {
    let mut rig = Rig::new();
    rig.bring_up(feature::OFFERED);
    let first = rig.connect();
    let mut second = rig.connect();
    second.send(request(FrontendReq::SET_OWNER, 0, &[]).bytes, vec![]).expect("send");
    rig.process();
    assert_eq!(rig.used(0), None);
    drop(first);
    rig.process();
    assert!(rig.used(0).expect("end mark").is_empty());
    rig.backend_up();
    rig.process();
    assert_eq!(rig.used(0).expect("relayed").len(), HEADER_SIZE);
}

/// Such a front-end belongs to a VM that runs; if it were to wait for an answer, so would the VM.
#[test]
fn a_front_end_that_comes_back_before_the_back_end_is_hung_up_on() {
    for name in ["the driver goes", "virtio reset", "reset"] {
        let mut rig = Rig::new();
        rig.bring_up(feature::OFFERED);
        let mut lost = rig.connect();
        rig.process();
        assert_eq!(rig.device.link(), LinkState::Connected, "{name}");
        match name {
            "the driver goes" => rig.write(Region::Bar(0), pci::DEVICE_CFG.offset, &[0; 4]),
            "virtio reset" => rig.common(common::DEVICE_STATUS, &[0]),
            _ => rig.device.reset(),
        }
        assert!(lost.receive().is_err(), "{name}");
        for _ in 0..20 {
            let mut back = rig.connect();
            rig.process();
            assert!(back.receive().is_err(), "{name}");
        }
        rig.device.reset();
        rig.bring_up(feature::OFFERED);
        let mut back = rig.connect();
        rig.process();
        assert_eq!(rig.device.link(), LinkState::Connected, "{name}");
        assert!(back.receive().expect("connected").is_none(), "{name}");
    }
}

#[test]
fn rings_outside_memory_break_the_driver_not_the_device() {
    let mut rig = Rig::new();
    rig.rings[0].base = 0x10000;
    rig.bring_up(feature::OFFERED);
    rig.common(common::DEVICE_STATUS, &[0]);
    for index in [0u16, 1] {
        rig.common(common::QUEUE_SELECT, &index.to_le_bytes());
        rig.common(common::QUEUE_DESC, &(1u64 << 40).to_le_bytes());
        rig.common(common::QUEUE_ENABLE, &1u16.to_le_bytes());
    }
    for select in [0u32, 1] {
        rig.common(common::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
        rig.common(common::DRIVER_FEATURE, &select.to_le_bytes());
    }
    rig.common(common::DEVICE_STATUS, &[status::FEATURES_OK | status::DRIVER_OK]);
    rig.backend_up();
    assert_eq!(rig.device.link(), LinkState::Broken);
}

#[test]
fn a_slow_or_garbled_front_end_holds_nothing_up() {
    let mut rig = Rig::new();
    rig.bring_up(feature::OFFERED);
    let mut raw = UnixStream::connect(rig.dir.path().join("s")).expect("connect");
    for byte in request(FrontendReq::SET_OWNER, 0, &[]).bytes {
        assert_eq!(rig.used(0), None);
        raw.write_all(&[byte]).expect("write");
        rig.process();
    }
    assert_eq!(rig.used(0).expect("relayed").len(), HEADER_SIZE);
    raw.write_all(&[0xff; 64]).expect("write");
    rig.process();
    assert_eq!(rig.device.link(), LinkState::Down);
}

#[derive(Clone, Debug)]
enum Step {
    Write(bool, u64, Vec<u8>),
    Config(u64, Vec<u8>),
    Connect,
    Hangup,
    Send(Vec<u8>),
    Memory(u64, Vec<u8>),
    BringUp,
}

fn step() -> impl Strategy<Value = Step> {
    let data = || {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 1..9),
            proptest::collection::vec(prop_oneof![Just(0u8), Just(1), Just(15)], 1..9),
        ]
    };
    prop_oneof![
        6 => (any::<bool>(), prop_oneof![0..0x40u64, 0..0x8000u64], data()).prop_map(|(a, b, c)| Step::Write(a, b, c)),
        2 => (0..256u64, data()).prop_map(|(a, b)| Step::Config(a, b)),
        2 => Just(Step::Connect),
        1 => Just(Step::Hangup),
        3 => (0..45u8, proptest::collection::vec(any::<u8>(), 0..64)).prop_map(|(code, payload)| {
            let size = u8::try_from(payload.len()).unwrap_or(0);
            Step::Send([&[code, 0, 0, 0, 1, 0, 0, 0, size, 0, 0, 0], &payload[..]].concat())
        }),
        1 => proptest::collection::vec(any::<u8>(), 1..64).prop_map(Step::Send),
        4 => (0x10000..0x13000u64, data()).prop_map(|(a, b)| Step::Memory(a, b)),
        4 => (0x40000..0x43000u64, data()).prop_map(|(a, b)| Step::Memory(a, b)),
        2 => Just(Step::BringUp),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    /// Whatever guest and front-end do, the device lives, and after a reset it serves.
    #[test]
    fn nothing_a_guest_or_front_end_does_kills_the_device(steps in proptest::collection::vec(step(), 1..60)) {
        let mut rig = Rig::new();
        let mut frontends: Vec<UnixStream> = Vec::new();
        for step in steps {
            match step {
                Step::Write(bar0, offset, data) => rig.write(if bar0 { BAR0 } else { BAR2 }, offset, &data),
                Step::Config(offset, data) => rig.write(Region::Config, offset, &data),
                Step::Connect if frontends.len() < 8 => {
                    let stream = UnixStream::connect(rig.dir.path().join("s")).expect("connect");
                    stream.set_nonblocking(true).expect("nonblocking");
                    frontends.push(stream);
                }
                Step::Connect => {}
                Step::Hangup => drop(frontends.pop()),
                Step::Send(bytes) => {
                    if let Some(stream) = frontends.first_mut() {
                        let _ = stream.write(&bytes);
                    }
                }
                Step::Memory(address, data) => {
                    rig.host.memory.write_slice(&data, GuestAddress(address)).expect("in range");
                }
                Step::BringUp => rig.bring_up(feature::OFFERED),
            }
            rig.turn();
        }
        drop(frontends);
        rig.device.reset();
        rig.bring_up(feature::OFFERED);
        for _ in 0..10 {
            rig.process();
            rig.bring_up(feature::OFFERED);
        }
        let mut frontend = rig.connect();
        frontend.send(request(FrontendReq::SET_OWNER, 0, &[]).bytes, vec![]).expect("send");
        rig.process();
        prop_assert_eq!(rig.device.link(), LinkState::Connected);
        prop_assert_eq!(rig.used(0).map(|bytes| bytes.len()), Some(HEADER_SIZE));
    }
}
