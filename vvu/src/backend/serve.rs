//! Serves one queue: moves requests from the queue to the engine and back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::engine::{Engine, Finished};
use super::queue::{Broken, Queue};

/// Bytes from which on a request is announced before the next one is carried out, where that takes no system call. The
/// driver then handles one while the back-end copies the next; with small requests, announcing several at once saves
/// more than that gains.
const LARGE: u64 = 64 << 10;

/// A queue and the engine that carries out its requests.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) queue: Queue,
    engine: Box<dyn Engine>,
}

impl Service {
    pub(super) fn new(queue: Queue, engine: Box<dyn Engine>) -> Self {
        Self { queue, engine }
    }

    /// Carries out the requests of the queue until there are none, the front-end stops the queue, or `interrupt` is set.
    /// Requests may still be in flight then: call this again when the engine's event or a kick comes. A queue that the
    /// driver has broken is stopped.
    pub(super) fn serve(&mut self, interrupt: &AtomicBool) {
        let served = self.recover().and_then(|()| self.process(interrupt));
        self.stop_if_broken(served);
    }

    /// Waits until no request is in flight.
    pub(super) fn drain(&mut self) {
        while self.engine.in_flight() > 0 {
            self.engine.wait();
            let announced = self.collect_and_announce();
            self.stop_if_broken(announced);
        }
    }

    fn stop_if_broken(&mut self, result: Result<(), Broken>) {
        if let Err(error) = result {
            log::warn!("queue {} is stopped, since its rings are broken: {error}", self.queue.index);
            self.queue.stop();
        }
    }

    /// Carries out the requests again that an earlier back-end left unfinished. They have been in flight ever since, so
    /// nothing interrupts this.
    fn recover(&mut self) -> Result<(), Broken> {
        let memory = Arc::clone(&self.queue.memory);
        for taken in self.queue.recover()? {
            while !self.engine.has_room() {
                self.engine.wait();
                self.collect_and_announce()?;
            }
            if let Some(finished) = self.engine.begin(&memory, taken, &mut || {}) {
                self.give_back(finished)?;
                self.queue.announce()?;
            }
        }
        self.engine.submit();
        Ok(())
    }

    fn process(&mut self, interrupt: &AtomicBool) -> Result<(), Broken> {
        let proceed = |queue: &Queue| queue.is_running() && !interrupt.load(Ordering::Relaxed);
        loop {
            let mut unannounced = self.collect()?;
            if proceed(&self.queue) {
                self.queue.ring.disable_kicks(&*self.queue.memory)?;
                while proceed(&self.queue) && self.engine.has_room() && self.begin_next(&mut unannounced)? {}
                self.engine.submit();
                unannounced |= self.collect()?;
            }
            if unannounced {
                self.queue.announce()?;
            }
            // Without room, the end of a request is what comes next, and with requests in flight there is no time to watch
            // the ring.
            let watch = self.engine.in_flight() == 0;
            if !proceed(&self.queue) || !self.engine.has_room() || !self.queue.has_more(watch, interrupt)? {
                return Ok(());
            }
        }
    }

    /// Begins the next request; returns whether there is one.
    fn begin_next(&mut self, unannounced: &mut bool) -> Result<bool, Broken> {
        let Some(taken) = self.queue.take()? else { return Ok(false) };
        let memory = Arc::clone(&self.queue.memory);
        let mut announced = Ok(());
        let mut announce = || {
            if std::mem::take(unannounced) {
                announced = self.queue.announce();
            }
        };
        let finished = self.engine.begin(&memory, taken, &mut announce);
        announced?;
        if let Some(finished) = finished {
            *unannounced = self.give_back(finished)?;
        }
        Ok(true)
    }

    /// Gives back what the engine has finished, and returns whether the driver still has to be notified of that.
    fn collect(&mut self) -> Result<bool, Broken> {
        let mut unannounced = false;
        while let Some(finished) = self.engine.next_finished() {
            unannounced = self.give_back(finished)?;
        }
        Ok(unannounced)
    }

    fn collect_and_announce(&mut self) -> Result<(), Broken> {
        if self.collect()? { self.queue.announce() } else { Ok(()) }
    }

    /// Gives a request back, and returns whether the driver still has to be notified. A queue that was broken meanwhile
    /// keeps it: it is unfinished for the next back-end.
    fn give_back(&mut self, finished: Finished) -> Result<bool, Broken> {
        if !self.queue.is_running() {
            return Ok(false);
        }
        self.queue.complete(finished.head, finished.written)?;
        let alone = self.queue.rings_directly() && finished.size >= LARGE;
        if alone {
            self.queue.announce()?;
        }
        Ok(!alone)
    }
}

#[cfg(test)]
#[path = "serve_test.rs"]
mod tests;
