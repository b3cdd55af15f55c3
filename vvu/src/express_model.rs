//! A model of the express device that is walked exhaustively: whatever the order of events, no notification is lost.
//!
//! The proxy's [`Peers`] and the driver's [`follow`] are the real ones. Between them the model has a queue of messages to
//! the VMM, the guest's ties, and a page whose two words are read one after the other. What a front-end may rely on is
//! what vhost-user gives it: once a message that replaces a call eventfd was passed to the back-end, and so could be
//! acknowledged, notifications reach the new one; until then, either.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::device::express::peers::{Changes, Peers};
use crate::driver::express::switch::{Step, Way, follow};
use crate::spec::addr::QueueIndex;
use crate::spec::express::PeerId;
use crate::spec::express::page::Entry;

const QUEUE: QueueIndex = QueueIndex(0);

/// A call eventfd of the front-end.
type Call = u8;

/// What may happen how often in a walk, so that it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Budget {
    /// Messages of the front-end, and the call eventfds they choose from.
    messages: u8,
    calls: Call,
    notifications: u8,
    /// The front-end disconnects and another one connects.
    sessions: u8,
    /// The driver dies and another one comes.
    drivers: u8,
    /// The VMM closes the connection of the express device, and keeps its peers or loses them.
    hang_ups: u8,
    /// The connection to the VMM is full for a while.
    congestions: u8,
}

/// A message to the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum ToVmm {
    Call(PeerId, Call),
    Confirmation(PeerId),
    Disconnect(PeerId),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    FrontendSets(Option<Call>),
    ProxyRelays,
    VmmHandlesMessage,
    /// The proxy sees that the confirmation of a peer was signalled.
    ProxyHearsOf(PeerId),
    DriverGoesOn,
    /// A guest's kernel writes to all doorbells that the eventfd is tied to, a test double to one of them.
    BackendNotifies(Option<Tied>),
    FrontendLeaves,
    DriverDies,
    VmmHangsUp {
        keeps_peers: bool,
    },
    ConnectionFills,
    ConnectionDrains,
}

