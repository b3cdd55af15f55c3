use super::*;
use std::collections::BTreeSet;

const Q0: QueueIndex = QueueIndex(0);

fn peer(id: u16) -> PeerId {
    PeerId::new(id).expect("a peer")
}

fn set(peers: &mut Peers<u32>, queue: u16, call: u32) -> Changes {
    peers.set_call(QueueIndex(queue), Some(call), true, |a, b| a == b)
}

fn connected(id: u16, disconnect: &[u16]) -> Changes {
    Changes { disconnect: disconnect.iter().map(|id| peer(*id)).collect(), connect: Some(peer(id)) }
}

const NOTHING: Changes = Changes { disconnect: Vec::new(), connect: None };

#[test]
fn a_new_eventfd_gets_a_new_peer_that_is_unregistered_until_confirmed() {
    let mut peers = Peers::new(2);
    assert_eq!(peers.entry(Q0), Entry::default());
    assert_eq!(set(&mut peers, 0, 10), connected(1, &[]));
    assert_eq!(peers.entry(Q0), Entry { call: Some(peer(1)), registered: None });
    assert_eq!(peers.confirm(peer(1)), Some(Q0));
    assert_eq!(peers.entry(Q0).usable(), Some(peer(1)));
    assert_eq!(peers.entry(QueueIndex(1)), Entry::default());
    assert_eq!(peers.confirm(peer(2)), None);
}

#[test]
fn two_eventfds_that_take_turns_keep_their_peers() {
    let mut peers = Peers::new(1);
    set(&mut peers, 0, 10);
    set(&mut peers, 0, 11);
    peers.confirm(peer(1));
    for _ in 0..3 {
        assert_eq!(set(&mut peers, 0, 10), NOTHING);
        assert_eq!(peers.entry(Q0).usable(), Some(peer(1)));
        assert_eq!(set(&mut peers, 0, 11), NOTHING);
        assert_eq!(peers.entry(Q0), Entry { call: Some(peer(2)), registered: None });
    }
}

#[test]
fn the_peer_that_was_not_used_for_longest_makes_room() {
    let mut peers = Peers::new(1);
    set(&mut peers, 0, 10);
    set(&mut peers, 0, 11);
    set(&mut peers, 0, 10);
    assert_eq!(set(&mut peers, 0, 12), connected(3, &[2]));
    assert_eq!(peers.confirm(peer(2)), None);
    assert_eq!(set(&mut peers, 0, 11), connected(4, &[1]));
}

#[test]
fn a_queue_without_a_call_eventfd_has_no_entry() {
    let mut peers = Peers::new(1);
    set(&mut peers, 0, 10);
    peers.confirm(peer(1));
    assert_eq!(peers.set_call(Q0, None, true, |a, b| a == b), NOTHING);
    assert_eq!(peers.entry(Q0), Entry::default());
    assert_eq!(set(&mut peers, 0, 10), NOTHING);
    assert_eq!(peers.entry(Q0).usable(), Some(peer(1)));
}

#[test]
fn what_may_not_be_connected_or_was_withdrawn_has_no_entry() {
    let mut peers = Peers::new(1);
    assert_eq!(peers.set_call(Q0, Some(10), false, |a, b| a == b), NOTHING);
    assert_eq!(peers.entry(Q0), Entry::default());
    set(&mut peers, 0, 10);
    peers.withdraw(peer(1));
    assert_eq!(peers.entry(Q0), Entry::default());
    assert_eq!(set(&mut peers, 0, 10), connected(2, &[]));
    assert_eq!(set(&mut peers, 7, 10), NOTHING, "there is no such queue");
}

#[test]
fn no_number_is_used_twice_and_then_there_are_no_more() {
    let mut peers = Peers::new(1);
    let mut used = BTreeSet::new();
    for call in 0..40_000 {
        let changes = set(&mut peers, 0, call);
        if call % 1000 == 0 {
            peers.clear();
        }
        if let Some(id) = changes.connect {
            assert!(used.insert(id), "{id:?}");
        } else {
            assert_eq!(peers.entry(Q0), Entry::default());
        }
    }
    assert_eq!((used.len(), peers.is_exhausted()), (0x7fff, true));
}

#[test]
fn there_are_never_more_than_the_vmm_can_take() {
    let mut peers = Peers::new(200);
    let mut live = BTreeSet::new();
    for round in 0..3 {
        for queue in 0..200 {
            let changes = set(&mut peers, queue, 1000 * round + u32::from(queue));
            for id in changes.disconnect {
                assert!(live.remove(&id), "{id:?} was connected");
            }
            assert!(changes.connect.is_none_or(|id| live.insert(id)));
            assert!(live.len() <= LIMITS.total);
        }
    }
    assert_eq!(live.len(), LIMITS.total);
    assert_eq!(peers.clear().into_iter().collect::<BTreeSet<_>>(), live);
    assert_eq!(set(&mut peers, 150, 1).disconnect, []);
}
