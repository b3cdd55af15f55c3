//! A model of the express device that is walked exhaustively: whatever the order of events, no notification is lost.
//!
//! The proxy's [`Peers`] and the driver's [`follow`] are the real ones. Between them the model has a queue of messages to
//! the VMM, the guest's ties, and a page whose two words are written one after the other and read one after the other.
//!
//! The front-end of the model waits for no acknowledgement: when it sends a new call eventfd, it looks at the old one for
//! the last time. So a notification is delivered once the eventfd that the front-end set last is signalled.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::device::express::peers::{Changes, LIMITS, Limits, Peers};
use crate::driver::express::switch::{Step, Way, follow};
use crate::spec::addr::QueueIndex;
use crate::spec::express::PeerId;
use crate::spec::express::page::Entry;

const QUEUE: QueueIndex = QueueIndex(0);

/// A call eventfd of the front-end.
type Call = u8;

/// Bounds how often each thing happens in a walk, so that it ends.
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
    /// A VMM connects after another one has hung up: the same again, or that of a new device VM.
    reconnects: u8,
    /// The express device fails the driver from some moment on.
    failures: u8,
    /// A thread of the back-end in the driver's process reads what to store to the doorbell register, and stores it later.
    stores: u8,
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
    /// The proxy writes the second word of the page.
    ProxyStores,
    VmmHandlesMessage,
    /// The proxy sees that the confirmation of a peer was signalled.
    ProxyHearsOf(PeerId),
    DriverGoesOn,
    /// A guest's kernel writes to all doorbells that the eventfd is tied to, a test double to one of them.
    BackendNotifies(Option<Tied>),
    BackendReadsDoorbell,
    BackendStores,
    FrontendLeaves,
    DriverDies,
    VmmHangsUp {
        keeps_peers: bool,
    },
    /// The VMM that hung up connects again. Its guest keeps the page that it has.
    VmmReturns,
    DeviceVmRestarts,
    ExpressDeviceFails,
    ConnectionFills,
    ConnectionDrains,
}

