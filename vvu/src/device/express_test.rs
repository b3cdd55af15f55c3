use super::*;
use std::io::Write;
use std::os::fd::AsFd;
use std::time::Instant;

use ivshmem::Ivshmem;
use peers::LIMITS;
use rustix::event::Timespec;
use tempfile::TempDir;

use super::super::closer::Closer;
use super::super::events::Events;
use super::super::sibling_memory::SiblingMemory;
use crate::event::{Ready, wait_readable};

#[path = "../../tests/common/ivshmem.rs"]
mod ivshmem;

const QUEUES: u16 = 4;
const Q0: QueueIndex = QueueIndex(0);
const Q1: QueueIndex = QueueIndex(1);

struct Rig {
    express: Express,
    resources: Resources,
    /// Call eventfds were to be set again.
    can_connect: bool,
    dir: TempDir,
}

impl Rig {
    fn new(queues: u16) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let listener = UnixListener::bind(dir.path().join("s")).expect("bind");
        let events = Events::new().expect("events");
        let closer = Closer::new(events.again_event()).expect("thread");
        let memory = SiblingMemory::create(1 << 20).expect("memory");
        let resources = Resources { memory, queues, events, closer, trace: None, ledgers: None };
        let express = Express::new(listener, [7; 16], &resources).expect("express");
        Self { express, resources, can_connect: false, dir }
    }

    fn stream(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("s")).expect("connect")
    }

    fn process(&mut self) {
        let mut ready = Ready::new();
        self.resources.events.set().wait(Some(&Timespec::default()), &mut ready).expect("look");
        for number in ready.function {
            match Source::from_number(number) {
                Source::Express | Source::Again => self.can_connect |= self.express.process(&self.resources),
                Source::Confirmation(id) => self.express.confirm(&self.resources, id),
                _ => {}
            }
        }
    }

    /// A device that has been greeted.
    fn connect(&mut self) -> Ivshmem {
        let mut vmm = Ivshmem::new(self.stream());
        self.process();
        let _ = vmm.handle_all();
        vmm
    }

    fn set_call(&mut self, queue: QueueIndex, call: &Event) {
        let call = Eventfd::new(std::os::fd::OwnedFd::from(call.try_clone().expect("clone")));
        self.express.set_call(&self.resources, queue, Some(&call));
    }
}

fn event() -> Event {
    Event::new().expect("event")
}

fn entry(vmm: &Ivshmem, queue: QueueIndex) -> Entry {
    Entry::from_values([Entry::call_offset(queue), Entry::registered_offset(queue)].map(|offset| {
        let mut bytes = [0; 4];
        vmm.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }))
}

/// Rings the confirmation of a queue's peer, as a guest driver does.
fn confirm(rig: &mut Rig, vmm: &Ivshmem, queue: QueueIndex) {
    vmm.ring(entry(vmm, queue).call.expect("a peer").confirm());
    rig.process();
}

/// A new call eventfd of queue 0 gets a peer, which the guest can confirm and signal.
fn assert_serves(rig: &mut Rig, vmm: &mut Ivshmem) {
    let call = event();
    rig.set_call(Q0, &call);
    let _ = vmm.handle_all();
    confirm(rig, vmm, Q0);
    vmm.ring(entry(vmm, Q0).usable().expect("confirmed").call());
    assert_eq!(call.drain(), 1);
}

#[test]
fn a_vmm_is_greeted_and_finds_the_page() {
    let mut rig = Rig::new(QUEUES);
    let vmm = rig.connect();
    let mut bytes = [0; page::HEADER_SIZE];
    vmm.read(0, &mut bytes);
    assert_eq!(Header::parse(&bytes), Some(Header { queues: QUEUES, uuid: [7; 16] }));
    assert_eq!(entry(&vmm, Q0), Entry::default());
}

