//! Where requests of all queues wait for one another: flushes, and changes of a range that somebody else changes by
//! reading, changing and writing whole blocks.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::event::Event;

/// A range of the disk: the offset of its first byte, and of the first byte behind it.
pub(super) type Bytes = (u64, u64);

/// What requests of all queues wait for.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// A flush is being carried out.
    flushing: bool,
    /// A flush has failed.
    flush_failed: bool,
    /// Ranges that are being changed. No two overlap.
    locked: Vec<Bytes>,
    /// Counts releases.
    releases: u64,
    /// Whom to tell of the next release.
    waiting: Vec<Arc<Event>>,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a flush, unless another one is being carried out: of two at the same time, the kernel tells one of a
    /// failure. Returns whether it has begun; if not, `waiter` is signalled when it is time to try again.
    ///
    /// # Errors
    /// When a flush has failed before. The kernel drops the writes that it could not carry out, reports the error once,
    /// and succeeds from then on. So all flushes fail, of every queue and every front-end, until the disk is opened again.
    pub(super) fn begin_flush(&self, waiter: Option<&Arc<Event>>) -> io::Result<bool> {
        let mut state = self.state();
        if state.flush_failed {
            return Err(io::Error::other("an earlier flush failed, and with it writes may be lost"));
        }
        if state.flushing {
            state.wait(waiter);
            return Ok(false);
        }
        state.flushing = true;
        Ok(true)
    }

    /// Ends the flush that was begun, with its result.
    pub(super) fn end_flush(&self, result: Result<(), &io::Error>) {
        let mut state = self.state();
        state.flushing = false;
        if let Err(error) = result {
            state.flush_failed = true;
            log::error!(
                "writes to the disk may be lost: {error}; every flush fails until the back-end is started again"
            );
        }
        self.release(state);
    }

    /// Locks a range, unless a part of it is locked. Returns whether it is; if not, `waiter` is signalled when it is time to
    /// try again.
    pub(super) fn lock(&self, range: Bytes, waiter: Option<&Arc<Event>>) -> bool {
        let mut state = self.state();
        if state.locked.iter().any(|locked| locked.0 < range.1 && range.0 < locked.1) {
            state.wait(waiter);
            return false;
        }
        state.locked.push(range);
        true
    }

    /// Unlocks a range that was locked.
    pub(super) fn unlock(&self, range: Bytes) {
        let mut state = self.state();
        if let Some(position) = state.locked.iter().position(|locked| *locked == range) {
            state.locked.swap_remove(position);
        }
        self.release(state);
    }

    /// The number of releases so far.
    pub(super) fn releases(&self) -> u64 {
        self.state().releases
    }

    /// Waits until there were more than `releases` releases.
    pub(super) fn wait_beyond(&self, releases: u64) {
        let wait = self.released.wait_while(self.state(), |state| state.releases == releases);
        drop(wait.unwrap_or_else(PoisonError::into_inner));
    }

    fn release(&self, mut state: MutexGuard<'_, State>) {
        state.releases = state.releases.wrapping_add(1);
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        self.released.notify_all();
        waiting.iter().for_each(|waiter| waiter.signal());
    }

    /// Forgets that a flush has failed, as if the disk had been opened again.
    #[cfg(fuzzing)]
    pub(super) fn forget_failure(&self) {
        self.state().flush_failed = false;
    }
}

impl State {
    fn wait(&mut self, waiter: Option<&Arc<Event>>) {
        if let Some(waiter) = waiter
            && !self.waiting.iter().any(|other| Arc::ptr_eq(other, waiter))
        {
            self.waiting.push(Arc::clone(waiter));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_flush_at_a_time_and_none_after_a_failure() {
        let (gate, waiter) = (Gate::default(), Arc::new(Event::new().expect("event")));
        assert!(gate.begin_flush(Some(&waiter)).expect("no failure yet"));
        assert!(!gate.begin_flush(Some(&waiter)).expect("no failure yet"));
        assert!(!gate.begin_flush(Some(&waiter)).expect("no failure yet"));
        gate.end_flush(Ok(()));
        assert_eq!(waiter.drain(), 1, "told once");
        assert!(gate.begin_flush(Some(&waiter)).expect("no failure yet"));
        gate.end_flush(Err(&io::Error::other("lost")));
        assert_eq!(waiter.drain(), 0, "nobody waits");
        gate.begin_flush(Some(&waiter)).expect_err("writes may be lost");
    }

    #[test]
    fn ranges_that_touch_do_not_wait_for_one_another_and_overlapping_ones_do() {
        let (gate, waiter) = (Gate::default(), Arc::new(Event::new().expect("event")));
        assert!(gate.lock((0, 4096), Some(&waiter)) && gate.lock((4096, 8192), Some(&waiter)));
        for overlapping in [(0, 1), (4095, 4097), (0, 8192), (4096, 8192)] {
            assert!(!gate.lock(overlapping, Some(&waiter)), "{overlapping:?}");
        }
        gate.unlock((0, 4096));
        assert_eq!(waiter.drain(), 1);
        assert!(gate.lock((0, 1), None) && !gate.lock((8191, 8192), None));
    }

    #[test]
    fn a_thread_waits_for_the_next_release_and_for_none_that_it_has_missed() {
        let gate = Gate::default();
        assert!(gate.lock((0, 1), None));
        let seen = gate.releases();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| gate.wait_beyond(seen));
            gate.unlock((0, 1));
            waiting.join().expect("no panic");
        });
        gate.wait_beyond(seen);
    }
}
