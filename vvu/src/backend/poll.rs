//! The poll window: for how long a queue that was emptied is watched for the next request.
//!
//! A kick costs both VMs exits and wake-ups, and a driver need not send one to a back-end that is still watching the
//! ring. Watching costs processor time, so it ends after a set time, and after a window without a request it is left
//! out for twice as many waits as the time before.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;

use super::ring::{RingError, SplitRing};

/// Most waits without a window between two windows that were in vain: the cost is next to nothing then.
const PAUSE_MAX: u32 = 64;
/// Looks at the ring for each look at the clock.
const LOOKS: u32 = 16;

/// Decides for one queue when to watch the ring.
#[derive(Debug, Clone, Copy)]
pub(super) struct PollWindow {
    limit: Duration,
    /// Waits that are still to be made without a window.
    pause: u32,
    /// The last value that `pause` was set to; 0 after a success.
    last_pause: u32,
}

impl PollWindow {
    /// A window of `limit`; zero turns it off.
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, pause: 0, last_pause: 0 }
    }

    /// Watches `ring` for a request, if it is time for a window, and returns whether there is one. Ends early when
    /// `interrupt` is set.
    ///
    /// # Errors
    /// [`RingError::Memory`].
    pub(super) fn finds_request(
        &mut self,
        ring: &SplitRing,
        memory: &GuestMemoryMmap,
        interrupt: &AtomicBool,
    ) -> Result<bool, RingError> {
        let Some(limit) = self.open() else { return Ok(false) };
        let found = watch(limit, ring, memory, interrupt)?;
        self.learn(found);
        Ok(found)
    }

    /// The length of the window, if it is time for one. [`learn`](Self::learn) has to be called after it.
    fn open(&mut self) -> Option<Duration> {
        if self.pause > 0 {
            self.pause -= 1;
            return None;
        }
        (!self.limit.is_zero()).then_some(self.limit)
    }

    /// Takes into account whether there was a request in the window.
    fn learn(&mut self, found: bool) {
        self.last_pause = if found { 0 } else { (self.last_pause * 2).clamp(1, PAUSE_MAX) };
        self.pause = self.last_pause;
    }
}

fn watch(
    limit: Duration,
    ring: &SplitRing,
    memory: &GuestMemoryMmap,
    interrupt: &AtomicBool,
) -> Result<bool, RingError> {
    let begun = Instant::now();
    while !interrupt.load(Ordering::Relaxed) && begun.elapsed() < limit {
        for _ in 0..LOOKS {
            if ring.available_index(memory)? != ring.next_available {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        // The thread that makes the next request may be waiting for this processor.
        thread::yield_now();
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits until the next window.
    fn pause(poll: &mut PollWindow) -> u32 {
        (0..).find(|_| poll.open().is_some()).expect("a window")
    }

    #[test]
    fn windows_without_a_request_become_rarer_until_there_is_one() {
        let mut poll = PollWindow::new(Duration::from_micros(1));
        assert_eq!(pause(&mut poll), 0);
        let mut pauses = Vec::new();
        for _ in 0..9 {
            poll.learn(false);
            pauses.push(pause(&mut poll));
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 64, 64]);
        poll.learn(true);
        assert_eq!(pause(&mut poll), 0);
        poll.learn(false);
        assert_eq!(pause(&mut poll), 1);
    }

    #[test]
    fn a_window_of_zero_is_never_open() {
        let mut poll = PollWindow::new(Duration::ZERO);
        assert!((0..1000).all(|_| poll.open().is_none()));
    }
}