#[test]
fn the_guest_signals_the_newest_call_eventfd_once_it_is_confirmed() {
    let mut rig = Rig::new(QUEUES);
    let mut vmm = rig.connect();
    let call = event();
    rig.set_call(Q1, &call);
    let before = entry(&vmm, Q1);
    assert_eq!((before.usable(), entry(&vmm, Q0)), (None, Entry::default()));
    confirm(&mut rig, &vmm, Q1);
    assert_eq!(entry(&vmm, Q1), before, "the VMM has yet to handle the messages");
    vmm.handle_one();
    confirm(&mut rig, &vmm, Q1);
    assert_eq!(entry(&vmm, Q1), before);
    vmm.handle_one();
    confirm(&mut rig, &vmm, Q1);
    let peer = entry(&vmm, Q1).usable().expect("confirmed");
    vmm.ring(peer.call());
    assert_eq!(call.drain(), 1);
    confirm(&mut rig, &vmm, Q1);
    assert_eq!(entry(&vmm, Q1).usable(), Some(peer), "another confirmation changes nothing");
}

#[test]
fn the_same_eventfd_keeps_its_peer_and_others_are_disconnected_in_turn() {
    let mut rig = Rig::new(QUEUES);
    let mut vmm = rig.connect();
    let (one, other) = (event(), event());
    for _ in 0..100 {
        rig.set_call(Q0, &one);
        rig.set_call(Q0, &other);
    }
    let _ = vmm.handle_all();
    assert_eq!(vmm.peers(), (vec![1, 2], 2));
    confirm(&mut rig, &vmm, Q0);
    vmm.ring(entry(&vmm, Q0).usable().expect("confirmed").call());
    assert_eq!((one.drain(), other.drain()), (0, 1));
    for _ in 0..100 {
        rig.set_call(Q0, &event());
        let _ = vmm.handle_all();
    }
    assert_eq!(vmm.peers(), (vec![101, 102], 102));
}

#[test]
fn a_session_that_ends_takes_its_peers_along() {
    let mut rig = Rig::new(QUEUES);
    let mut vmm = rig.connect();
    let call = event();
    rig.set_call(Q0, &call);
    rig.set_call(Q1, &event());
    let _ = vmm.handle_all();
    confirm(&mut rig, &vmm, Q0);
    let old = entry(&vmm, Q0).usable().expect("confirmed");
    rig.express.clear(&rig.resources);
    assert_eq!((entry(&vmm, Q0), entry(&vmm, Q1)), (Entry::default(), Entry::default()));
    let _ = vmm.handle_all();
    assert_eq!((vmm.peers(), rig.express.confirmations.len()), ((vec![], 2), 0));
    vmm.ring(old.call());
    assert_eq!(call.drain(), 0);
    rig.set_call(Q0, &call);
    let _ = vmm.handle_all();
    assert_eq!(vmm.peers(), (vec![3], 3));
}

#[test]
fn without_a_vmm_there_are_no_peers() {
    let mut rig = Rig::new(QUEUES);
    let call = event();
    rig.set_call(Q0, &call);
    rig.process();
    let mut vmm = rig.connect();
    assert_eq!(entry(&vmm, Q0), Entry::default());
    rig.set_call(Q0, &call);
    let _ = vmm.handle_all();
    assert_eq!(vmm.peers(), (vec![1], 1));
}

#[test]
fn a_vmm_that_leaves_makes_room_for_the_next() {
    let mut rig = Rig::new(QUEUES);
    let vmm = rig.connect();
    let mut next = rig.connect();
    rig.set_call(Q0, &event());
    assert!(!next.handle_one(), "the second VMM has to wait");
    drop(vmm);
    rig.process();
    let _ = next.handle_all();
    assert_eq!((entry(&next, Q0), next.peers()), (Entry::default(), (vec![], 0)));
    rig.set_call(Q0, &event());
    let _ = next.handle_all();
    assert_eq!(next.peers(), (vec![2], 1));
}

/// QEMU corrupts its memory when it hears of one number twice.
#[test]
fn a_vmm_that_connects_again_hears_of_no_number_twice() {
    let mut rig = Rig::new(QUEUES);
    let mut vmm = rig.connect();
    let call = event();
    for _ in 0..5 {
        rig.set_call(Q0, &event());
        rig.set_call(Q0, &event());
        rig.set_call(Q0, &call);
        let _ = vmm.handle_all();
        // The server hangs up on a VMM that talks.
        vmm.send(&[0; ServerMessage::SIZE]);
        rig.process();
        assert!(rig.express.vmm.is_none());
        vmm.reconnect(rig.stream());
        rig.process();
        let _ = vmm.handle_all();
        assert_eq!(entry(&vmm, Q0), Entry::default());
    }
}

