//! Hostile front-ends and guests: one test for each thing that they do to the device.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::device::rig::{BAR0, BAR2, BUFFER, QUEUE_SIZE, Rig};
use crate::message_socket::{Message, MessageSocket};
use crate::spec::addr::{BarOffset, SiblingGpa, SiblingVa};
use crate::spec::pci::{self, Region};
use crate::spec::vhost_user::{FrontendReq, HEADER_SIZE, Header, MemoryRegion, memory_table_to_bytes};
use crate::spec::virtio::{common, feature, status, vector_select};

fn request(code: FrontendReq, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).expect("small");
    Message::new(Header { request: code as u32, flags: 1, size }, payload).bytes
}

/// A device with its driver up.
fn rig() -> Rig {
    let mut rig = Rig::new();
    rig.bring_up(feature::OFFERED);
    rig
}

/// Whether the device hung up on `frontend`, and serves the next one.
fn is_dropped_and_the_next_served(rig: &mut Rig, mut frontend: MessageSocket) -> bool {
    rig.process();
    let dropped = loop {
        match frontend.receive() {
            Ok(Some(_)) => {}
            Ok(None) => break false,
            Err(_) => break true,
        }
    };
    drop(frontend);
    rig.process();
    while rig.used(0).is_some() {
        rig.offer(0, &[], BUFFER);
    }
    rig.backend_up();
    let mut next = rig.connect();
    next.send(request(FrontendReq::SET_OWNER, &[]), vec![]).expect("send");
    rig.process();
    assert_eq!(rig.used(0).map(|bytes| bytes.len()), Some(HEADER_SIZE), "the next front-end is served");
    dropped
}

#[test]
fn a_front_end_with_wrong_versions_or_sizes_is_dropped() {
    let header = |request: u32, flags: u32, size: u32| [request, flags, size].map(u32::to_le_bytes).concat();
    for (index, bytes) in [
        header(1, 0, 0),
        header(1, 2, 0),
        header(1, 3, 0),
        header(5, 1, u32::MAX),
        header(5, 1, 0x8000_0000),
        header(5, 1, 4097),
        // Sizes that are possible, but not for these requests.
        request(FrontendReq::SET_MEM_TABLE, &[]),
        request(FrontendReq::SET_FEATURES, &[0; 7]),
        request(FrontendReq::SET_VRING_NUM, &[0; 9]),
        request(FrontendReq::SET_VRING_ADDR, &[0; 4]),
        request(FrontendReq::SET_VRING_KICK, &[]),
        request(FrontendReq::GET_INFLIGHT_FD, &[0; 1000]),
    ]
    .into_iter()
    .enumerate()
    {
        let mut rig = rig();
        let mut frontend = rig.connect();
        frontend.send(bytes, vec![]).expect("send");
        rig.process();
        // The device does not examine this payload; the back-end does.
        let relayed = rig.used(0).is_some_and(|bytes| !bytes.is_empty());
        rig.offer(0, &[], BUFFER);
        let dropped = is_dropped_and_the_next_served(&mut rig, frontend);
        assert!(dropped != relayed, "message {index}: dropped {dropped}, relayed {relayed}");
        assert!(dropped || index == 11, "message {index}");
    }
}

#[test]
fn a_message_cut_anywhere_does_nothing() {
    let whole = request(FrontendReq::SET_VRING_NUM, &[0; 8]);
    for cut in 1..whole.len() {
        let mut rig = rig();
        let mut frontend = rig.connect();
        frontend.send(whole[..cut].to_vec(), vec![]).expect("send");
        rig.process();
        assert_eq!(rig.used(0), None, "nothing is relayed before it is complete");
        drop(frontend);
        rig.process();
        assert_eq!(rig.used(0), Some(vec![]), "the end of the session comes next");
    }
}

#[test]
fn file_descriptors_on_every_request_are_refused_unless_they_belong() {
    use FrontendReq as R;
    for code in 1..45 {
        let Ok(request_code) = R::try_from(code) else { continue };
        if matches!(
            request_code,
            R::SET_MEM_TABLE
                | R::ADD_MEM_REG
                | R::REM_MEM_REG
                | R::SET_VRING_KICK
                | R::SET_VRING_CALL
                | R::SET_VRING_ERR
                | R::SET_BACKEND_REQ_FD
                | R::SET_INFLIGHT_FD
        ) {
            continue;
        }
        let mut rig = rig();
        let mut frontend = rig.connect();
        let fd = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
        frontend.send(request(request_code, &[0; 8]), vec![fd]).expect("send");
        assert!(is_dropped_and_the_next_served(&mut rig, frontend), "{request_code:?}");
    }
}

