//! The call eventfds that back-ends signal, and the way that each takes to the front-end.

use std::sync::Arc;
use std::time::Duration;

use super::doorbells::Doorbells;
use super::error::DriverError;
use super::express::ExpressDevice;
use super::express::switch::{Step, Way, follow};
use crate::event::Event;
use crate::pci::{DeviceError, DirectDoorbells, PciDevice};
use crate::spec::addr::QueueIndex;
use crate::spec::express::page::Entry;

/// How long to wait for the VMM to know a call eventfd before asking again: at first, and at most.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(1));

/// The calls of all vhost queues.
#[derive(Debug)]
pub(super) struct Calls {
    queues: Vec<Option<Call>>,
    express: Option<ExpressDevice>,
    /// The doorbells of the express device, if this process can ring them itself.
    direct: Option<Arc<DirectDoorbells>>,
    patience: Duration,
}

/// The call of a vhost queue.
#[derive(Debug)]
struct Call {
    event: Event,
    way: Option<Way>,
    /// The VMM was asked for a call eventfd and has not answered.
    waiting: bool,
}

/// A step failed.
enum Failure {
    Express(DeviceError),
    Driver(DriverError),
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        Self::Express(error)
    }
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

impl Calls {
    /// No calls yet.
    pub(super) fn new(queues: u16) -> Self {
        Self {
            queues: (0..queues).map(|_| None).collect(),
            express: None,
            direct: None,
            patience: PATIENCE.0,
        }
    }

    /// From now on, calls take the way through `express` where they can.
    pub(super) fn set_express(&mut self, express: ExpressDevice) {
        let queues = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        self.direct = express.direct_doorbells(queues).map(Arc::new);
        self.express = Some(express);
    }

    /// The doorbells that a back-end in this process rings itself, if there are any.
    pub(super) fn direct_doorbells(&self) -> Option<Arc<DirectDoorbells>> {
        self.direct.clone()
    }

    /// Returns whether calls can take the way through an express device.
    pub(super) fn has_express(&self) -> bool {
        self.express.is_some()
    }

    /// Returns the event of a queue for which the front-end has just set a call eventfd; `None` if there is no such
    /// queue.
    pub(super) fn renew<D: PciDevice>(
        &mut self,
        vvu: &Doorbells<'_, D>,
        queue: QueueIndex,
    ) -> Result<Option<&Event>, DriverError> {
        let index = usize::from(queue.0);
        let Some(slot) = self.queues.get_mut(index) else { return Ok(None) };
        if slot.is_none() {
            let event = Event::new().map_err(DriverError::Event)?;
            *slot = Some(Call { event, way: None, waiting: false });
        }
        self.patience = PATIENCE.0;
        self.follow(vvu, queue, true)?;
        Ok(self.queues[index].as_ref().map(|call| &call.event))
    }

    /// Checks which ways the calls should take.
    pub(super) fn check<D: PciDevice>(&mut self, vvu: &Doorbells<'_, D>) -> Result<(), DriverError> {
        for queue in (0..).take(self.queues.len()).map(QueueIndex) {
            self.follow(vvu, queue, false)?;
        }
        self.patience = (self.patience * 2).min(PATIENCE.1);
        Ok(())
    }

    /// Returns when to check again, `None` if nothing is awaited.
    pub(super) fn next_check(&self) -> Option<Duration> {
        self.queues.iter().flatten().any(|call| call.waiting).then_some(self.patience)
    }

    /// Changes the way of a queue's call if there is a better one.
    fn follow<D: PciDevice>(
        &mut self,
        vvu: &Doorbells<'_, D>,
        queue: QueueIndex,
        replaced: bool,
    ) -> Result<(), DriverError> {
        let Some(Some(call)) = self.queues.get_mut(usize::from(queue.0)) else { return Ok(()) };
        match call.follow(vvu, self.express.as_ref(), self.direct.as_deref(), queue, replaced) {
            Ok(()) => Ok(()),
            Err(Failure::Driver(error)) => Err(error),
            Err(Failure::Express(error)) => {
                log::warn!("no longer uses the express device: {error}");
                self.give_up_express(vvu)
            }
        }
    }

    /// Lets all calls go through the proxy.
    fn give_up_express<D: PciDevice>(&mut self, vvu: &Doorbells<'_, D>) -> Result<(), DriverError> {
        // It is closed after the calls have another way.
        let express = self.express.take();
        if let Some(direct) = self.direct.take() {
            direct.clear_all();
        }
        for (queue, slot) in (0..).map(QueueIndex).zip(&mut self.queues) {
            let Some(call) = slot else { continue };
            match call.take(vvu, express.as_ref(), None, queue, Entry::default(), false) {
                Ok(()) | Err(Failure::Express(_)) => {}
                Err(Failure::Driver(error)) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Call {
    fn follow<D: PciDevice>(
        &mut self,
        vvu: &Doorbells<'_, D>,
        express: Option<&ExpressDevice>,
        direct: Option<&DirectDoorbells>,
        queue: QueueIndex,
        replaced: bool,
    ) -> Result<(), Failure> {
        let entry = match express {
            Some(express) => express.entry(queue)?,
            None => Entry::default(),
        };
        self.take(vvu, express, direct, queue, entry, replaced)
    }

    /// Takes the best way, given what the shared page says about the queue.
    fn take<D: PciDevice>(
        &mut self,
        vvu: &Doorbells<'_, D>,
        express: Option<&ExpressDevice>,
        direct: Option<&DirectDoorbells>,
        queue: QueueIndex,
        entry: Entry,
        replaced: bool,
    ) -> Result<(), Failure> {
        let (way, steps) = follow(self.way, entry, replaced);
        self.waiting = false;
        // The express device is given up after the other steps: only a new way through it cannot do without it.
        let mut failure = Ok(());
        for step in steps {
            match (step, express) {
                (Step::Tie(Way::Proxy), _) => vvu.bind(queue.0, &self.event)?,
                (Step::Untie(Way::Proxy), _) => vvu.unbind(queue.0)?,
                (Step::Ring, _) => vvu.ring(queue.0)?,
                (Step::Tie(Way::Peer(peer)), Some(express)) => {
                    express.bind(peer, &self.event)?;
                    if let Some(direct) = direct {
                        direct.set(queue.0, peer.call());
                    }
                }
                (Step::Untie(Way::Peer(peer)), Some(express)) => {
                    if let Some(direct) = direct {
                        direct.clear(queue.0, peer.call());
                    }
                    failure = express.unbind(peer);
                }
                (Step::Confirm(peer), Some(express)) => {
                    failure = failure.and(express.confirm(peer));
                    self.waiting = true;
                }
                // Without the device nothing leads to these.
                (Step::Tie(Way::Peer(_)) | Step::Untie(Way::Peer(_)) | Step::Confirm(_), None) => {}
            }
        }
        if self.way != Some(way) {
            log::debug!("calls of queue {queue} go by way of {way:?}");
        }
        self.way = Some(way);
        Ok(failure?)
    }
}