#[test]
fn the_guest_of_an_earlier_vmm_sees_nothing_of_the_next_ones_peers() {
    let mut rig = Rig::new(QUEUES);
    let mut vmm = rig.connect();
    rig.set_call(Q0, &event());
    let _ = vmm.handle_all();
    confirm(&mut rig, &vmm, Q0);
    assert!(entry(&vmm, Q0).usable().is_some());
    vmm.send(&[0; ServerMessage::SIZE]);
    rig.process();
    let mut next = rig.connect();
    rig.set_call(Q0, &event());
    let _ = next.handle_all();
    confirm(&mut rig, &next, Q0);
    assert!(entry(&next, Q0).usable().is_some());
    assert_eq!(entry(&vmm, Q0), Entry::default());
}

#[test]
fn a_vmm_that_talks_is_hung_up_on() {
    let mut rig = Rig::new(QUEUES);
    for message in [&[0; 8][..], &[0; 1000]] {
        let mut stream = rig.stream();
        rig.process();
        stream.write_all(message).expect("write");
        rig.process();
        assert!(rig.express.vmm.is_none());
    }
    let mut vmm = rig.connect();
    rig.set_call(Q0, &event());
    let _ = vmm.handle_all();
    assert_eq!(vmm.peers(), (vec![1], 1));
}

/// Nobody reads, so the socket fills; the server goes on, with bounded memory, and all the rest stays in order.
#[test]
fn a_slow_vmm_gets_fewer_peers_and_every_disconnection() {
    let mut rig = Rig::new(QUEUES);
    let mut vmm = rig.connect();
    rig.can_connect = false;
    for round in 0..2000 {
        rig.set_call(QueueIndex(round % QUEUES), &event());
        rig.process();
    }
    let congested = rig.express.vmm.as_ref().is_some_and(FramedSocket::is_congested);
    assert!(congested, "the socket of this machine takes more than it should");
    assert_eq!(entry(&vmm, Q0), Entry::default(), "a congested VMM gets no peers");
    assert!(rig.express.confirmations.len() <= usize::from(QUEUES) * 2);
    rig.express.clear(&rig.resources);
    assert!(!std::mem::take(&mut rig.can_connect));
    while vmm.handle_one() {
        rig.process();
    }
    assert!(rig.can_connect, "call eventfds without a peer can get one now");
    assert!(vmm.peers().0.is_empty());
    assert_serves(&mut rig, &mut vmm);
}

#[test]
fn a_dead_vmm_costs_its_peers_and_nothing_else() {
    let mut rig = Rig::new(QUEUES);
    let vmm = rig.connect();
    rig.set_call(Q0, &event());
    drop(vmm);
    // The server learns of it by sending.
    rig.set_call(Q0, &event());
    assert!(rig.express.vmm.is_none() && rig.express.confirmations.is_empty());
    rig.process();
    let mut next = rig.connect();
    rig.set_call(Q0, &event());
    let _ = next.handle_all();
    assert_eq!(next.peers(), (vec![3], 1));
}

/// The server learns of its end when it makes room for a peer.
#[test]
fn a_vmm_that_dies_while_its_queue_is_full_leaves_nothing_behind() {
    let mut rig = Rig::new(QUEUES);
    let vmm = rig.connect();
    rig.set_call(Q0, &event());
    rig.set_call(Q0, &event());
    drop(vmm);
    rig.set_call(Q0, &event());
    assert!(rig.express.vmm.is_none());
    assert!(rig.express.confirmations.is_empty(), "{:?}", rig.express.confirmations);
}

