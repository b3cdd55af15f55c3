//! Accepts front-ends and moves messages between them and the guest driver.

use std::os::unix::net::UnixListener;

use rustix::io::Errno;

use super::Host;
use super::closer::Closer;
use super::events::{Events, Source};
use super::express::Express;
use super::express::peers::{LIMITS, Limits};
use super::frontend_connection::{ConnectionError, FrontendConnection, Received};
use super::link::{Link, LinkEvent, LinkState, Transition};
use super::message_queues::{DriverQueues, Placed, QueueError};
use super::reconnects::Reconnects;
use super::resources::Resources;
use super::sibling_memory::SiblingMemory;
use super::treatment::Treatment;
use super::vrings::{Eventfd, Notification, Vrings};
use crate::spec::addr::QueueIndex;
use crate::spec::express::PeerId;

mod keep;

pub(super) use keep::SavedRelay;

/// The front-end's side of a device.
#[derive(Debug)]
pub(super) struct Relay {
    pub(super) resources: Resources,
    pub(super) vrings: Vrings,
    reconnects: Reconnects,
    link: Link,
    express: Option<Express>,
    /// Why no front-end can be served any more.
    failure: Option<String>,
}

/// What one step of the relay did.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Something was moved, so there may be more to do.
    pub(super) moved: bool,
    pub(super) transition: Option<Transition>,
}

impl From<Option<Transition>> for Progress {
    /// A change of the link leaves more to do.
    fn from(transition: Option<Transition>) -> Self {
        Self { moved: transition.is_some(), transition }
    }
}

impl From<bool> for Progress {
    fn from(moved: bool) -> Self {
        Self { moved, transition: None }
    }
}

