//! Numbers the call eventfds of the front-end as peers of the express device. No I/O.
//!
//! A queue keeps its last few peers, since a VMM goes back and forth between two eventfds when its guest masks and
//! unmasks an interrupt. A peer that is not its queue's newest may be disconnected at any moment: when the newest changes,
//! the front-end's message is on its way to the guest driver, which then signals by way of the proxy once.

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

use crate::spec::addr::QueueIndex;
use crate::spec::express::page::Entry;
use crate::spec::express::{PeerId, VECTORS};

/// Bounds of the peers that a VMM has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Limits {
    /// Peers that a queue keeps.
    pub(crate) per_queue: usize,
    /// Most peers at a time.
    pub(crate) total: usize,
    /// The last number of a peer.
    pub(crate) last: PeerId,
}

/// The limits of QEMU. Each vector of a peer takes one of the about 1000 MMIO ranges that KVM watches for a VM, and QEMU
/// aborts when there are no more.
pub(crate) const LIMITS: Limits = Limits { per_queue: 2, total: 256 / VECTORS, last: PeerId::LAST };

/// The peers of the VMM, whose call eventfds are of type `E`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Peers<E> {
    limits: Limits,
    queues: Vec<Queue<E>>,
    /// The next number to give to a peer: QEMU corrupts its memory when a number is used twice.
    next: Option<PeerId>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Queue<E> {
    /// The last one used first.
    peers: Vec<Peer<E>>,
    /// The first of `peers` has the queue's newest call eventfd.
    current: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Peer<E> {
    id: PeerId,
    call: E,
    registered: bool,
}

/// A peer as it is saved: number, call eventfd, and whether it is registered.
type SavedPeer = (u16, RawFd, bool);

/// Peers as they are saved: those of each queue, and whether the first of them is the queue's newest.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SavedPeers {
    queues: Vec<(Vec<SavedPeer>, bool)>,
    next: Option<u16>,
}

/// Messages for the VMM, in this order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Peers to disconnect.
    pub(crate) disconnect: Vec<PeerId>,
    /// A peer to connect, with the new call eventfd.
    pub(crate) connect: Option<PeerId>,
}

impl<E> Peers<E> {
    /// No peers for so many queues.
    pub(crate) fn new(queues: u16) -> Self {
        Self::with_limits(queues, LIMITS)
    }

    /// As [`new`](Self::new), with other limits than QEMU's.
    pub(crate) fn with_limits(queues: u16, limits: Limits) -> Self {
        let queues = (0..queues).map(|_| Queue { peers: Vec::new(), current: false }).collect();
        Self { limits, queues, next: Some(PeerId::FIRST) }
    }

    /// Makes `call` the call eventfd of `queue`; `same` tells whether two are one and the same eventfd. A new one gets a
    /// peer if `may_connect`, and if numbers and room are left.
    pub(crate) fn set_call(
        &mut self,
        queue: QueueIndex,
        call: Option<E>,
        may_connect: bool,
        same: impl Fn(&E, &E) -> bool,
    ) -> Changes {
        let mut changes = Changes { disconnect: Vec::new(), connect: None };
        let count: usize = self.queues.iter().map(|queue| queue.peers.len()).sum();
        let Some(queue) = self.queues.get_mut(usize::from(queue.0)) else { return changes };
        queue.current = false;
        let Some(call) = call else { return changes };
        if let Some(known) = queue.peers.iter().position(|peer| same(&peer.call, &call)) {
            queue.peers[..=known].rotate_right(1);
            queue.current = true;
            return changes;
        }
        let Some(id) = self.next.filter(|_| may_connect) else { return changes };
        let mut count = count;
        while queue.peers.len() == self.limits.per_queue || count == self.limits.total {
            let Some(oldest) = queue.peers.pop() else { return changes };
            changes.disconnect.push(oldest.id);
            count -= 1;
        }
        self.next = id.next().filter(|next| *next <= self.limits.last);
        changes.connect = Some(id);
        queue.peers.insert(0, Peer { id, call, registered: false });
        queue.current = true;
        changes
    }

    /// The VMM knows the call eventfd of peer `id`. Returns its queue, `None` if the peer is no more.
    pub(crate) fn confirm(&mut self, id: PeerId) -> Option<QueueIndex> {
        for (index, queue) in (0..).zip(&mut self.queues) {
            if let Some(peer) = queue.peers.iter_mut().find(|peer| peer.id == id) {
                peer.registered = true;
                return Some(QueueIndex(index));
            }
        }
        None
    }

    /// Takes peer `id` back, which could not be connected.
    pub(crate) fn withdraw(&mut self, id: PeerId) {
        for queue in &mut self.queues {
            if queue.peers.first().is_some_and(|peer| peer.id == id) {
                queue.current = false;
            }
            queue.peers.retain(|peer| peer.id != id);
        }
    }

    /// Returns the state for a successor; `number` names a call eventfd there.
    pub(crate) fn save(&self, number: impl Fn(&E) -> RawFd) -> SavedPeers {
        let peer = |peer: &Peer<E>| (peer.id.get(), number(&peer.call), peer.registered);
        let queue = |queue: &Queue<E>| (queue.peers.iter().map(peer).collect(), queue.current);
        SavedPeers { queues: self.queues.iter().map(queue).collect(), next: self.next.map(PeerId::get) }
    }

    /// Restores what [`save`](Self::save) returned; `adopt` makes a call eventfd of its number.
    ///
    /// # Errors
    /// Those of `adopt`.
    pub(crate) fn restore<F>(
        saved: SavedPeers,
        mut adopt: impl FnMut(RawFd) -> Result<E, F>,
    ) -> Result<Self, F> {
        let mut queues = Vec::new();
        for (saved, current) in saved.queues {
            let mut peers = Vec::new();
            for (id, call, registered) in saved {
                let call = adopt(call)?;
                peers.extend(PeerId::new(id).map(|id| Peer { id, call, registered }));
            }
            queues.push(Queue { peers, current });
        }
        Ok(Self { limits: LIMITS, queues, next: saved.next.and_then(PeerId::new) })
    }

    /// Forgets all peers and returns them; their numbers stay used.
    pub(crate) fn clear(&mut self) -> Vec<PeerId> {
        let mut ids = Vec::new();
        for queue in &mut self.queues {
            queue.current = false;
            ids.extend(queue.peers.drain(..).map(|peer| peer.id));
        }
        ids
    }

    /// Returns the entry of `queue` in the page.
    pub(crate) fn entry(&self, queue: QueueIndex) -> Entry {
        let queue = self.queues.get(usize::from(queue.0)).filter(|queue| queue.current);
        let Some(peer) = queue.and_then(|queue| queue.peers.first()) else { return Entry::default() };
        Entry { call: Some(peer.id), registered: peer.registered.then_some(peer.id) }
    }

    /// Returns whether all numbers are used up.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.next.is_none()
    }
}

#[cfg(test)]
#[path = "peers_test.rs"]
mod tests;
