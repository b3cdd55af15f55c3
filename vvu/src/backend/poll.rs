//! Whether to look for the next request for a while before waiting to be told of it.
//!
//! A notification costs both VMs exits and wake-ups; a driver that soon has another request need send none to a
//! back-end that is still looking. Looking costs processor time, so it ends after a set time, and where it was in
//! vain it is left off for twice as many waits as the time before.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vhost_user_backend::VringT;
use virtio_queue::{Error, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use super::server::Memory;
use super::vring::Vring;

/// Waits between two attempts that were in vain, at most: looking then costs next to nothing.
const PAUSE_MAX: u32 = 64;
/// Looks at a ring between two at the clock.
const LOOKS: u32 = 16;
/// Where the index is in the available ring (virtio 1.2, 2.7.6).
const AVAILABLE_INDEX: usize = 2;

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

    /// Whether the driver makes something available soon, as far as it is worth to look. Takes no lock
    /// that those who stop the queue would have to wait for, and ends when there is no front-end any longer.
    ///
    /// # Errors
    /// The ring is not in memory.
    pub(super) fn sees_more(
        &mut self,
        vring: &Vring,
        memory: &Memory,
        gone: &AtomicBool,
    ) -> Result<bool, Error> {
        let Some(limit) = self.attempt() else { return Ok(false) };
        let found = look(limit, vring, memory, gone)?;
        self.note(found);
        Ok(found)
    }

    /// How long to look this time, if at all. [`note`](Self::note) is to be called after that.
    fn attempt(&mut self) -> Option<Duration> {
        if self.pause > 0 {
            self.pause -= 1;
            return None;
        }
        (!self.limit.is_zero()).then_some(self.limit)
    }

    /// Learns whether there was a request.
    fn note(&mut self, found: bool) {
        self.last_pause = if found { 0 } else { (self.last_pause * 2).clamp(1, PAUSE_MAX) };
        self.pause = self.last_pause;
    }
}

fn look(limit: Duration, vring: &Vring, memory: &Memory, gone: &AtomicBool) -> Result<bool, Error> {
    let memory = memory.memory();
    let (ring, next) = {
        let state = vring.get_ref();
        (GuestAddress(state.get_queue().avail_ring()), state.get_queue().next_avail())
    };
    let index = memory.checked_offset(ring, AVAILABLE_INDEX).ok_or(Error::AddressOverflow)?;
    let begun = Instant::now();
    while !gone.load(Ordering::Relaxed) && begun.elapsed() < limit {
        for _ in 0..LOOKS {
            let available: u16 = memory.load(index, Ordering::Acquire).map_err(Error::GuestMemory)?;
            if u16::from_le(available) != next {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        // Whoever makes the next request may be waiting for this processor.
        thread::yield_now();
    }
    Ok(false)
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
