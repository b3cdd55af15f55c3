//! The state of the link between the guest driver and the sibling's front-end.

/// Where the link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinkState {
    /// The guest driver does not ask for a front-end. One that connects waits in the backlog.
    Down,
    /// The guest driver waits for a front-end.
    Waiting,
    /// A front-end is connected; messages flow.
    Connected,
    /// The front-end is gone; the mark of its end waits for a receive buffer.
    Leaving,
    /// The guest driver broke the protocol; only a reset helps.
    Broken,
}

/// What can happen to the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinkEvent {
    /// The driver is ready: `DRIVER_OK`, bus mastering and `BACKEND_UP` are all set.
    DriverReady,
    /// One of these is not set (any longer).
    DriverGone,
    /// A front-end was accepted.
    FrontendConnected,
    /// The front-end closed its end, or was disconnected for what it sent.
    FrontendLeft,
    /// The driver has a receive buffer that marks the end of the session.
    EndMarked,
    /// The driver broke the protocol.
    DriverViolation,
    /// The device was reset, in whichever way.
    Reset,
}

impl LinkState {
    /// All states, for walks over the table.
    pub const ALL: [Self; 5] = [Self::Down, Self::Waiting, Self::Connected, Self::Leaving, Self::Broken];

    /// The state after `event`. An event that means nothing in a state leaves it as it is.
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
}
