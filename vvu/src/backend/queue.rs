//! The queue engine: takes requests, tracks them, and gives them back.
//!
//! A request goes through [`take`](Queue::take), which marks it as in flight, is carried out, and goes back with
//! [`complete`](Queue::complete), in any order. [`announce`](Queue::announce) notifies the driver. The loop
//! that decides when to do which is [`serve`](super::serve).

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use vm_memory::GuestMemoryMmap;

use super::chain::Chain;
use super::inflight::{Region, RegionError, Tracker, TrackerError};
use super::notify;
use super::poll::PollWindow;
use super::ring::{RingError, SplitRing};
use crate::pci::DirectDoorbells;

/// Why a queue cannot be used until it is started again.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error(transparent)]
    Tracker(#[from] TrackerError),
}

/// A queue, with all the front-end has said about it.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) index: u16,
    /// Memory of the front-end's VM.
    pub(super) memory: Arc<GuestMemoryMmap>,
    pub(super) ring: SplitRing,
    /// Event that interrupts the driver.
    pub(super) call: Option<File>,
    /// What interrupts the driver in place of `call`, if this queue has a doorbell there.
    pub(super) doorbells: Option<Arc<DirectDoorbells>>,
    /// The front-end has enabled the queue (`SET_VRING_ENABLE`).
    pub(super) enabled: bool,
    /// Memory in which requests in flight are written down, if the front-end wants that.
    pub(super) region: Option<Arc<Region>>,
    state: State,
    tracker: Option<Tracker>,
    window: PollWindow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Stopped,
    /// The front-end has started the queue, and requests of an earlier back-end may be in flight.
    Starting,
    Started,
}

/// A request that was taken and not yet given back.
#[derive(Debug)]
pub(super) struct Taken {
    /// First descriptor of the chain, which identifies the request.
    pub(super) head: u16,
    pub(super) chain: Chain,
}

impl Queue {
    /// A stopped queue that polls for `window`.
    pub(super) fn new(index: u16, window: Duration) -> Self {
        Self {
            index,
            memory: Arc::default(),
            ring: SplitRing::default(),
            call: None,
            doorbells: None,
            enabled: false,
            region: None,
            state: State::Stopped,
            tracker: None,
            window: PollWindow::new(window),
        }
    }

    /// Makes the poll window as long as it may be.
    #[cfg(test)]
    pub(super) fn widen_window(&mut self) {
        self.window.widen();
    }

    /// The front-end starts the queue. Does nothing if it has been started before.
    pub(super) fn start(&mut self) {
        if self.state == State::Stopped {
            self.state = State::Starting;
        }
    }

    /// The front-end stops the queue, or it is broken.
    pub(super) fn stop(&mut self) {
        self.state = State::Stopped;
    }

    /// Whether the front-end has started and enabled the queue.
    pub(super) fn is_running(&self) -> bool {
        self.enabled && self.state != State::Stopped
    }

    /// Begins to work on a queue that the front-end has just started. Returns the requests that an earlier back-end
    /// left unfinished, in the order in which it took them.
    pub(super) fn recover(&mut self) -> Result<Vec<Taken>, Broken> {
        if self.state != State::Starting || !self.is_running() {
            return Ok(Vec::new());
        }
        let used = self.ring.resume(&*self.memory)?;
        if used != 0 {
            // An earlier back-end may have died between giving a request back and notifying the driver.
            self.interrupt_driver();
        }
        let size = self.ring.size;
        self.tracker = match &self.region {
            Some(region) => region.tracker(self.index, size)?,
            None => None,
        };
        self.state = State::Started;
        let Some(tracker) = &mut self.tracker else { return Ok(Vec::new()) };
        let available = self.ring.available_index(&*self.memory)?;
        let Some(heads) = tracker.recover(used, available)? else { return Ok(Vec::new()) };
        // The index that the front-end knows does not count: what is neither used nor in flight was never taken.
        let count = u16::try_from(heads.len()).map_err(|_| RingError::Available { got: u16::MAX, size })?;
        self.ring.next_available = used.wrapping_add(count);
        if count != 0 {
            log::info!("queue {}: {count} unfinished requests are carried out again", self.index);
        }
        let taken = |head| Taken { head, chain: self.ring.chain(&self.memory, head) };
        Ok(heads.into_iter().map(taken).collect())
    }

    /// Takes the next request, if the driver has made one available.
    pub(super) fn take(&mut self) -> Result<Option<Taken>, Broken> {
        let Some(head) = self.ring.pop(&*self.memory)? else { return Ok(None) };
        self.window.request_came();
        if let Some(tracker) = &mut self.tracker {
            tracker.begin(head)?;
        }
        Ok(Some(Taken { head, chain: self.ring.chain(&self.memory, head) }))
    }

    /// Gives a request back to the driver, with `len` bytes written to its memory.
    pub(super) fn complete(&mut self, head: u16, len: u32) -> Result<(), Broken> {
        let Some(tracker) = &mut self.tracker else { return Ok(self.ring.push(&*self.memory, head, len)?) };
        tracker.finish(head)?;
        self.ring.push(&*self.memory, head, len)?;
        Ok(tracker.forget()?)
    }

    /// Notifies the driver of the requests that were given back, if it wants to know.
    pub(super) fn announce(&mut self) -> Result<(), Broken> {
        if self.ring.needs_notification(&*self.memory)? {
            self.interrupt_driver();
        }
        Ok(())
    }

    /// Whether a notification is a store of this thread, without a system call.
    pub(super) fn rings_directly(&self) -> bool {
        self.doorbells.as_ref().is_some_and(|doorbells| doorbells.has(self.index))
    }

    /// Whether there is another request, after the poll window if there is one and it is to be used. If not, the driver
    /// will kick.
    pub(super) fn has_more(&mut self, watch: bool, interrupt: &AtomicBool) -> Result<bool, Broken> {
        let found = watch && self.window.finds_request(&self.ring, &self.memory, interrupt)?;
        Ok(found || self.ring.enable_kicks(&*self.memory)?)
    }

    fn interrupt_driver(&mut self) {
        let Some(call) = &self.call else { return };
        if self.doorbells.as_ref().is_some_and(|doorbells| doorbells.ring(self.index)) {
            return;
        }
        if let Err(error) = notify::signal(call) {
            log::warn!(
                "queue {}: the driver gets no interrupts: cannot signal the call event: {error}",
                self.index
            );
            self.call = None;
        }
    }
}