impl Event {
    /// Whether this happens by itself sooner or later. Front-end and back-end may have had enough at any time.
    fn is_inevitable(self) -> bool {
        match self {
            Self::ProxyRelays
            | Self::VmmHandlesMessage
            | Self::ProxyHearsOf(_)
            | Self::DriverGoesOn
            | Self::ConnectionDrains => true,
            Self::FrontendSets(_)
            | Self::BackendNotifies(_)
            | Self::FrontendLeaves
            | Self::DriverDies
            | Self::ConnectionFills
            | Self::VmmHangsUp { .. } => false,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Model {
    budget: Budget,
    calls_used: Call,
    /// Messages that the proxy has yet to read.
    socket: VecDeque<Option<Call>>,
    proxy: Proxy,
    to_vmm: VecDeque<ToVmm>,
    vmm: Vmm,
    /// Messages that the driver has yet to take.
    to_driver: VecDeque<Option<Call>>,
    driver: Driver,
    /// The call eventfds of the messages from the last one on that the back-end got, oldest first.
    valid: VecDeque<Option<Call>>,
    /// The back-end has the guest's eventfd.
    serving: bool,
    /// The back-end notified, and no call eventfd that is valid was signalled since.
    owed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Proxy {
    peers: Peers<Call>,
    connected: bool,
    congested: bool,
    newest: Option<Call>,
    page: Entry,
    /// Confirmations that were signalled.
    confirmed: BTreeSet<PeerId>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Vmm {
    calls: BTreeMap<PeerId, Call>,
    confirmations: BTreeSet<PeerId>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Driver {
    way: Option<Way>,
    tied: BTreeSet<Tied>,
    work: Work,
}

/// [`Way`] with an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Tied {
    Proxy,
    Peer(PeerId),
}

/// What the driver is at. `message` is the one it is about to pass on, `None` if it only looks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
enum Work {
    #[default]
    Idle,
    ReadRegistered {
        message: Option<Option<Call>>,
        call: Option<PeerId>,
    },
    Steps {
        message: Option<Option<Call>>,
        way: Way,
        steps: VecDeque<Step>,
    },
}

fn tied(way: Way) -> Tied {
    match way {
        Way::Proxy => Tied::Proxy,
        Way::Peer(peer) => Tied::Peer(peer),
    }
}

impl Model {
    fn new(budget: Budget) -> Self {
        Self {
            budget,
            calls_used: 0,
            socket: VecDeque::new(),
            proxy: Proxy {
                peers: Peers::new(1),
                connected: true,
                congested: false,
                newest: None,
                page: Entry::default(),
                confirmed: BTreeSet::new(),
            },
            to_vmm: VecDeque::new(),
            vmm: Vmm::default(),
            to_driver: VecDeque::new(),
            driver: Driver::default(),
            valid: VecDeque::new(),
            serving: false,
            owed: false,
        }
    }

    /// The newest call eventfd, or none as the front-end wished, was signalled.
    fn signalled(&mut self, call: Option<Call>) {
        if self.valid.contains(&call) {
            self.owed = false;
        }
    }

    /// A write to a doorbell of the guest.
    fn ring(&mut self, way: Tied) {
        match way {
            Tied::Proxy => self.signalled(self.proxy.newest),
            Tied::Peer(peer) => {
                if let Some(call) = self.vmm.calls.get(&peer).copied() {
                    self.signalled(Some(call));
                }
            }
        }
    }

    /// Everything that can happen next.
    fn events(&self) -> Vec<Event> {
        let mut events = vec![Event::DriverGoesOn];
        if self.budget.messages > 0 {
            // A new call eventfd is the one with the next number: other choices differ in the numbers alone.
            let calls = self.budget.calls.min(self.calls_used + 1);
            events.extend((0..calls).map(Some).chain([None]).map(Event::FrontendSets));
        }
        if !self.socket.is_empty() {
            events.push(Event::ProxyRelays);
        }
        if !self.to_vmm.is_empty() {
            events.push(Event::VmmHandlesMessage);
        }
        events.extend(self.proxy.confirmed.iter().copied().map(Event::ProxyHearsOf));
        if self.budget.notifications > 0 && self.serving {
            events.push(Event::BackendNotifies(None));
            events.extend(self.driver.tied.iter().copied().map(Some).map(Event::BackendNotifies));
        }
        if self.budget.sessions > 0 {
            events.push(Event::FrontendLeaves);
        }
        if self.budget.drivers > 0 {
            events.push(Event::DriverDies);
        }
        if self.budget.congestions > 0 && self.proxy.connected {
            events.push(Event::ConnectionFills);
        }
        if self.proxy.congested {
            events.push(Event::ConnectionDrains);
        }
        if self.budget.hang_ups > 0 && self.proxy.connected {
            events.extend([true, false].map(|keeps_peers| Event::VmmHangsUp { keeps_peers }));
        }
        events
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::FrontendSets(call) => {
                self.budget.messages -= 1;
                self.calls_used = self.calls_used.max(call.map_or(0, |call| call + 1));
                self.socket.push_back(call);
                self.valid.push_back(call);
            }
            Event::ProxyRelays => self.relay(),
            Event::VmmHandlesMessage => self.handle_in_vmm(),
            Event::ProxyHearsOf(peer) => {
                self.proxy.confirmed.remove(&peer);
                self.proxy.peers.confirm(peer);
                self.proxy.page = self.proxy.peers.entry(QUEUE);
            }
            Event::DriverGoesOn => self.drive(),
            Event::BackendNotifies(tied) => {
                self.budget.notifications -= 1;
                self.owed = true;
                let all = self.driver.tied.clone();
                tied.map_or(all, |tied| BTreeSet::from([tied])).into_iter().for_each(|tied| self.ring(tied));
            }
            Event::FrontendLeaves => {
                self.budget.sessions -= 1;
                self.end_session();
            }
            Event::DriverDies => {
                self.budget.drivers -= 1;
                self.end_session();
                self.driver = Driver::default();
            }
            Event::ConnectionFills => {
                self.budget.congestions -= 1;
                self.proxy.congested = true;
            }
            Event::ConnectionDrains => {
                self.proxy.congested = false;
                if self.proxy.newest.is_some() {
                    self.set_call(self.proxy.newest);
                }
            }
            Event::VmmHangsUp { keeps_peers } => {
                self.budget.hang_ups -= 1;
                (self.proxy.connected, self.proxy.congested) = (false, false);
                self.proxy.peers.clear();
                self.proxy.page = Entry::default();
                self.to_vmm.clear();
                if !keeps_peers {
                    self.vmm = Vmm::default();
                }
            }
        }
    }

    fn relay(&mut self) {
        let Some(call) = self.socket.pop_front() else { return };
        self.proxy.newest = call;
        self.set_call(call);
        self.to_driver.push_back(call);
    }

    fn set_call(&mut self, call: Option<Call>) {
        let connected = self.proxy.connected;
        let may_connect = connected && !self.proxy.congested;
        let Changes { disconnect, connect } =
            self.proxy.peers.set_call(QUEUE, call, may_connect, |a, b| a == b);
        if connected {
            self.to_vmm.extend(disconnect.into_iter().map(ToVmm::Disconnect));
        }
        if let (Some(id), Some(call)) = (connect, call) {
            self.to_vmm.extend([ToVmm::Call(id, call), ToVmm::Confirmation(id)]);
        }
        self.proxy.page = self.proxy.peers.entry(QUEUE);
    }

    fn handle_in_vmm(&mut self) {
        match self.to_vmm.pop_front() {
            Some(ToVmm::Call(id, call)) => drop(self.vmm.calls.insert(id, call)),
            Some(ToVmm::Confirmation(id)) => drop(self.vmm.confirmations.insert(id)),
            Some(ToVmm::Disconnect(id)) => {
                assert!(self.vmm.calls.remove(&id).is_some(), "{id:?} is not connected");
                self.vmm.confirmations.remove(&id);
            }
            None => {}
        }
    }

    fn drive(&mut self) {
        self.driver.work = match std::mem::take(&mut self.driver.work) {
            Work::Idle => match self.to_driver.pop_front() {
                // A message without an eventfd changes nothing for the driver.
                Some(None) => {
                    self.pass_on(None);
                    Work::Idle
                }
                Some(message) => Work::ReadRegistered { message: Some(message), call: self.proxy.page.call },
                None if self.driver.way.is_some() && self.look_is_due() => {
                    Work::ReadRegistered { message: None, call: self.proxy.page.call }
                }
                None => Work::Idle,
            },
            Work::ReadRegistered { message, call } => {
                let entry = Entry { call, registered: self.proxy.page.registered };
                let (way, steps) = follow(self.driver.way, entry, message.is_some());
                Work::Steps { message, way, steps: steps.into() }
            }
            Work::Steps { message, way, mut steps } => match steps.pop_front() {
                Some(step) => {
                    self.take(step);
                    Work::Steps { message, way, steps }
                }
                None => {
                    self.driver.way = Some(way);
                    if let Some(call) = message {
                        self.pass_on(call);
                        self.serving = true;
                    }
                    Work::Idle
                }
            },
        };
    }

    /// Whether a look at the page would change anything, now or when the answer to it comes.
    fn look_is_due(&self) -> bool {
        let (way, steps) = follow(self.driver.way, self.proxy.page, false);
        let confirms = |step: &Step| match step {
            Step::Confirm(peer) => self.vmm.confirmations.contains(peer),
            _ => true,
        };
        self.driver.way != Some(way) || steps.iter().any(confirms)
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Tie(way) => drop(self.driver.tied.insert(tied(way))),
            Step::Untie(way) => drop(self.driver.tied.remove(&tied(way))),
            Step::Ring => self.ring(Tied::Proxy),
            Step::Confirm(peer) => {
                if self.vmm.confirmations.contains(&peer) {
                    self.proxy.confirmed.insert(peer);
                }
            }
        }
    }

    /// The back-end gets a message of the front-end.
    fn pass_on(&mut self, call: Option<Call>) {
        // A front-end without a call eventfd looks for itself.
        self.owed &= call.is_some();
        while self.valid.len() > 1 && self.valid.len() > self.to_driver.len() + self.socket.len() + 1 {
            self.valid.pop_front();
        }
        assert_eq!(self.valid.front(), Some(&call));
    }

    fn end_session(&mut self) {
        self.socket.clear();
        self.to_driver.clear();
        self.valid.clear();
        (self.serving, self.owed) = (false, false);
        self.proxy.newest = None;
        let peers = self.proxy.peers.clear();
        if self.proxy.connected {
            self.to_vmm.extend(peers.into_iter().map(ToVmm::Disconnect));
        }
        self.proxy.confirmed.clear();
        self.proxy.page = Entry::default();
        // What the driver was about to pass on has no front-end any more.
        match &mut self.driver.work {
            Work::Idle => {}
            Work::ReadRegistered { message, .. } | Work::Steps { message, .. } => {
                *message = None;
            }
        }
    }
}

/// Walks over all states; returns their number.
fn walk(budget: Budget) -> usize {
    // Hashes of 64 bits: two of a million states have the same one with a probability of one in ten millions.
    let mut seen = HashSet::new();
    // How each state was reached: the index of the one before, and the event.
    let mut history: Vec<(usize, Event)> = Vec::new();
    let mut stack = vec![(Model::new(budget), usize::MAX)];
    let mut ends = 0;
    while let Some((model, at)) = stack.pop() {
        let mut settled = true;
        for event in model.events() {
            let mut next = model.clone();
            let applied = catch_unwind(AssertUnwindSafe(|| next.apply(event)));
            assert!(applied.is_ok(), "{event:?} after {:#?}", path(&history, at));
            if next == model {
                continue;
            }
            settled &= !event.is_inevitable();
            if seen.insert(hash(&next)) {
                history.push((at, event));
                stack.push((next, history.len() - 1));
            }
        }
        if settled {
            ends += 1;
            check_settled(&model, || path(&history, at));
        }
    }
    assert!(ends > 0);
    println!("{} states", seen.len());
    seen.len()
}

fn hash(model: &Model) -> u64 {
    let mut hasher = DefaultHasher::new();
    model.hash(&mut hasher);
    hasher.finish()
}

/// Checks a state in which nothing is left to do.
fn check_settled(model: &Model, path: impl Fn() -> Vec<Event>) {
    assert!(!model.owed, "a notification is lost: {model:?} after {:#?}", path());
    let way = model.driver.way;
    let stays = way == Some(Way::Proxy) && model.proxy.page.call.is_some();
    assert!(!stays, "the driver does not use the express device: {model:?} after {:#?}", path());
    let ties: Vec<_> = model.driver.tied.iter().copied().collect();
    assert_eq!(ties, way.map(tied).into_iter().collect::<Vec<_>>(), "after {:#?}", path());
}

/// Returns the events that led to a state.
fn path(history: &[(usize, Event)], mut at: usize) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some((before, event)) = history.get(at) {
        events.push(*event);
        at = *before;
    }
    events.reverse();
    events
}

const NOTHING: Budget =
    Budget { messages: 0, calls: 0, notifications: 0, sessions: 0, drivers: 0, hang_ups: 0, congestions: 0 };

#[test]
fn replaced_call_eventfds_lose_nothing() {
    let states = walk(Budget { messages: 3, calls: 3, notifications: 1, ..NOTHING });
    assert!(states > 10_000, "{states}");
}

#[test]
fn sessions_that_end_lose_nothing() {
    let states = walk(Budget { messages: 2, calls: 2, notifications: 1, sessions: 1, ..NOTHING });
    assert!(states > 1000, "{states}");
}

#[test]
fn drivers_that_die_lose_nothing() {
    let states = walk(Budget { messages: 2, calls: 2, notifications: 1, drivers: 1, ..NOTHING });
    assert!(states > 1000, "{states}");
}

#[test]
fn a_vmm_that_hangs_up_loses_nothing() {
    let states = walk(Budget { messages: 2, calls: 2, notifications: 1, hang_ups: 1, ..NOTHING });
    assert!(states > 1000, "{states}");
}

#[test]
fn a_vmm_that_is_slow_loses_nothing() {
    let states = walk(Budget { messages: 2, calls: 2, notifications: 1, congestions: 1, ..NOTHING });
    assert!(states > 1000, "{states}");
}

/// Takes minutes: run it after a change of the protocol.
#[test]
#[ignore = "takes minutes"]
fn nothing_is_lost_whatever_happens() {
    let all = Budget {
        messages: 4,
        calls: 3,
        notifications: 2,
        sessions: 1,
        drivers: 1,
        hang_ups: 1,
        congestions: 1,
    };
    walk(all);
}