#[test]
fn hundreds_of_file_descriptors_are_closed_again() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let (read, write) = rustix::pipe::pipe().expect("pipe");
    let mut rig = rig();
    for _ in 0..20 {
        let stream = UnixStream::connect(rig.dir.path().join("s")).expect("connect");
        let fds = vec![write.as_fd(); 250];
        let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(250))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = request(FrontendReq::SET_OWNER, &[]);
        sendmsg(&stream, &[std::io::IoSlice::new(&bytes)], &mut control, SendFlags::empty()).expect("send");
        assert!(is_dropped_and_the_next_served(&mut rig, MessageSocket::new(stream)));
        rig.device.reset();
        rig.bring_up(feature::OFFERED);
        rig.process();
        while rig.used(0).is_some() {
            rig.offer(0, &[], BUFFER);
        }
        rig.backend_up();
    }
    // If the device had kept one of the 5000, the pipe would still be open for writing.
    drop(write);
    assert_eq!(rustix::io::read(&read, &mut [0; 1]), Ok(0));
}

#[test]
fn memory_that_lies_is_refused() {
    let region = |gpa: u64, size: u64, offset: u64| MemoryRegion {
        gpa: SiblingGpa(gpa),
        size,
        va: SiblingVa(gpa),
        offset: BarOffset(offset),
    };
    let tables: [(&str, &[MemoryRegion]); 5] = [
        ("overlaps", &[region(0, 0x4000, 0), region(0x2000, 0x4000, 0x8000)]),
        ("wraps in the address space", &[region(0u64.wrapping_sub(0x1000), 0x2000, 0)]),
        ("wraps in the file", &[region(0, 0x2000, 0u64.wrapping_sub(0x1000))]),
        ("ends after the file", &[region(0, 0x20000, 0)]),
        ("begins after the file", &[region(0, 0x1000, 1 << 40)]),
    ];
    for (name, regions) in tables {
        let mut rig = rig();
        let mut frontend = rig.connect();
        let memory = rig.device.shared_memory().0;
        let fds = regions.iter().map(|_| memory.try_clone_to_owned().expect("dup")).collect();
        frontend
            .send(request(FrontendReq::SET_MEM_TABLE, &memory_table_to_bytes(regions)), fds)
            .expect("send");
        assert!(is_dropped_and_the_next_served(&mut rig, frontend), "{name}");
    }
}

#[test]
fn a_front_end_cannot_shrink_memory_that_is_shown() {
    let mut rig = rig();
    let mut frontend = rig.connect();
    let memory = rig.device.shared_memory().0.try_clone_to_owned().expect("dup");
    let lent = memory.try_clone().expect("dup");
    let table = [MemoryRegion { gpa: SiblingGpa(0), size: 0x10000, va: SiblingVa(0), offset: BarOffset(0) }];
    frontend
        .send(request(FrontendReq::SET_MEM_TABLE, &memory_table_to_bytes(&table)), vec![lent])
        .expect("send");
    rig.process();
    assert!(rig.used(0).is_some_and(|bytes| !bytes.is_empty()), "accepted");
    assert_eq!(rustix::fs::ftruncate(&memory, 0), Err(rustix::io::Errno::PERM));
    let data: [u8; 8] = rig.read(Region::Bar(pci::SHARED_MEMORY_BAR), 0xfff8);
    assert_eq!(data, [0; 8]);
}

#[test]
fn a_front_end_that_waits_for_no_answer_is_stopped() {
    let mut rig = rig();
    let mut frontend = rig.connect();
    let mut sent = 0;
    while frontend.send(request(FrontendReq::GET_FEATURES, &[]), vec![]).is_ok() && sent < 1000 {
        sent += 1;
        rig.process();
        while rig.used(0).is_some() {
            rig.offer(0, &[], BUFFER);
        }
    }
    // It is dropped at the 65th that the back-end has yet to answer.
    assert!((64..80).contains(&sent), "{sent}");
}