impl Event {
    /// Returns whether this happens by itself sooner or later. Front-end and back-end may have had enough at any time.
    fn is_inevitable(self) -> bool {
        match self {
            Self::ProxyRelays
            | Self::ProxyStores
            | Self::VmmHandlesMessage
            | Self::ProxyHearsOf(_)
            | Self::BackendStores
            | Self::DriverGoesOn
            | Self::ConnectionDrains => true,
            Self::FrontendSets(_)
            | Self::BackendNotifies(_)
            | Self::BackendReadsDoorbell
            | Self::FrontendLeaves
            | Self::DriverDies
            | Self::ConnectionFills
            | Self::VmmReturns
            | Self::DeviceVmRestarts
            | Self::ExpressDeviceFails
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
    /// The call eventfd that the front-end set last.
    call: Option<Call>,
    /// The back-end has the guest's eventfd.
    serving: bool,
    /// The back-end notified, and `call` was not signalled since.
    owed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Proxy {
    peers: Peers<Call>,
    connected: bool,
    congested: bool,
    newest: Option<Call>,
    page: Entry,
    /// The second word of the page, while the first is written already.
    storing: Option<Option<PeerId>>,
    /// The guest's page is that of the connected VMM.
    page_shown: bool,
    /// Confirmations that were signalled.
    confirmed: BTreeSet<PeerId>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Vmm {
    calls: BTreeMap<PeerId, Call>,
    confirmations: BTreeSet<PeerId>,
    /// The last peer that was connected.
    last: Option<PeerId>,
    /// The guest's accesses to the device fail.
    failed: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Driver {
    way: Option<Way>,
    tied: BTreeSet<Tied>,
    work: Work,
    /// The driver does without the express device, which failed.
    gave_up: bool,
    /// The peer that a back-end in the driver's process rings by a store.
    direct: Option<PeerId>,
    /// The peer that such a back-end is about to ring.
    ringing: Option<PeerId>,
}

/// [`Way`] with an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Tied {
    Proxy,
    Peer(PeerId),
}

/// The task of the driver. `message` is the one it is about to pass on, `None` if it only looks.
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
        /// A step failed after which the way is the new one nevertheless.
        failed: bool,
    },
    /// Leaves the express device.
    GivesUp {
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
    fn new(budget: Budget, limits: Limits) -> Self {
        Self {
            budget,
            calls_used: 0,
            socket: VecDeque::new(),
            proxy: Proxy {
                peers: Peers::with_limits(1, limits),
                connected: true,
                congested: false,
                newest: None,
                page: Entry::default(),
                storing: None,
                page_shown: true,
                confirmed: BTreeSet::new(),
            },
            to_vmm: VecDeque::new(),
            vmm: Vmm::default(),
            to_driver: VecDeque::new(),
            driver: Driver::default(),
            call: None,
            serving: false,
            owed: false,
        }
    }

    /// A call eventfd was signalled, or none as the front-end wished.
    fn signalled(&mut self, call: Option<Call>) {
        self.owed &= self.call != call;
    }

    /// A write to a doorbell of the guest.
    fn ring(&mut self, way: Tied) {
        match way {
            Tied::Proxy => self.signalled(self.proxy.newest),
            Tied::Peer(_) if self.vmm.failed => {}
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
        let proxy_is_free = self.proxy.storing.is_none();
        if self.budget.messages > 0 {
            // A new call eventfd is the one with the next number: other choices differ in the numbers alone.
            let calls = self.budget.calls.min(self.calls_used + 1);
            events.extend((0..calls).map(Some).chain([None]).map(Event::FrontendSets));
        }
        if self.budget.failures > 0 {
            events.push(Event::ExpressDeviceFails);
        }
        if !self.to_vmm.is_empty() {
            events.push(Event::VmmHandlesMessage);
        }
        if self.budget.notifications > 0 && self.serving {
            let ties = self.driver.tied.iter().copied();
            // The proxy looks at its doorbells when it has written the page.
            let heard = move |tied: &Tied| proxy_is_free || *tied != Tied::Proxy;
            if ties.clone().all(|tied| heard(&tied)) {
                events.push(Event::BackendNotifies(None));
            }
            events.extend(ties.filter(heard).map(Some).map(Event::BackendNotifies));
        }
        if self.budget.stores > 0
            && self.serving
            && self.driver.direct.is_some()
            && self.driver.ringing.is_none()
        {
            events.push(Event::BackendReadsDoorbell);
        }
        if self.driver.ringing.is_some() {
            events.push(Event::BackendStores);
        }
        if proxy_is_free {
            self.events_of_proxy(&mut events)
        } else {
            events.push(Event::ProxyStores)
        }
        events
    }

    /// Adds the events that the proxy handles one at a time.
    fn events_of_proxy(&self, events: &mut Vec<Event>) {
        if !self.socket.is_empty() {
            events.push(Event::ProxyRelays);
        }
        events.extend(self.proxy.confirmed.iter().copied().map(Event::ProxyHearsOf));
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
        if self.budget.reconnects > 0 && !self.proxy.connected {
            events.extend([Event::VmmReturns, Event::DeviceVmRestarts]);
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::FrontendSets(call) => {
                self.budget.messages -= 1;
                self.calls_used = self.calls_used.max(call.map_or(0, |call| call + 1));
                self.socket.push_back(call);
                self.call = call;
                // A front-end without a call eventfd looks for itself.
                self.owed &= call.is_some();
            }
            Event::ProxyRelays => self.relay(),
            Event::ProxyStores => {
                if let Some(registered) = self.proxy.storing.take() {
                    self.proxy.page.registered = registered;
                }
            }
            Event::VmmHandlesMessage => self.handle_in_vmm(),
            Event::ProxyHearsOf(peer) => {
                self.proxy.confirmed.remove(&peer);
                self.proxy.peers.confirm(peer);
                self.publish();
            }
            Event::DriverGoesOn => self.drive(),
            Event::BackendNotifies(tied) => {
                self.budget.notifications -= 1;
                self.owed = self.call.is_some();
                let all = self.driver.tied.clone();
                tied.map_or(all, |tied| BTreeSet::from([tied])).into_iter().for_each(|tied| self.ring(tied));
            }
            Event::BackendReadsDoorbell => {
                self.budget.stores -= 1;
                self.owed = self.call.is_some();
                self.driver.ringing = self.driver.direct;
            }
            Event::BackendStores => {
                if let Some(peer) = self.driver.ringing.take() {
                    self.ring(Tied::Peer(peer));
                }
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
                self.proxy.confirmed.clear();
                self.publish();
                self.to_vmm.clear();
                if !keeps_peers {
                    self.vmm.calls.clear();
                    self.vmm.confirmations.clear();
                }
            }
            Event::VmmReturns => {
                self.budget.reconnects -= 1;
                (self.proxy.connected, self.proxy.page_shown) = (true, false);
                self.set_call(self.proxy.newest);
            }
            Event::DeviceVmRestarts => {
                self.budget.reconnects -= 1;
                self.end_session();
                (self.driver, self.vmm) = (Driver::default(), Vmm::default());
                (self.proxy.connected, self.proxy.page_shown) = (true, true);
            }
            Event::ExpressDeviceFails => {
                self.budget.failures -= 1;
                self.vmm.failed = true;
            }
        }
    }

    fn relay(&mut self) {
        let Some(call) = self.socket.pop_front() else { return };
        self.proxy.newest = call;
        self.set_call(call);
        // The proxy signals each new call eventfd once.
        self.signalled(call);
        self.to_driver.push_back(call);
    }

    fn publish(&mut self) {
        let Entry { call, registered } = self.proxy.peers.entry(QUEUE);
        self.proxy.page.call = call;
        self.proxy.storing = (registered != self.proxy.page.registered).then_some(registered);
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
        self.publish();
    }

    fn handle_in_vmm(&mut self) {
        match self.to_vmm.pop_front() {
            Some(ToVmm::Call(id, call)) => {
                assert!(self.vmm.last < Some(id), "{id:?} is used twice");
                self.vmm.last = Some(id);
                self.vmm.calls.insert(id, call);
            }
            Some(ToVmm::Confirmation(id)) => drop(self.vmm.confirmations.insert(id)),
            Some(ToVmm::Disconnect(id)) => {
                assert!(self.vmm.calls.remove(&id).is_some(), "{id:?} is not connected");
                self.vmm.confirmations.remove(&id);
            }
            None => {}
        }
    }

    /// Returns the page as the guest sees it.
    fn page(&self) -> Entry {
        if self.proxy.page_shown && !self.driver.gave_up { self.proxy.page } else { Entry::default() }
    }

    /// Returns whether an access of the driver to the express device fails.
    fn fails(&self) -> bool {
        self.vmm.failed && !self.driver.gave_up
    }

    fn drive(&mut self) {
        self.driver.work = match std::mem::take(&mut self.driver.work) {
            Work::Idle => match self.to_driver.pop_front() {
                // A message without an eventfd changes nothing for the driver.
                Some(None) => Work::Idle,
                Some(message) => self.look(Some(message)),
                None if self.driver.way.is_some() && self.look_is_due() => self.look(None),
                None => Work::Idle,
            },
            Work::ReadRegistered { message, .. } if self.fails() => self.give_up(message),
            Work::ReadRegistered { message, call } => {
                let entry = Entry { call, registered: self.page().registered };
                let (way, steps) = follow(self.driver.way, entry, message.is_some());
                Work::Steps { message, way, steps: steps.into(), failed: false }
            }
            Work::Steps { message, way, mut steps, failed } => match steps.pop_front() {
                // The guest waits until the proxy has time for it.
                Some(Step::Ring) if self.proxy.storing.is_some() => {
                    steps.push_front(Step::Ring);
                    Work::Steps { message, way, steps, failed }
                }
                Some(Step::Tie(Way::Peer(_))) if self.fails() => self.give_up(message),
                Some(Step::Confirm(_)) if self.fails() => Work::Steps { message, way, steps, failed: true },
                Some(step) => {
                    self.take(step);
                    Work::Steps { message, way, steps, failed }
                }
                None => {
                    self.driver.way = Some(way);
                    if failed { self.give_up(message) } else { self.pass_on(message) }
                }
            },
            Work::GivesUp { message, way, mut steps } => match steps.pop_front() {
                Some(Step::Ring) if self.proxy.storing.is_some() => {
                    steps.push_front(Step::Ring);
                    Work::GivesUp { message, way, steps }
                }
                Some(step) => {
                    self.take(step);
                    Work::GivesUp { message, way, steps }
                }
                None => {
                    self.driver.way = Some(way);
                    self.driver.gave_up = true;
                    self.pass_on(message)
                }
            },
        };
    }

    /// Reads the first word of the page.
    fn look(&mut self, message: Option<Option<Call>>) -> Work {
        if self.fails() {
            return self.give_up(message);
        }
        Work::ReadRegistered { message, call: self.page().call }
    }

    fn give_up(&mut self, message: Option<Option<Call>>) -> Work {
        self.driver.direct = None;
        let (way, steps) = follow(self.driver.way, Entry::default(), false);
        Work::GivesUp { message, way, steps: steps.into() }
    }

    /// Passes the message to the back-end, if there is one.
    fn pass_on(&mut self, message: Option<Option<Call>>) -> Work {
        self.serving |= message.is_some();
        Work::Idle
    }

    /// Returns whether a look at the page would change anything, now or when the answer to it comes.
    fn look_is_due(&self) -> bool {
        let (way, steps) = follow(self.driver.way, self.page(), false);
        let confirms = |step: &Step| match step {
            Step::Confirm(peer) => self.vmm.confirmations.contains(peer),
            _ => true,
        };
        self.fails() || self.driver.way != Some(way) || steps.iter().any(confirms)
    }

    fn take(&mut self, step: Step) {
        match step {
            // The kernel refuses both otherwise.
            Step::Tie(way) => {
                assert!(self.driver.tied.insert(tied(way)), "{way:?} is tied already");
                if let Way::Peer(peer) = way {
                    self.driver.direct = Some(peer);
                }
            }
            Step::Untie(way) => {
                assert!(self.driver.tied.remove(&tied(way)), "{way:?} is not tied");
                self.driver.direct = self.driver.direct.filter(|peer| Way::Peer(*peer) != way);
            }
            Step::Ring => self.ring(Tied::Proxy),
            Step::Confirm(peer) => {
                if self.vmm.confirmations.contains(&peer) && self.proxy.connected {
                    self.proxy.confirmed.insert(peer);
                }
            }
        }
    }

    fn end_session(&mut self) {
        self.socket.clear();
        self.to_driver.clear();
        (self.call, self.serving, self.owed) = (None, false, false);
        self.proxy.newest = None;
        let peers = self.proxy.peers.clear();
        if self.proxy.connected {
            self.to_vmm.extend(peers.into_iter().map(ToVmm::Disconnect));
        }
        self.proxy.confirmed.clear();
        self.publish();
        // What the driver was about to pass on has no front-end any more.
        match &mut self.driver.work {
            Work::Idle => {}
            Work::ReadRegistered { message, .. }
            | Work::Steps { message, .. }
            | Work::GivesUp { message, .. } => *message = None,
        }
    }
}

/// Walks over all states; returns their number.
fn walk(budget: Budget) -> usize {
    walk_with(budget, LIMITS)
}

/// As [`walk`], with other limits than the proxy's.
fn walk_with(budget: Budget, limits: Limits) -> usize {
    // Hashes of 64 bits: two of a million states have the same one with a probability of one in ten millions.
    let mut seen = HashSet::new();
    // How each state was reached: the index of the one before, and the event.
    let mut history: Vec<(usize, Event)> = Vec::new();
    let mut stack = vec![(Model::new(budget, limits), usize::MAX)];
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
    let stays = way == Some(Way::Proxy) && model.page().call.is_some() && model.proxy.connected;
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

const NOTHING: Budget = Budget {
    messages: 0,
    calls: 0,
    notifications: 0,
    sessions: 0,
    drivers: 0,
    hang_ups: 0,
    reconnects: 0,
    failures: 0,
    stores: 0,
    congestions: 0,
};
/// Call eventfds are replaced while the back-end notifies.
const REPLACED: Budget = Budget { messages: 2, calls: 2, notifications: 1, ..NOTHING };

#[test]
fn replaced_call_eventfds_lose_nothing() {
    let states = walk(Budget { messages: 3, calls: 3, ..REPLACED });
    assert!(states > 10_000, "{states}");
}

#[test]
fn a_store_to_a_doorbell_that_is_replaced_meanwhile_loses_nothing() {
    let states = walk(Budget { messages: 3, calls: 3, notifications: 0, stores: 1, ..REPLACED });
    assert!(states > 1000, "{states}");
    let states = walk(Budget { stores: 1, failures: 1, hang_ups: 1, ..REPLACED });
    assert!(states > 1000, "{states}");
}

#[test]
fn sessions_that_end_lose_nothing() {
    let states = walk(Budget { sessions: 1, ..REPLACED });
    assert!(states > 1000, "{states}");
}

#[test]
fn drivers_that_die_lose_nothing() {
    let states = walk(Budget { drivers: 1, ..REPLACED });
    assert!(states > 1000, "{states}");
}

#[test]
fn a_vmm_that_hangs_up_loses_nothing() {
    let states = walk(Budget { hang_ups: 1, ..REPLACED });
    assert!(states > 1000, "{states}");
}

#[test]
fn a_vmm_that_connects_again_loses_nothing_and_gets_no_number_twice() {
    let states = walk(Budget { hang_ups: 1, reconnects: 1, ..REPLACED });
    assert!(states > 1000, "{states}");
}

#[test]
fn an_express_device_that_fails_loses_nothing() {
    let states = walk(Budget { failures: 1, ..REPLACED });
    assert!(states > 1000, "{states}");
}

#[test]
fn a_vmm_that_is_slow_loses_nothing() {
    let states = walk(Budget { congestions: 1, ..REPLACED });
    assert!(states > 1000, "{states}");
}

#[test]
fn limits_that_are_reached_lose_nothing() {
    let numbers = |count| Limits { last: PeerId::new(count).expect("a peer"), ..LIMITS };
    let room = |total| Limits { total, ..LIMITS };
    for limits in [numbers(1), numbers(2), room(0), room(1)] {
        let states = walk_with(REPLACED, limits);
        assert!(states > 50, "{states}");
    }
}

/// Takes minutes: run it after a change of the protocol.
#[test]
#[ignore = "takes minutes"]
fn nothing_is_lost_whatever_happens() {
    let all = Budget {
        messages: 3,
        calls: 3,
        notifications: 2,
        sessions: 1,
        drivers: 1,
        hang_ups: 1,
        reconnects: 1,
        failures: 1,
        stores: 1,
        congestions: 1,
    };
    walk(all);
}