impl Relay {
    /// A relay whose link is down, for `queues` vhost queues.
    ///
    /// # Errors
    /// When the kernel cannot poll `listener`, or has no asynchronous I/O or no thread left.
    pub(super) fn new(memory: SiblingMemory, listener: UnixListener, queues: u16) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let events = Events::new()?;
        events.add(&listener, Source::Listener)?;
        let closer = Closer::new(events.again_event())?;
        let resources = Resources { memory, queues, events, closer, trace: None, ledgers: None };
        let vrings = Vrings::new(queues)?;
        let reconnects = Reconnects::new(listener);
        Ok(Self { resources, vrings, reconnects, link: Link::default(), express: None, failure: None })
    }

    /// Serves the express device of the device with this `uuid` to the VMMs that connect to `listener`.
    ///
    /// # Errors
    /// As [`Express::new`].
    pub(super) fn serve_express(&mut self, listener: UnixListener, uuid: [u8; 16]) -> std::io::Result<()> {
        self.express = Some(Express::new(listener, uuid, &self.resources)?);
        Ok(())
    }

    /// Lowers the limits of the express device.
    pub(super) fn limit_express(&mut self, peers: usize, last: PeerId) {
        if let Some(express) = &mut self.express {
            express.set_limits(Limits { total: peers, last, ..LIMITS });
        }
    }

    /// Takes `stream` for a front-end that has connected.
    #[cfg(fuzzing)]
    pub(super) fn adopt_frontend(&mut self, stream: std::os::unix::net::UnixStream) -> std::io::Result<()> {
        self.reconnects.adopt(stream)
    }

    /// Forgets the front-ends that wait.
    #[cfg(fuzzing)]
    pub(super) fn forget_waiting(&mut self) {
        self.reconnects.forget_waiting();
    }

    /// Takes `stream` for a VMM that has connected to the express device, and forgets the one before.
    #[cfg(fuzzing)]
    pub(super) fn adopt_vmm(&mut self, stream: std::os::unix::net::UnixStream) {
        if let Some(express) = &mut self.express {
            express.adopt(&self.resources, stream);
        }
    }

    /// Deals with an event of the express device's VMM.
    pub(super) fn process_express(&mut self) {
        let Some(express) = &mut self.express else { return };
        if express.process(&self.resources) {
            for (queue, call) in self.vrings.calls() {
                express.set_call(&self.resources, queue, Some(call));
            }
        }
    }

    /// The guest confirmed a peer of the express device.
    pub(super) fn confirm(&mut self, peer: PeerId) {
        if let Some(express) = &mut self.express {
            express.confirm(&self.resources, peer);
        }
    }

    /// The state of the link.
    pub(super) fn state(&self) -> LinkState {
        self.link.state()
    }

    /// Returns why no front-end can be served any more, if that is so.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Tells the link whether the guest driver is ready.
    pub(super) fn set_driver_ready<H: Host>(
        &mut self,
        ready: bool,
        driver: &mut DriverQueues<'_, H>,
    ) -> Option<Transition> {
        if !ready {
            return self.follow(LinkEvent::DriverGone);
        }
        if self.state() == LinkState::Down
            && let Err(error) = driver.start()
        {
            return self.driver_violation(&error);
        }
        self.follow(LinkEvent::DriverReady)
    }

    /// Puts the link down and forgets the guest's vectors.
    pub(super) fn reset(&mut self) {
        // The registers are reset as well, so there is nothing to tell the driver.
        let _ = self.follow(LinkEvent::Reset);
        self.vrings.reset();
    }

    /// Moves at most one message each way, or one front-end.
    pub(super) fn advance<H: Host>(&mut self, driver: &mut DriverQueues<'_, H>) -> Progress {
        match &self.link {
            Link::Down | Link::Broken => self.sort_reconnects(),
            Link::Waiting => self.accept(),
            Link::Connected(_) => self.exchange(driver),
            Link::Leaving => self.mark_end(driver),
        }
    }

    /// Takes the link to its next state and forgets the connection that this ends.
    fn follow(&mut self, event: LinkEvent) -> Option<Transition> {
        let mut transition = self.link.handle(event)?;
        if let Some(ended) = transition.ended.take() {
            let driver_left = transition.to != LinkState::Leaving;
            self.reconnects.turn_away(if driver_left { ended.peer } else { None });
            self.disconnect(ended);
        }
        Some(transition)
    }

    fn driver_violation(&mut self, error: &QueueError) -> Option<Transition> {
        log::error!("the guest driver has to reset the device: {error}");
        self.follow(LinkEvent::DriverViolation)
    }

    /// Ends a connection. The front-end may have its eventfds open for longer, so they are unwatched one by
    /// one.
    fn disconnect(&mut self, connection: FrontendConnection) {
        for kick in self.vrings.disconnect() {
            self.resources.events.remove(&kick);
        }
        if let Some(express) = &mut self.express {
            express.clear(&self.resources);
        }
        connection.hang_up(&self.resources);
    }

    /// Looks at one front-end that connected while there is no back-end.
    fn sort_reconnects(&mut self) -> Progress {
        if self.resources.closer.is_full() {
            return Progress::default();
        }
        match self.reconnects.sort(&self.resources.closer) {
            Ok(sorted) => sorted.into(),
            Err(error) => self.cannot_accept(&error),
        }
    }

    /// Accepts a front-end.
    fn accept(&mut self) -> Progress {
        if self.resources.closer.is_full() {
            return Progress::default();
        }
        let (stream, peer) = match self.reconnects.next() {
            Ok(Some(frontend)) => frontend,
            Ok(None) => return Progress::default(),
            Err(error) => return self.cannot_accept(&error),
        };
        let connection = FrontendConnection::new(stream, peer, self.resources.ledgers);
        if let Err(error) = connection.watch(&self.resources) {
            log::warn!("cannot wait for messages of a front-end: {error}");
            return true.into();
        }
        self.reconnects.turn_away(None);
        self.link.connect(connection).into()
    }

    /// The front-end stays in the backlog, and nothing tells when it can be accepted.
    fn cannot_accept(&self, error: &std::io::Error) -> Progress {
        log::warn!("cannot accept a front-end, will try again: {error}");
        self.resources.events.retry_later();
        Progress::default()
    }

    /// Moves at most one message each way, or does one step of that if the state is kept: reading a message and handing it
    /// over are two.
    fn exchange<H: Host>(&mut self, driver: &mut DriverQueues<'_, H>) -> Progress {
        let received = self.flush().map_err(ExchangeError::from).and_then(|()| self.relay_to_driver(driver));
        let moved = received.and_then(|received| Ok(self.relay_to_frontend(driver)? || received));
        match moved {
            Ok(moved) => moved.into(),
            Err(ExchangeError::Connection(error)) => {
                match error {
                    ConnectionError::Socket(_) => log::info!("front-end left: {error}"),
                    ConnectionError::Orphaned(_) => self.failure = Some(error.to_string()),
                    _ => log::error!("front-end disconnected: {error}"),
                }
                self.follow(LinkEvent::FrontendLeft).into()
            }
            Err(ExchangeError::Driver(error)) => self.driver_violation(&error).into(),
        }
    }

    /// Sends what the front-end did not take before.
    fn flush(&mut self) -> Result<(), ConnectionError> {
        match &mut self.link {
            Link::Connected(connection) => connection.flush(&self.resources),
            _ => Ok(()),
        }
    }

    /// Moves a message of the front-end to the driver; false if there is none or no room.
    fn relay_to_driver<H: Host>(&mut self, driver: &mut DriverQueues<'_, H>) -> Result<bool, ExchangeError> {
        let Link::Connected(connection) = &mut self.link else { return Ok(false) };
        if connection.to_driver.is_none() {
            connection.to_driver = connection.answers.pop_front();
        }
        if connection.to_driver.is_none() {
            if self.resources.closer.is_full() {
                return Ok(false);
            }
            match connection.next_message(&mut self.resources)? {
                Received::Nothing => return Ok(false),
                Received::Done => return Ok(true),
                Received::Message(message, treatment) => {
                    connection.to_driver = Some(message);
                    self.apply(treatment)?;
                }
            }
            if self.resources.is_kept() {
                return Ok(true);
            }
        }
        let Link::Connected(connection) = &mut self.link else { return Ok(false) };
        let Some(message) = &connection.to_driver else { return Ok(false) };
        match driver.place(&message.bytes)? {
            Placed::Yes => {
                connection.to_driver = None;
                Ok(true)
            }
            Placed::NoBuffer => Ok(false),
            Placed::TooSmall { got } => {
                Err(ConnectionError::TooSmall { got, want: message.bytes.len() }.into())
            }
        }
    }

    /// Carries out what a message of the front-end changes in the device.
    fn apply(&mut self, treatment: Treatment) -> Result<(), ConnectionError> {
        match treatment {
            Treatment::Relay | Treatment::ProtocolFeatures(_) => {}
            Treatment::Eventfd(index, which, eventfd) => {
                if let (Notification::Kick, Some(eventfd)) = (which, &eventfd) {
                    self.resources.events.add(eventfd, Source::Kick(index))?;
                }
                self.replace(index, which, eventfd);
            }
            Treatment::Stop(index) => self.replace(index, Notification::Kick, None),
            Treatment::BackendChannel(stream) => {
                if let Link::Connected(connection) = &mut self.link {
                    connection.set_channel(stream, &self.resources)?;
                }
            }
        }
        Ok(())
    }

    /// Replaces an eventfd of a queue. The device no longer watches the old kick eventfd, which the
    /// front-end may still have open, and signals the new call eventfd once.
    fn replace(&mut self, index: QueueIndex, which: Notification, eventfd: Option<Eventfd>) {
        if let (Notification::Call, Some(express)) = (which, &mut self.express) {
            express.set_call(&self.resources, index, eventfd.as_ref());
        }
        match (self.vrings.set(index, which, eventfd), which) {
            (Some(old), Notification::Kick) => self.resources.events.remove(&old),
            // A notification may have gone to the old eventfd after the front-end last looked at it.
            (_, Notification::Call) => self.vrings.ring(usize::from(index.0)),
            _ => {}
        }
    }

    /// Moves a message of the driver to the front-end; false if there is none or no room.
    fn relay_to_frontend<H: Host>(
        &mut self,
        driver: &mut DriverQueues<'_, H>,
    ) -> Result<bool, ExchangeError> {
        let Link::Connected(connection) = &mut self.link else { return Ok(false) };
        if connection.is_congested() || !connection.answers.is_empty() {
            return Ok(false);
        }
        if connection.from_driver.is_none() {
            connection.from_driver = driver.read()?.map(|(head, message)| (Some(head), message));
            if self.resources.is_kept() {
                return Ok(connection.from_driver.is_some());
            }
        }
        let Some((head, message)) = connection.from_driver.take() else { return Ok(false) };
        if let Some(head) = head {
            driver.give_back(head)?;
        }
        connection.deliver(message, &mut self.resources)?;
        Ok(true)
    }

    /// Marks the end of the connection in the receive queue, once there is a buffer for that.
    fn mark_end<H: Host>(&mut self, driver: &mut DriverQueues<'_, H>) -> Progress {
        match driver.place(&[]) {
            Ok(Placed::Yes) => self.follow(LinkEvent::EndMarked).into(),
            Ok(_) => Progress::default(),
            Err(error) => self.driver_violation(&error).into(),
        }
    }
}

/// Why an exchange of messages cannot go on.
#[derive(Debug, thiserror::Error)]
enum ExchangeError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error(transparent)]
    Driver(#[from] QueueError),
}

impl From<Errno> for ConnectionError {
    fn from(error: Errno) -> Self {
        Self::Socket(error.into())
    }
}