#[test]
fn a_front_end_that_sends_more_than_the_driver_takes_waits() {
    let mut rig = rig();
    let mut frontend = rig.connect();
    let mut sent = 0;
    while !frontend.is_congested() {
        frontend.send(request(FrontendReq::SET_OWNER, &[]), vec![]).expect("send");
        sent += 1;
        assert!(sent < 1_000_000, "messages pile up in the device");
        rig.turn();
    }
    for _ in 0..sent {
        if rig.used(0).is_none() {
            rig.process();
            frontend.flush().expect("flush");
            assert!(rig.used(0).is_some());
        }
        rig.offer(0, &[], BUFFER);
        rig.notify(0);
        frontend.flush().expect("flush");
    }
}

#[test]
fn front_ends_that_come_and_go_leave_nothing() {
    let mut rig = rig();
    let open = || std::fs::read_dir("/proc/self/fd").expect("own descriptors").count();
    let mut counts = Vec::new();
    for round in 0..300 {
        let mut frontend = rig.connect();
        let kick = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
        frontend.send(request(FrontendReq::SET_VRING_KICK, &[0; 8]), vec![kick]).expect("send");
        rig.process();
        drop(frontend);
        rig.process();
        while rig.used(0).is_some() {
            rig.offer(0, &[], BUFFER);
        }
        rig.backend_up();
        if round >= 100 {
            counts.push(open());
        }
    }
    // Other tests of this process open and close some too, but none opens hundreds.
    let (first, last) = (counts.first().expect("some"), counts.last().expect("some"));
    assert!(last.abs_diff(*first) < 150, "{counts:?}");
}

#[test]
fn a_kick_that_is_always_ready_does_not_starve_the_rest() {
    let mut rig = rig();
    let mut frontend = rig.connect();
    // A full counter is readable for ever.
    let kick: OwnedFd = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    rustix::io::write(&kick, &(u64::MAX - 1).to_ne_bytes()).expect("fill");
    frontend.send(request(FrontendReq::SET_VRING_KICK, &[0; 8]), vec![kick]).expect("send");
    rig.process();
    rig.host.signals.borrow_mut().clear();
    rig.process();
    assert!(rig.host.signals.borrow().len() <= 1, "an interrupt for each look would be a storm");
    frontend.send(request(FrontendReq::SET_OWNER, &[]), vec![]).expect("send");
    rig.process();
    assert!(rig.used(0).is_some() && rig.used(0).is_some());
}

/// Writes a descriptor of the transmit queue.
fn descriptor(rig: &Rig, index: u64, addr: u64, len: u32, flags: u16, next: u16) {
    let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
    let at = GuestAddress(rig.rings[1].base + 16 * index);
    rig.host.memory.write_obj([addr, rest], at).expect("descriptor");
}

#[test]
fn descriptors_that_loop_or_lead_outside_memory_break_the_driver_only() {
    type Spoil = fn(&Rig);
    let cases: [(&str, Spoil); 6] = [
        ("itself next", |rig| descriptor(rig, 0, 0x60000, 1, 1, 0)),
        ("a circle", |rig| {
            descriptor(rig, 0, 0x60000, 6, 1, 1);
            descriptor(rig, 1, 0x60000, 6, 1, 0);
        }),
        ("outside memory", |rig| descriptor(rig, 0, 1 << 40, 12, 0, 0)),
        ("across the end", |rig| descriptor(rig, 0, 0xffffc, 12, 0, 0)),
        ("4 GiB", |rig| descriptor(rig, 0, 0x60000, u32::MAX, 0, 0)),
        ("write-only", |rig| descriptor(rig, 0, 0x60000, 12, 2, 0)),
    ];
    for (name, spoil) in cases {
        let mut rig = rig();
        let _frontend = rig.connect();
        rig.offer(1, &request(FrontendReq::SET_OWNER, &[]), 0);
        spoil(&rig);
        rig.notify(1);
        rig.process();
        assert_eq!(rig.device.link(), LinkState::Broken, "{name}");
        assert_ne!(rig.status() & status::NEEDS_RESET, 0, "{name}");
        rig.bring_up(feature::OFFERED);
        rig.connect();
        assert_eq!(rig.device.link(), LinkState::Connected, "{name}");
    }
}

#[test]
fn an_available_index_that_jumps_breaks_the_driver_only() {
    for queue in [0, 1] {
        let mut rig = rig();
        let mut frontend = rig.connect();
        let index = GuestAddress(rig.rings[queue].base + 0x1000 + 2);
        rig.host.memory.write_obj(QUEUE_SIZE * 100, index).expect("index");
        frontend.send(request(FrontendReq::SET_OWNER, &[]), vec![]).expect("send");
        rig.notify(1);
        rig.process();
        rig.device.reset();
        rig.bring_up(feature::OFFERED);
        drop(frontend);
        rig.connect();
        assert!(matches!(rig.device.link(), LinkState::Connected | LinkState::Leaving));
    }
}

