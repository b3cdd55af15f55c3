//! The poll window: for how long a queue that was emptied is watched for the next request.
//!
//! A kick costs both VMs exits and wake-ups, and a driver need not send one to a back-end that is still watching the
//! ring. Watching costs processor time. So the window is twice as long as it took of late until the next request came,
//! and at most as long as the user allows. After a window without a request it is left out for twice as many waits as the
//! time before, until requests come soon enough again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;

use super::ring::{RingError, SplitRing};

/// Length of the window of a queue that nothing is known of.
const FIRST: Duration = Duration::from_micros(200);
/// Most waits without a window between two windows that were in vain: the cost is next to nothing then.
const PAUSE_MAX: u32 = 64;
/// Looks at the ring for each look at the clock.
const LOOKS: u32 = 16;

/// Decides for one queue when to watch the ring, and for how long.
#[derive(Debug, Clone, Copy)]
pub(super) struct PollWindow {
    max: Duration,
    /// How long it took of late until the next request came, if that was not more than `max`.
    gap: Option<Duration>,
    /// When the queue was emptied, until the next request comes.
    emptied: Option<Instant>,
    /// Waits that are still to be made without a window.
    pause: u32,
    /// The last value that `pause` was set to; 0 after a success.
    last_pause: u32,
}

impl PollWindow {
    /// A window of at most `max`; zero turns it off.
    pub(super) fn new(max: Duration) -> Self {
        Self { max, gap: None, emptied: None, pause: 0, last_pause: 0 }
    }

    /// Makes the window as long as it may be, as if the last requests had come that far apart.
    #[cfg(test)]
    pub(super) fn widen(&mut self) {
        self.gap = Some(self.max);
    }

    /// Watches `ring`, which is empty, for a request, if it is time for a window, and returns whether there is one. Ends
    /// early when `interrupt` is set.
    ///
    /// # Errors
    /// [`RingError::Memory`].
    pub(super) fn finds_request(
        &mut self,
        ring: &SplitRing,
        memory: &GuestMemoryMmap,
        interrupt: &AtomicBool,
    ) -> Result<bool, RingError> {
        if self.max.is_zero() {
            return Ok(false);
        }
        let now = Instant::now();
        self.emptied = Some(now);
        let Some(length) = self.open() else { return Ok(false) };
        let found = watch(now + length, ring, memory, interrupt)?;
        self.learn(found);
        Ok(found)
    }

    /// A request was taken from the ring.
    pub(super) fn request_came(&mut self) {
        if let Some(emptied) = self.emptied.take() {
            self.learn_gap(emptied.elapsed());
        }
    }

    /// The length of the window, if it is time for one. [`learn`](Self::learn) has to be called after it.
    fn open(&mut self) -> Option<Duration> {
        if self.pause > 0 {
            self.pause -= 1;
            return None;
        }
        Some(self.gap.map_or(FIRST, |gap| gap * 2).min(self.max))
    }

    /// Takes into account whether there was a request in the window.
    fn learn(&mut self, found: bool) {
        self.last_pause = if found { 0 } else { (self.last_pause * 2).clamp(1, PAUSE_MAX) };
        self.pause = self.last_pause;
    }

    /// Takes into account how long it took until the next request came. The estimate rises at once and falls slowly.
    fn learn_gap(&mut self, gap: Duration) {
        if gap > self.max {
            return;
        }
        // A window would have found it.
        (self.pause, self.last_pause) = (0, 0);
        self.gap = Some(self.gap.map_or(gap, |before| gap.max((before * 7 + gap) / 8)));
    }
}

fn watch(
    end: Instant,
    ring: &SplitRing,
    memory: &GuestMemoryMmap,
    interrupt: &AtomicBool,
) -> Result<bool, RingError> {
    while !interrupt.load(Ordering::Relaxed) && Instant::now() < end {
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

    const fn us(microseconds: u64) -> Duration {
        Duration::from_micros(microseconds)
    }

    #[test]
    fn the_window_is_twice_the_gap_and_never_more_than_the_most() {
        let mut poll = PollWindow::new(us(1000));
        assert_eq!(poll.open(), Some(FIRST));
        poll.learn_gap(us(300));
        assert_eq!(poll.open(), Some(us(600)));
        poll.learn_gap(us(900));
        assert_eq!(poll.open(), Some(us(1000)));
        for _ in 0..100 {
            poll.learn_gap(us(20));
        }
        assert!((us(40)..us(42)).contains(&poll.open().expect("a window")));
        assert_eq!(PollWindow::new(us(50)).open(), Some(us(50)));
    }

    #[test]
    fn a_request_that_a_window_would_have_found_ends_the_pause_and_a_late_one_does_not() {
        let mut poll = PollWindow::new(us(1000));
        (0..5).for_each(|_| poll.learn(false));
        poll.learn_gap(us(1001));
        assert_eq!(poll.open(), None);
        poll.learn_gap(us(999));
        assert_eq!(poll.open(), Some(us(1000)));
    }

    #[test]
    fn a_window_of_zero_is_never_open() {
        let mut poll = PollWindow::new(Duration::ZERO);
        let (ring, memory) = (SplitRing::default(), GuestMemoryMmap::default());
        // Looking at this ring would fail: it is nowhere.
        assert!(!poll.finds_request(&ring, &memory, &AtomicBool::new(false)).expect("no look"));
        poll.request_came();
        assert_eq!(poll.gap, None);
    }
}
