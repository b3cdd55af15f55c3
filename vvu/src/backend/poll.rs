//! Whether to look for the next request for a while before waiting to be told of it.
//!
//! A notification costs both VMs exits and wake-ups; a driver that soon has another request need send none to a
//! back-end that is still looking. Looking costs processor time, so it ends after a set time, and where it was in
//! vain it is left off for twice as many waits as the time before.

use std::time::Duration;

/// Waits between two attempts that were in vain, at most: looking then costs next to nothing.
const PAUSE_MAX: u32 = 64;

/// What one queue has learnt.
#[derive(Debug, Clone, Copy)]
pub(super) struct Poll {
    limit: Duration,
    /// Waits to go without looking.
    pause: u32,
    /// What `pause` was last; 0 after a success.
    last_pause: u32,
}

impl Poll {
    /// Looks for at most `limit`; not at all if that is zero.
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, pause: 0, last_pause: 0 }
    }

    /// How long to look this time, if at all. [`note`](Self::note) is to be called after that.
    pub(super) fn attempt(&mut self) -> Option<Duration> {
        if self.pause > 0 {
            self.pause -= 1;
            return None;
        }
        (!self.limit.is_zero()).then_some(self.limit)
    }

    /// Learns whether there was a request.
    pub(super) fn note(&mut self, found: bool) {
        self.last_pause = if found { 0 } else { (self.last_pause * 2).clamp(1, PAUSE_MAX) };
        self.pause = self.last_pause;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits until the next attempt.
    fn pause(poll: &mut Poll) -> u32 {
        (0..).find(|_| poll.attempt().is_some()).expect("it comes")
    }

    #[test]
    fn what_is_in_vain_is_tried_ever_more_rarely_until_it_succeeds() {
        let mut poll = Poll::new(Duration::from_micros(1));
        assert_eq!(pause(&mut poll), 0);
        let mut pauses = Vec::new();
        for _ in 0..9 {
            poll.note(false);
            pauses.push(pause(&mut poll));
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 64, 64]);
        poll.note(true);
        assert_eq!(pause(&mut poll), 0);
        poll.note(false);
        assert_eq!(pause(&mut poll), 1);
    }

    #[test]
    fn it_can_be_off() {
        let mut poll = Poll::new(Duration::ZERO);
        assert!((0..1000).all(|_| poll.attempt().is_none()));
    }
}