#[test]
fn every_doorbell_and_vector_selects_nothing_or_what_is_there() {
    let mut rig = rig();
    let mut frontend = rig.connect();
    let call = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd");
    frontend
        .send(request(FrontendReq::SET_VRING_CALL, &[0; 8]), vec![call.try_clone().expect("dup")])
        .expect("send");
    rig.process();
    rustix::io::read(&call, &mut [0; 8]).expect("a new call eventfd is signalled");
    let size = rig.device.region_size(BAR2);
    for offset in (4..size).step_by(2) {
        if pci::VECTOR_SELECT_CFG.locate(pci::NOTIFY_BAR, offset, 1).is_none() {
            rig.write(BAR2, offset, &[1, 0]);
        }
    }
    for offset in [size, size - 1, u64::MAX, u64::MAX - 3] {
        rig.write(BAR2, offset, &[1, 0, 0, 0]);
    }
    assert!(rustix::io::read(&call, &mut [0; 8]).is_err(), "only doorbell 0 is the call of queue 0");
    for queue in [0u16, 15, 16, 128, u16::MAX] {
        for vector in [0u16, 18, 19, 2047, u16::MAX] {
            rig.write(BAR2, pci::VECTOR_SELECT_CFG.offset + vector_select::SELECT, &queue.to_le_bytes());
            rig.write(
                BAR2,
                pci::VECTOR_SELECT_CFG.offset + vector_select::MSIX_VECTOR,
                &vector.to_le_bytes(),
            );
            let read: [u8; 2] = rig.read(BAR2, pci::VECTOR_SELECT_CFG.offset + vector_select::MSIX_VECTOR);
            let kept = queue < 16 && vector < 19;
            assert_eq!(u16::from_le_bytes(read), if kept { vector } else { u16::MAX }, "{queue} {vector}");
        }
    }
}

#[test]
fn vectors_that_do_not_exist_are_not_kept() {
    let mut rig = rig();
    for vector in [19u16, 2048, 0xfffe] {
        rig.common(common::CONFIG_MSIX_VECTOR, &vector.to_le_bytes());
        let read: [u8; 2] = rig.read(BAR0, pci::COMMON_CFG.offset + common::CONFIG_MSIX_VECTOR);
        assert_eq!(u16::from_le_bytes(read), u16::MAX, "{vector}");
    }
}

#[test]
fn a_slow_front_end_does_not_keep_the_guest_from_its_registers() {
    let mut rig = rig();
    let mut slow = UnixStream::connect(rig.dir.path().join("s")).expect("connect");
    rig.process();
    let bytes = request(FrontendReq::SET_MEM_TABLE, &[0; 1024]);
    for byte in &bytes[..bytes.len() - 1] {
        slow.write_all(&[*byte]).expect("write");
        rig.turn();
        assert_ne!(rig.status(), 0);
    }
    assert_eq!(rig.device.link(), LinkState::Connected);
    // A reset does not wait for the rest of the message.
    rig.device.reset();
    rig.bring_up(feature::OFFERED);
    assert_eq!(rig.device.link(), LinkState::Waiting);
}

#[test]
fn memory_that_vanishes_in_mid_use_breaks_the_driver_only() {
    type Moment = fn(&mut Rig, &mut MessageSocket);
    let moments: [(&str, Moment); 3] = [
        ("a message comes", |rig, frontend| {
            frontend.send(request(FrontendReq::SET_OWNER, &[]), vec![]).expect("send");
            rig.process();
        }),
        ("the driver sends", |rig, _| rig.notify(1)),
        ("the front-end leaves", |rig, frontend| {
            let (_, other) = UnixStream::pair().expect("pair");
            drop(std::mem::replace(frontend, MessageSocket::new(other)));
            rig.process();
        }),
    ];
    for (name, moment) in moments {
        let mut rig = rig();
        let mut frontend = rig.connect();
        let elsewhere = GuestMemoryMmap::from_ranges(&[(GuestAddress(1 << 40), 0x1000)]).expect("memory");
        let memory = std::mem::replace(&mut rig.host.memory, elsewhere);
        moment(&mut rig, &mut frontend);
        assert_eq!(rig.device.link(), LinkState::Broken, "{name}");
        rig.host.memory = memory;
        rig.bring_up(feature::OFFERED);
        rig.connect();
        assert_eq!(rig.device.link(), LinkState::Connected, "{name}");
    }
}

