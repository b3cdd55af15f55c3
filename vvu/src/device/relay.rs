//! The link at work: accepts front-ends and moves messages between them and the guest driver.

use virtio_queue::QueueT;

use super::Host;
use super::common_config::VirtQueue;
use super::events::Source;
use super::link::{LinkEvent, LinkState};
use super::message_queues::{Placed, QueueError, place, take};
use super::session::{Session, SessionError};
use super::treatment::Treatment;
use super::vrings::{Eventfd, Notification};
use super::vvu_device::VvuDevice;
use crate::spec::addr::QueueIndex;
use crate::spec::virtio::{NO_VECTOR, device_config, isr};

/// Messages moved in one direction before other events get their turn.
const MESSAGES_PER_TURN: usize = 64;

impl VvuDevice {
    /// Brings the link in line with what the driver wrote, and moves what can be moved.
    pub(super) fn update_link<H: Host>(&mut self, host: &H) {
        let up = self.link_status & device_config::BACKEND_UP != 0;
        let ready = self.common.driver_ok() && self.config_space.bus_master() && up;
        let before = self.link;
        let queues = [&self.common.rx.queue, &self.common.tx.queue];
        if ready && before == LinkState::Down && !queues.iter().all(|queue| queue.is_valid(host.memory())) {
            log::error!("the guest driver has to reset the device: its queues are not set up");
            self.step(host, LinkEvent::DriverViolation);
            return;
        }
        if ready
            && before == LinkState::Down
            && let Err(error) = self.discard_sent(host)
        {
            self.driver_violation(host, &error);
            return;
        }
        self.step(host, if ready { LinkEvent::DriverReady } else { LinkEvent::DriverGone });
        if self.link != before {
            self.pump(host);
        }
    }

    /// Gives back what the driver sent to the last front-end too late: the next one would take it for
    /// an answer to its own requests.
    fn discard_sent<H: Host>(&mut self, host: &H) -> Result<(), QueueError> {
        for _ in 0..self.common.tx.queue.size() {
            if take(&mut self.common.tx.queue, host.memory())?.is_none() {
                break;
            }
            notify(host, &mut self.common.tx, &mut self.isr)?;
        }
        Ok(())
    }

    /// Takes the link to its next state and carries out what the change implies.
    fn step<H: Host>(&mut self, host: &H, event: LinkEvent) {
        let before = self.link;
        self.link = before.after(event);
        if before == self.link {
            return;
        }
        log::info!("link: {before:?} -> {:?} ({event:?})", self.link);
        if before == LinkState::Connected {
            self.end_session();
        }
        if matches!(self.link, LinkState::Connected | LinkState::Leaving) {
            self.visitors.set_bereft(None);
        }
        let status = match (before, self.link) {
            (_, LinkState::Connected) => self.link_status | device_config::FRONTEND_UP,
            (LinkState::Leaving, LinkState::Down) => 0,
            (_, LinkState::Leaving) => self.link_status,
            _ => self.link_status & !device_config::FRONTEND_UP,
        };
        if self.link == LinkState::Broken {
            self.common.set_needs_reset();
        }
        if status != self.link_status || self.link == LinkState::Broken {
            self.link_status = status;
            self.common.bump_generation();
            self.isr |= isr::CONFIG;
            if self.common.config_vector != NO_VECTOR && self.config_space.bus_master() {
                host.signal(self.common.config_vector);
            }
        }
    }

    /// Forgets the front-end. Its file descriptors are unwatched one by one, since closing them here
    /// is not enough while the front-end has them open too.
    pub(super) fn end_session(&mut self) {
        for kick in self.vrings.disconnect() {
            self.events.remove(&kick);
        }
        if let Some(session) = self.session.take() {
            self.visitors.set_bereft(session.peer);
            self.events.remove(session.frontend());
            session.channel().into_iter().for_each(|channel| self.events.remove(channel));
        }
    }

    /// Moves messages both ways until nothing can be moved, or others should have their turn.
    pub(super) fn pump<H: Host>(&mut self, host: &H) {
        for _ in 0..MESSAGES_PER_TURN {
            let moved = match self.link {
                LinkState::Down | LinkState::Broken => self.sort_visitors(),
                LinkState::Waiting => self.accept(host),
                LinkState::Connected => self.exchange(host),
                LinkState::Leaving => self.mark_end(host),
            };
            if !moved {
                return;
            }
        }
        self.events.again();
    }

    /// Accepts a front-end; false if there is none.
    fn accept<H: Host>(&mut self, host: &H) -> bool {
        let (stream, peer) = match self.visitors.next(&self.listener) {
            Ok(Some(visitor)) => visitor,
            Ok(None) => return false,
            Err(error) => {
                log::warn!("accepting a front-end: {error}");
                return false;
            }
        };
        let session = Session::new(stream, peer);
        if let Err(error) = self.events.add(session.frontend(), Source::Socket) {
            log::warn!("polling a front-end: {error}");
            return true;
        }
        self.session = Some(session);
        self.step(host, LinkEvent::FrontendConnected);
        true
    }

    /// Looks at a front-end that comes while there is no back-end; false if there is none.
    fn sort_visitors(&mut self) -> bool {
        self.visitors.sort(&self.listener).unwrap_or_else(|error| {
            log::warn!("accepting a front-end: {error}");
            false
        })
    }

