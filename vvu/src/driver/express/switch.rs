//! Chooses the way from a queue's call eventfd of the guest to that of the front-end, and the steps from one way to another
//! that lose no notification. No I/O.
//!
//! Between two ways, both are tied for a moment. A notification that went to the call eventfd which the front-end has just
//! replaced is repeated: the doorbell of the vvu device always signals the newest.

use crate::spec::express::PeerId;
use crate::spec::express::page::Entry;

/// A way to signal the front-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Way {
    /// The doorbell of the vvu device: the proxy signals the newest call eventfd.
    Proxy,
    /// The doorbell of the express device: the VMM signals the call eventfd of a peer.
    Peer(PeerId),
}

/// A step from one way to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    /// From now on, signals of the queue's eventfd go this way, too.
    Tie(Way),
    /// From now on, they do not.
    Untie(Way),
    /// Ring the doorbell of the vvu device once.
    Ring,
    /// Ask whether the VMM knows the call eventfd of a peer.
    Confirm(PeerId),
}

/// Returns the best way, given what the shared page says about a queue, and the steps to it from the way that is `tied`.
/// `replaced` tells that the front-end set a call eventfd, the same or another one, since the last time.
pub(crate) fn follow(tied: Option<Way>, entry: Entry, replaced: bool) -> (Way, Vec<Step>) {
    let way = entry.usable().map_or(Way::Proxy, Way::Peer);
    let mut steps = Vec::new();
    if tied != Some(way) {
        steps.push(Step::Tie(way));
        steps.extend(tied.map(Step::Untie));
    }
    if matches!(tied, Some(Way::Peer(_))) && (replaced || tied != Some(way)) {
        steps.push(Step::Ring);
    }
    if let (Way::Proxy, Some(peer)) = (way, entry.call) {
        steps.push(Step::Confirm(peer));
    }
    (way, steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(id: u16) -> PeerId {
        PeerId::new(id).expect("a peer")
    }

    fn entry(call: u16, registered: u16) -> Entry {
        Entry { call: PeerId::new(call), registered: PeerId::new(registered) }
    }

    #[test]
    fn a_queue_begins_with_the_proxy_and_asks_until_its_peer_is_confirmed() {
        assert_eq!(follow(None, entry(0, 0), true), (Way::Proxy, vec![Step::Tie(Way::Proxy)]));
        let asks = Step::Confirm(peer(1));
        assert_eq!(follow(None, entry(1, 0), true), (Way::Proxy, vec![Step::Tie(Way::Proxy), asks]));
        assert_eq!(follow(Some(Way::Proxy), entry(1, 0), false), (Way::Proxy, vec![asks]));
        let changes = vec![Step::Tie(Way::Peer(peer(1))), Step::Untie(Way::Proxy)];
        assert_eq!(follow(Some(Way::Proxy), entry(1, 1), false), (Way::Peer(peer(1)), changes));
        assert_eq!(follow(Some(Way::Peer(peer(1))), entry(1, 1), false), (Way::Peer(peer(1)), vec![]));
    }

    #[test]
    fn what_may_have_gone_to_a_replaced_eventfd_is_repeated() {
        let old = Some(Way::Peer(peer(1)));
        let untied = |way| vec![Step::Tie(way), Step::Untie(Way::Peer(peer(1))), Step::Ring];
        assert_eq!(follow(old, entry(2, 2), true), (Way::Peer(peer(2)), untied(Way::Peer(peer(2)))));
        assert_eq!(follow(old, entry(0, 0), false), (Way::Proxy, untied(Way::Proxy)));
        assert_eq!(follow(old, entry(1, 1), true), (Way::Peer(peer(1)), vec![Step::Ring]));
        let asks = [untied(Way::Proxy), vec![Step::Confirm(peer(2))]].concat();
        assert_eq!(follow(old, entry(2, 1), true), (Way::Proxy, asks));
    }
}