/// Answering refused requests is work like any other: a front-end that sends nothing else must not keep the
/// device, and with it the device VM, from everything else.
#[test]
fn refused_requests_count_against_the_turn() {
    let mut rig = rig();
    let mut frontend = rig.connect();
    let features = request(FrontendReq::SET_PROTOCOL_FEATURES, &8u64.to_le_bytes());
    frontend.send(features, vec![]).expect("send");
    rig.process();
    let log = Header { request: FrontendReq::SET_LOG_BASE as u32, flags: 9, size: 0 };
    for _ in 0..150 {
        frontend.send(Message::new(log, &[]).bytes, vec![]).expect("send");
    }
    assert!(!frontend.is_congested(), "the requests fit into the socket");
    let mut answers = || std::iter::from_fn(|| frontend.receive().expect("connected")).count();
    rig.turn();
    let in_one_turn = answers();
    assert!((1..=64).contains(&in_one_turn), "{in_one_turn}");
    rig.process();
    assert_eq!(in_one_turn + answers(), 150);
}

/// Gives the device a channel for requests of the back-end; returns the front-end's end, and a duplicate of
/// the device's end as a front-end may keep one.
fn give_channel(rig: &mut Rig, frontend: &mut MessageSocket) -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let kept = theirs.try_clone().expect("dup");
    frontend.send(request(FrontendReq::SET_BACKEND_REQ_FD, &[]), vec![theirs.into()]).expect("send");
    rig.process();
    assert!(rig.used(0).is_some_and(|bytes| !bytes.is_empty()), "relayed");
    rig.offer(0, &[], BUFFER);
    (ours, kept)
}

/// Whether the device has events to handle.
fn is_woken(rig: &Rig) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let events = rig.device.events();
    poll(&mut [PollFd::new(events, PollFlags::IN)], Some(&Timespec::default())) == Ok(1)
}

#[test]
fn a_replaced_back_end_channel_wakes_the_device_no_longer() {
    let mut rig = rig();
    let mut frontend = rig.connect();
    let (mut old, _kept) = give_channel(&mut rig, &mut frontend);
    let (mut new, _also_kept) = give_channel(&mut rig, &mut frontend);
    rig.process();
    assert!(!is_woken(&rig));
    // It fails if the device has hung up on the old channel.
    let _ = old.write(&[1]);
    assert!(!is_woken(&rig), "the old channel is still watched");
    new.write_all(&[1]).expect("write");
    assert!(is_woken(&rig), "the new channel is not watched");
}

#[test]
fn a_closed_back_end_channel_ends_only_the_channel() {
    let mut rig = rig();
    let mut frontend = rig.connect();
    let ask = Header { request: 2, flags: 9, size: 0 };
    let (channel, _kept) = give_channel(&mut rig, &mut frontend);
    rig.send(&Message::new(ask, &[]));
    assert_eq!(rig.used(0), None, "the front-end is asked");
    drop(channel);
    rig.process();
    assert_eq!(rig.device.link(), LinkState::Connected);
    let failed = rig.used(0).expect("the request that waited is answered");
    assert_eq!((failed[0], failed[4], failed[HEADER_SIZE]), (2, 5, 1));
    rig.offer(0, &[], BUFFER);
    rig.send(&Message::new(ask, &[]));
    assert_eq!(rig.used(0).expect("refused")[HEADER_SIZE], 1);
    rig.offer(0, &[], BUFFER);
    frontend.send(request(FrontendReq::SET_OWNER, &[]), vec![]).expect("send");
    rig.process();
    assert_eq!(rig.used(0).map(|bytes| bytes.len()), Some(HEADER_SIZE), "the front-end is still served");
    rig.offer(0, &[], BUFFER);
    // A new channel works.
    let (channel, _kept) = give_channel(&mut rig, &mut frontend);
    rig.send(&Message::new(ask, &[]));
    assert!(MessageSocket::new(channel).receive().expect("open").is_some());
}

const SHORTAGE: &str = "VVU_TEST_SHORTAGE";

