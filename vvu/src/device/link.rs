//! The link between the guest driver and the sibling's front-end.

use std::mem;

use serde::{Deserialize, Serialize};

use super::frontend_connection::FrontendConnection;

/// State of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LinkState {
    /// The guest driver does not ask for a front-end. A front-end that connects stays in the backlog.
    Down,
    /// The guest driver waits for a front-end.
    Waiting,
    /// A front-end is connected; messages flow.
    Connected,
    /// The front-end has left; the device waits for a receive buffer to mark the end of the connection.
    Leaving,
    /// The guest driver broke the protocol; only a reset helps.
    Broken,
}

/// Something that may change the state of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinkEvent {
    /// The driver is ready: `DRIVER_OK`, bus mastering and `BACKEND_UP` are all set.
    DriverReady,
    /// The driver is not ready: one of these is not set.
    DriverGone,
    /// The device accepted a front-end.
    FrontendConnected,
    /// The front-end closed its socket, or the device disconnected it.
    FrontendLeft,
    /// The device put a buffer of length 0, which marks the end of the connection, into the receive queue.
    EndMarked,
    /// The driver broke the protocol.
    DriverViolation,
    /// The device was reset, in whichever way.
    Reset,
}

impl LinkState {
    /// All states, for walks over the table.
    pub const ALL: [Self; 5] = [Self::Down, Self::Waiting, Self::Connected, Self::Leaving, Self::Broken];

    /// The state after `event`. An event that means nothing in a state does not change it.
    #[must_use]
    pub fn after(self, event: LinkEvent) -> Self {
        use LinkEvent as E;
        use LinkState as S;
        match (self, event) {
            (_, E::Reset) => S::Down,
            (S::Broken, _) | (_, E::DriverViolation) => S::Broken,
            (_, E::DriverGone) => S::Down,
            (S::Down, E::DriverReady) => S::Waiting,
            (S::Waiting, E::FrontendConnected) => S::Connected,
            (S::Connected, E::FrontendLeft) => S::Leaving,
            (S::Leaving, E::EndMarked) => S::Down,
            (state, _) => state,
        }
    }

    /// Whether the driver sees `FRONTEND_UP`. It keeps seeing it until the end of the connection is marked.
    #[must_use]
    pub fn is_frontend_up(self) -> bool {
        matches!(self, Self::Connected | Self::Leaving)
    }
}

impl LinkEvent {
    /// All events, for walks over the table.
    pub const ALL: [Self; 7] = [
        Self::DriverReady,
        Self::DriverGone,
        Self::FrontendConnected,
        Self::FrontendLeft,
        Self::EndMarked,
        Self::DriverViolation,
        Self::Reset,
    ];
}

/// The link: its state, with the connection while there is one.
#[derive(Debug, Default)]
#[expect(clippy::large_enum_variant, reason = "a device has one link")]
pub(super) enum Link {
    #[default]
    Down,
    Waiting,
    Connected(FrontendConnection),
    Leaving,
    Broken,
}

/// A change of the link, and what follows from it for the rest of the device.
#[derive(Debug)]
#[must_use]
pub(super) struct Transition {
    pub(super) from: LinkState,
    pub(super) to: LinkState,
    /// The connection that ends.
    pub(super) ended: Option<FrontendConnection>,
}

impl Transition {
    /// Whether the device has to interrupt the driver: the driver sees another link status, or has to
    /// reset the device.
    pub(super) fn concerns_driver(&self) -> bool {
        self.to == LinkState::Broken || self.from.is_frontend_up() != self.to.is_frontend_up()
    }
}

impl Link {
    /// The state.
    pub(super) fn state(&self) -> LinkState {
        match self {
            Self::Down => LinkState::Down,
            Self::Waiting => LinkState::Waiting,
            Self::Connected(_) => LinkState::Connected,
            Self::Leaving => LinkState::Leaving,
            Self::Broken => LinkState::Broken,
        }
    }

    /// Restores a link in `state`, with the connection it had.
    pub(super) fn restore(&mut self, state: LinkState, connection: Option<FrontendConnection>) {
        *self = match (state, connection) {
            (LinkState::Connected, Some(connection)) => Self::Connected(connection),
            (LinkState::Waiting, _) => Self::Waiting,
            (LinkState::Leaving | LinkState::Connected, _) => Self::Leaving,
            (LinkState::Broken, _) => Self::Broken,
            (LinkState::Down, _) => Self::Down,
        };
    }

    /// Connects a front-end. Nothing changes unless the link is [`Link::Waiting`].
    pub(super) fn connect(&mut self, connection: FrontendConnection) -> Option<Transition> {
        self.follow(LinkEvent::FrontendConnected, Some(connection))
    }

    /// Follows any event but [`LinkEvent::FrontendConnected`], which needs a connection.
    pub(super) fn handle(&mut self, event: LinkEvent) -> Option<Transition> {
        self.follow(event, None)
    }