    /// Moves at most one message each way; false if nothing moved.
    fn exchange<H: Host>(&mut self, host: &H) -> bool {
        let outcome =
            self.relay_to_driver(host).and_then(|received| Ok(self.relay_to_frontend(host)? || received));
        match outcome {
            Ok(moved) => moved,
            Err(ExchangeError::Session(error)) => {
                match error {
                    SessionError::Socket(_) => log::info!("front-end left: {error}"),
                    _ => log::error!("front-end disconnected: {error}"),
                }
                self.step(host, LinkEvent::FrontendLeft);
                true
            }
            Err(ExchangeError::Driver(error)) => {
                self.driver_violation(host, &error);
                false
            }
        }
    }

    fn driver_violation<H: Host>(&mut self, host: &H, error: &QueueError) {
        log::error!("the guest driver has to reset the device: {error}");
        self.step(host, LinkEvent::DriverViolation);
    }

    /// Moves a message of the front-end to the driver.
    fn relay_to_driver<H: Host>(&mut self, host: &H) -> Result<bool, ExchangeError> {
        let Some(session) = &mut self.session else { return Ok(false) };
        if session.to_driver.is_none() {
            session.to_driver = session.answer.take();
        }
        if session.to_driver.is_none() {
            let Some((message, treatment)) =
                session.next_message(&self.memory, self.queues, &mut self.trace)?
            else {
                return Ok(false);
            };
            session.to_driver = Some(message);
            self.apply(treatment)?;
        }
        let Some(session) = &mut self.session else { return Ok(false) };
        let Some(message) = &session.to_driver else { return Ok(false) };
        match place(&mut self.common.rx.queue, host.memory(), &message.bytes)? {
            Placed::Yes => {
                session.to_driver = None;
                notify(host, &mut self.common.rx, &mut self.isr)?;
                Ok(true)
            }
            Placed::NoBuffer => Ok(false),
            Placed::TooSmall { got } => Err(SessionError::TooSmall { got, want: message.bytes.len() }.into()),
        }
    }

    /// Carries out what a message of the front-end changes in the device.
    fn apply(&mut self, treatment: Treatment) -> Result<(), ExchangeError> {
        match treatment {
            Treatment::Relay | Treatment::ProtocolFeatures(_) => {}
            Treatment::Eventfd(index, which, eventfd) => {
                if let (Notification::Kick, Some(eventfd)) = (which, &eventfd) {
                    self.events.add(eventfd, Source::Kick(index)).map_err(session_io)?;
                }
                self.replace(index, which, eventfd);
            }
            Treatment::Stop(index) => self.replace(index, Notification::Kick, None),
            Treatment::BackendChannel(stream) => {
                self.events.add(&stream, Source::Socket).map_err(session_io)?;
                if let Some(session) = &mut self.session {
                    session.set_channel(stream);
                }
            }
        }
        Ok(())
    }

    /// Replaces an eventfd of a queue; kicks of the old one are no longer heard even though the
    /// front-end may still hold it.
    fn replace(&mut self, index: QueueIndex, which: Notification, eventfd: Option<Eventfd>) {
        if let (Some(old), Notification::Kick) = (self.vrings.set(index, which, eventfd), which) {
            self.events.remove(&old);
        }
    }

    /// Moves a message of the driver to the front-end.
    fn relay_to_frontend<H: Host>(&mut self, host: &H) -> Result<bool, ExchangeError> {
        let Some(session) = &mut self.session else { return Ok(false) };
        session.flush()?;
        if session.is_congested() || session.answer.is_some() {
            return Ok(false);
        }
        let Some(message) = take(&mut self.common.tx.queue, host.memory())? else { return Ok(false) };
        notify(host, &mut self.common.tx, &mut self.isr)?;
        session.answer = session.deliver(message, &self.memory, self.queues, &mut self.trace)?;
        Ok(true)
    }

    /// Marks the end of a session in the receive queue; false if there is no buffer for that.
    fn mark_end<H: Host>(&mut self, host: &H) -> bool {
        let placed = place(&mut self.common.rx.queue, host.memory(), &[]).and_then(|placed| {
            notify(host, &mut self.common.rx, &mut self.isr)?;
            Ok(placed)
        });
        match placed {
            Ok(Placed::Yes) => {
                self.step(host, LinkEvent::EndMarked);
                true
            }
            Ok(_) => false,
            Err(error) => {
                self.driver_violation(host, &error);
                false
            }
        }
    }
}

/// Why an exchange of messages cannot go on.
#[derive(Debug, thiserror::Error)]
enum ExchangeError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Driver(#[from] QueueError),
}

fn session_io(error: rustix::io::Errno) -> ExchangeError {
    ExchangeError::Session(SessionError::Socket(error.into()))
}

/// Interrupts the driver for a virtqueue if it wants that.
fn notify<H: Host>(host: &H, queue: &mut VirtQueue, isr: &mut u8) -> Result<(), QueueError> {
    if queue.queue.needs_notification(host.memory())? {
        *isr |= isr::QUEUE;
        if queue.vector != NO_VECTOR {
            host.signal(queue.vector);
        }
    }
    Ok(())
}