/// Runs in a process of its own, because the limit of file descriptors is the process's.
#[test]
fn a_front_end_that_comes_while_there_are_no_file_descriptors_is_served_later() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    if std::env::var_os(SHORTAGE).is_none() {
        let name = "device::vvu_device::hostile_tests::\
                    a_front_end_that_comes_while_there_are_no_file_descriptors_is_served_later";
        let output = std::process::Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", "--nocapture", name])
            .env(SHORTAGE, "1")
            .output()
            .expect("child");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
        return;
    }
    let mut rig = rig();
    let stream = UnixStream::connect(rig.dir.path().join("s")).expect("connect");
    // The lowest free descriptor is the limit from here on.
    let free = rustix::io::dup(&stream).expect("dup");
    let limit = u64::try_from(std::os::fd::AsRawFd::as_raw_fd(&free)).expect("positive");
    drop(free);
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(limit), ..before }).expect("limit");
    rig.process();
    assert_eq!(rig.device.link(), LinkState::Waiting);
    setrlimit(Resource::Nofile, before).expect("limit");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while rig.device.link() != LinkState::Connected {
        let events = rig.device.events();
        let woken = crate::event::wait_readable(&[events.as_fd()], Some(deadline)).expect("wait");
        assert!(woken.is_some(), "the device does not try again");
        rig.process();
    }
}

/// A TCP socket that takes five seconds to close: nobody reads what is left in it.
fn lingering_socket() -> (OwnedFd, std::net::TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let mut stream = std::net::TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    let (peer, _) = listener.accept().expect("accept");
    stream.set_nonblocking(true).expect("non-blocking");
    while stream.write(&[0; 1 << 16]).is_ok() {}
    stream.set_nonblocking(false).expect("blocking");
    let linger = std::time::Duration::from_secs(5);
    rustix::net::sockopt::set_socket_linger(&stream, Some(linger)).expect("linger");
    (stream.into(), peer)
}

/// Wherever the last descriptor of such a socket is closed, the device does not wait for it.
#[test]
fn descriptors_that_take_long_to_close_hold_nothing_up() {
    type Give = fn(&mut Rig, &mut MessageSocket, OwnedFd);
    let gives: [(&str, Give); 4] = [
        ("with a request that has none", |_, frontend, fd| {
            frontend.send(request(FrontendReq::SET_OWNER, &[]), vec![fd]).expect("send");
        }),
        ("in place of a socket", |_, frontend, fd| {
            frontend.send(request(FrontendReq::SET_BACKEND_REQ_FD, &[]), vec![fd]).expect("send");
        }),
        ("behind a message that ends the connection", |_, frontend, fd| {
            frontend.send(vec![0xff; 12], vec![]).expect("send");
            frontend.send(request(FrontendReq::SET_OWNER, &[]), vec![fd]).expect("send");
        }),
        ("in the back-end channel", |rig, frontend, fd| {
            let (channel, _kept) = give_channel(rig, frontend);
            MessageSocket::new(channel).send(request(FrontendReq::SET_OWNER, &[]), vec![fd]).expect("send");
        }),
    ];
    for (name, give) in gives {
        let (fd, _peer) = lingering_socket();
        let mut rig = rig();
        let mut frontend = rig.connect();
        give(&mut rig, &mut frontend, fd);
        let start = std::time::Instant::now();
        rig.process();
        drop(frontend);
        rig.process();
        rig.device.reset();
        rig.bring_up(feature::OFFERED);
        let mut next = rig.connect();
        next.send(request(FrontendReq::SET_OWNER, &[]), vec![]).expect("send");
        rig.process();
        assert!(rig.used(0).is_some_and(|bytes| bytes.len() == HEADER_SIZE), "{name}");
        let elapsed = start.elapsed();
        assert!(elapsed < std::time::Duration::from_secs(2), "{name}: {elapsed:?}");
    }
}

/// More than a message may have are lost on the way in, which must not close them either.
#[test]
fn too_many_descriptors_that_take_long_to_close_hold_nothing_up() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let (fd, _peer) = lingering_socket();
    let mut rig = rig();
    let stream = UnixStream::connect(rig.dir.path().join("s")).expect("connect");
    let plain = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    let mut fds = vec![plain.as_fd(); 100];
    fds.push(fd.as_fd());
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(101))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let bytes = request(FrontendReq::SET_OWNER, &[]);
    sendmsg(&stream, &[std::io::IoSlice::new(&bytes)], &mut control, SendFlags::empty()).expect("send");
    drop(fd);
    let start = std::time::Instant::now();
    assert!(is_dropped_and_the_next_served(&mut rig, MessageSocket::new(stream)));
    let elapsed = start.elapsed();
    assert!(elapsed < std::time::Duration::from_secs(2), "{elapsed:?}");
}