/// Whatever a VMM sends, and however it leaves, the next one is served.
#[test]
fn vmms_that_leave_in_every_way_make_room() {
    let mut rig = Rig::new(QUEUES);
    let talks: [&[u8]; 4] = [&[], &[0], &[0xff; ServerMessage::SIZE - 1], &[7; ServerMessage::SIZE + 1]];
    for bytes in talks {
        for with_calls in [false, true] {
            let mut stream = rig.stream();
            rig.process();
            if with_calls {
                rig.set_call(Q0, &event());
                rig.set_call(Q1, &event());
            }
            stream.write_all(bytes).expect("write");
            rig.process();
            // Nothing of the greeting or of the peers was read.
            drop(stream);
            rig.process();
            assert!(rig.express.vmm.is_none() && rig.express.confirmations.is_empty(), "{bytes:?}");
        }
    }
    let mut vmm = rig.connect();
    assert_serves(&mut rig, &mut vmm);
}

#[test]
fn a_vmm_that_sends_file_descriptors_is_hung_up_on() {
    let mut rig = Rig::new(QUEUES);
    let stream = rig.stream();
    rig.process();
    let mut sender: FramedSocket<FromVmm> = FramedSocket::new(stream);
    let fds = (0..2).map(|_| event().try_clone().expect("dup").into()).collect();
    sender.send(vec![0], fds).expect("send");
    rig.process();
    assert!(rig.express.vmm.is_none());
}

/// One VMM is served, the others wait, and none of them costs the server anything.
#[test]
fn many_vmms_at_once_are_served_in_turn() {
    let mut rig = Rig::new(QUEUES);
    let mut waiting: Vec<_> = (0..20).map(|_| Ivshmem::new(rig.stream())).collect();
    let call = event();
    while let Some(mut vmm) = (!waiting.is_empty()).then(|| waiting.remove(0)) {
        rig.process();
        let _ = vmm.handle_all();
        assert!(vmm.is_ready());
        assert!(waiting.iter_mut().all(|vmm| !vmm.handle_one()), "only one is served");
        rig.set_call(Q0, &call);
        let _ = vmm.handle_all();
        confirm(&mut rig, &vmm, Q0);
        vmm.ring(entry(&vmm, Q0).usable().expect("confirmed").call());
        assert_eq!(call.drain(), 1);
        drop(vmm);
        rig.process();
    }
}

#[test]
fn numbers_that_are_used_up_leave_the_other_queues_their_peers() {
    const NUMBERS: u16 = 50;
    let mut rig = Rig::new(QUEUES);
    rig.express.set_limits(Limits { last: PeerId::new(NUMBERS).expect("a peer"), ..LIMITS });
    let mut vmm = rig.connect();
    let call = event();
    rig.set_call(Q1, &call);
    let _ = vmm.handle_all();
    confirm(&mut rig, &vmm, Q1);
    for _ in 1..NUMBERS {
        rig.set_call(Q0, &event());
        let _ = vmm.handle_all();
    }
    assert!(entry(&vmm, Q0).call.is_some() && rig.express.peers.is_exhausted());
    rig.set_call(Q0, &event());
    assert_eq!(entry(&vmm, Q0), Entry::default(), "the doorbell of the vvu device is the way");
    vmm.ring(entry(&vmm, Q1).usable().expect("confirmed").call());
    assert_eq!(call.drain(), 1);
}

#[test]
fn the_guest_may_write_what_it_likes_into_the_page() {
    let mut rig = Rig::new(QUEUES);
    let mut vmm = rig.connect();
    let call = event();
    rig.set_call(Q0, &call);
    vmm.write(0, &[0xff; page::SIZE]);
    rig.set_call(Q1, &event());
    let _ = vmm.handle_all();
    confirm(&mut rig, &vmm, Q1);
    assert!(entry(&vmm, Q1).usable().is_some());
    rig.set_call(Q0, &call);
    confirm(&mut rig, &vmm, Q0);
    vmm.ring(entry(&vmm, Q0).usable().expect("confirmed").call());
    assert_eq!(call.drain(), 1);
}

#[test]
fn the_server_wakes_the_device_for_a_vmm() {
    let rig = Rig::new(QUEUES);
    let _stream = rig.stream();
    let deadline = Instant::now() + std::time::Duration::from_secs(20);
    assert_eq!(wait_readable(&[rig.resources.events.set().as_fd()], Some(deadline)).expect("wait"), Some(0));
}