    /// Goes to the state that the table names; `None` if that is the state there is.
    fn follow(&mut self, event: LinkEvent, connection: Option<FrontendConnection>) -> Option<Transition> {
        let from = self.state();
        let to = from.after(event);
        if from == to {
            return None;
        }
        let next = match to {
            LinkState::Down => Self::Down,
            LinkState::Waiting => Self::Waiting,
            LinkState::Connected => Self::Connected(connection?),
            LinkState::Leaving => Self::Leaving,
            LinkState::Broken => Self::Broken,
        };
        log::info!("link: {from:?} -> {to:?} ({event:?})");
        let ended = match mem::replace(self, next) {
            Self::Connected(connection) => Some(connection),
            _ => None,
        };
        Some(Transition { from, to, ended })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// Every sequence of up to six events, with what must hold after each step.
    #[test]
    fn a_front_end_is_served_only_between_ready_and_gone() {
        let mut reached = HashSet::new();
        let mut sequences = vec![(LinkState::Down, false, false)];
        for _ in 0..6 {
            let mut next = HashSet::new();
            for (state, ready, broken) in sequences {
                for event in LinkEvent::ALL {
                    let after = state.after(event);
                    let ready = match event {
                        LinkEvent::DriverReady => true,
                        LinkEvent::DriverGone | LinkEvent::Reset => false,
                        LinkEvent::EndMarked => ready && state != LinkState::Leaving,
                        _ => ready,
                    };
                    let broken = event == LinkEvent::DriverViolation || broken && event != LinkEvent::Reset;
                    assert_eq!(after == LinkState::Broken, broken, "{state:?} {event:?}");
                    if event == LinkEvent::DriverGone && !broken {
                        assert_eq!(after, LinkState::Down);
                    }
                    if after == LinkState::Connected && state != LinkState::Connected {
                        assert_eq!((state, event), (LinkState::Waiting, LinkEvent::FrontendConnected));
                        assert!(ready);
                    }
                    if after == LinkState::Leaving && state != LinkState::Leaving {
                        assert_eq!(state, LinkState::Connected);
                    }
                    reached.insert(after);
                    next.insert((after, ready, broken));
                }
            }
            sequences = next.into_iter().collect();
        }
        assert_eq!(reached, HashSet::from(LinkState::ALL));
    }

    /// The table under "The link": an empty cell changes nothing.
    #[test]
    fn the_table_in_the_architecture_is_this_one() {
        let text = include_str!("../../../ARCHITECTURE.md");
        let table = text.split_once("| state |").expect("the table").1;
        let cells = |row: &'static str| row.trim().trim_matches('|').split('|').map(str::trim);
        let mut rows = table.lines();
        let events: Vec<_> = cells(rows.next().expect("the events")).collect();
        assert_eq!(events, LinkEvent::ALL.map(|event| format!("{event:?}")));
        let rows: Vec<_> = rows.skip(1).take_while(|row| row.starts_with('|')).collect();
        assert_eq!(rows.len(), LinkState::ALL.len());
        for (state, row) in LinkState::ALL.into_iter().zip(rows) {
            let after = LinkEvent::ALL.map(|event| state.after(event));
            let after = after.map(|next| if next == state { String::new() } else { format!("{next:?}") });
            let want: Vec<_> = [format!("{state:?}")].into_iter().chain(after).collect();
            // The empty cells at the end of a row are its own.
            let got: Vec<_> = row.split('|').skip(1).map(str::trim).take(want.len()).collect();
            assert_eq!(got, want);
        }
    }

    #[test]
    fn every_state_is_left_by_reset() {
        for state in LinkState::ALL {
            assert_eq!(state.after(LinkEvent::Reset), LinkState::Down);
        }
    }

    fn connection() -> FrontendConnection {
        FrontendConnection::new(std::os::unix::net::UnixStream::pair().expect("pair").0, None, None)
    }

    /// The link in each state, reached by events.
    fn link(state: LinkState) -> Link {
        let mut link = Link::default();
        if matches!(state, LinkState::Waiting | LinkState::Connected | LinkState::Leaving) {
            drop(link.handle(LinkEvent::DriverReady));
        }
        if matches!(state, LinkState::Connected | LinkState::Leaving) {
            drop(link.connect(connection()));
        }
        match state {
            LinkState::Leaving => drop(link.handle(LinkEvent::FrontendLeft)),
            LinkState::Broken => drop(link.handle(LinkEvent::DriverViolation)),
            _ => {}
        }
        assert_eq!(link.state(), state);
        link
    }

    #[test]
    fn the_link_follows_the_table_and_gives_the_ended_connection_back() {
        for state in LinkState::ALL {
            for event in LinkEvent::ALL {
                let mut link = link(state);
                let transition = match event {
                    LinkEvent::FrontendConnected => link.connect(connection()),
                    event => link.handle(event),
                };
                assert_eq!(link.state(), state.after(event), "{state:?} {event:?}");
                assert_eq!(transition.is_some(), state != state.after(event), "{state:?} {event:?}");
                let ended = transition.is_some_and(|transition| transition.ended.is_some());
                let left = state == LinkState::Connected && link.state() != state;
                assert_eq!(ended, left, "{state:?} {event:?}");
            }
        }
    }

    #[test]
    fn without_a_connection_nothing_is_connected() {
        let mut link = link(LinkState::Waiting);
        assert!(link.handle(LinkEvent::FrontendConnected).is_none());
        assert_eq!(link.state(), LinkState::Waiting);
    }

    #[test]
    fn the_driver_is_interrupted_when_it_sees_a_change() {
        use LinkState as S;
        let concerned = |from, to| Transition { from, to, ended: None }.concerns_driver();
        for (from, to) in [(S::Waiting, S::Connected), (S::Connected, S::Down), (S::Leaving, S::Down)] {
            assert!(concerned(from, to), "{from:?} {to:?}");
        }
        for (from, to) in [(S::Down, S::Waiting), (S::Waiting, S::Down), (S::Connected, S::Leaving)] {
            assert!(!concerned(from, to), "{from:?} {to:?}");
        }
        assert!(S::ALL.into_iter().all(|from| concerned(from, S::Broken)));
    }
}
