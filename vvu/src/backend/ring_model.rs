//! Driver and device in two threads, in every order that the memory model allows: no notification is lost.
//!
//! The device is the real [`SplitRing`], over memory made of loom's atomics. The driver does what virtio 1.2, 2.7.13 and
//! 2.7.14 say. Bounds: a queue of two descriptors, up to two requests, at most three preemptions.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU16, fence};
use loom::thread;

use super::*;

const SIZE: u16 = 2;
const AVAILABLE: u64 = 0;
const USED: u64 = 16;
/// `used_event`, behind the available ring.
const USED_EVENT: u64 = AVAILABLE + 4 + 2 * SIZE as u64;
/// `avail_event`, behind the used ring.
const AVAIL_EVENT: u64 = USED + 4 + 8 * SIZE as u64;

/// Memory whose accesses loom orders. The elements of the used ring do not matter here.
struct Memory {
    words: Vec<AtomicU16>,
    /// Whether the device's fences work: without them the model has to fail.
    fences: bool,
    kicked: AtomicBool,
    interrupted: AtomicBool,
}

impl Memory {
    fn new(fences: bool) -> Arc<Self> {
        let words = (0..=AVAIL_EVENT / 2).map(|_| AtomicU16::new(0)).collect();
        let (kicked, interrupted) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Self { words, fences, kicked, interrupted })
    }

    fn word(&self, addr: u64) -> &AtomicU16 {
        &self.words[usize::try_from(addr / 2).expect("small")]
    }
}

impl RingMemory for Memory {
    fn load(&self, addr: GuestAddress, order: Ordering) -> Result<u16, RingError> {
        Ok(self.word(addr.0).load(order))
    }

    fn store(&self, addr: GuestAddress, value: u16, order: Ordering) -> Result<(), RingError> {
        self.word(addr.0).store(value, order);
        Ok(())
    }

    fn write(&self, _: GuestAddress, _: [u32; 2]) -> Result<(), RingError> {
        Ok(())
    }

    fn fence(&self) {
        if self.fences {
            fence(SeqCst);
        }
    }
}

fn ring(event_idx: bool) -> SplitRing {
    let (available, used) = (GuestAddress(AVAILABLE), GuestAddress(USED));
    SplitRing { size: SIZE, available, used, event_idx, ..SplitRing::default() }
}

fn walk(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// The driver makes request `index` available and kicks if the device wants that.
fn make_available(memory: &Memory, index: u16, event_idx: bool) {
    memory.word(AVAILABLE + 4 + 2 * u64::from(index % SIZE)).store(index % SIZE, Relaxed);
    memory.word(AVAILABLE + 2).store(index + 1, Release);
    fence(SeqCst);
    let wanted = if event_idx {
        memory.word(AVAIL_EVENT).load(Relaxed) == index
    } else {
        memory.word(USED).load(Relaxed) == 0
    };
    if wanted {
        memory.kicked.store(true, Relaxed);
    }
}

/// The device serves until it goes to sleep, as the engine does. Returns the requests that it took.
fn serve(memory: &Memory, ring: &mut SplitRing) -> Vec<u16> {
    let mut taken = Vec::new();
    loop {
        ring.disable_kicks(memory).expect("memory");
        while let Some(head) = ring.pop(memory).expect("a sound ring") {
            taken.push(head);
        }
        if !ring.enable_kicks(memory).expect("memory") {
            return taken;
        }
    }
}

/// A device that sleeps although there is a request was kicked.
fn kicks(event_idx: bool, fences: bool, requests: u16) {
    walk(move || {
        let memory = Memory::new(fences);
        // A request was dealt with before, so that the wish for a kick with the next is not there from the start.
        memory.word(AVAILABLE + 2).store(1, Relaxed);
        let mut ring = SplitRing { next_available: 1, ..ring(event_idx) };
        let driver = thread::spawn({
            let memory = Arc::clone(&memory);
            move || (1..=requests).for_each(|index| make_available(&memory, index, event_idx))
        });
        let taken = serve(&memory, &mut ring);
        driver.join().expect("driver");
        assert_eq!(taken, (1..).take(taken.len()).map(|index| index % SIZE).collect::<Vec<u16>>());
        assert!(taken.len() == usize::from(requests) || memory.kicked.load(Relaxed), "a lost kick");
    });
}

/// A driver that sleeps although a request was used is interrupted.
fn interrupts(event_idx: bool, fences: bool) {
    walk(move || {
        let memory = Memory::new(fences);
        // The driver was told of nothing yet and wants to hear of nothing at first.
        let unwanted = if event_idx { (USED_EVENT, u16::MAX - 1) } else { (AVAILABLE, 1) };
        memory.word(unwanted.0).store(unwanted.1, Relaxed);
        let device = thread::spawn({
            let memory = Arc::clone(&memory);
            move || {
                let mut ring = ring(event_idx);
                for head in 0..2 {
                    ring.push(&*memory, head, 0).expect("memory");
                    if ring.needs_notification(&*memory).expect("memory") {
                        memory.interrupted.store(true, Relaxed);
                    }
                }
            }
        });
        // The driver has handled what it sees, states its wish for the next, and looks again.
        let seen = memory.word(USED + 2).load(Acquire);
        let wish = if event_idx { (USED_EVENT, seen) } else { (AVAILABLE, 0) };
        memory.word(wish.0).store(wish.1, Relaxed);
        fence(SeqCst);
        let more = memory.word(USED + 2).load(Acquire) != seen;
        device.join().expect("device");
        let left = memory.word(USED + 2).load(Acquire) != seen;
        assert!(!left || more || memory.interrupted.load(Relaxed), "a lost interrupt");
    });
}

#[test]
fn no_kick_is_lost() {
    for event_idx in [false, true] {
        kicks(event_idx, true, 1);
        kicks(event_idx, true, 2);
    }
}

#[test]
fn no_interrupt_is_lost() {
    interrupts(false, true);
    interrupts(true, true);
}

#[test]
#[should_panic(expected = "a lost kick")]
fn without_its_fence_a_kick_is_lost() {
    kicks(false, false, 1);
}

#[test]
#[should_panic(expected = "a lost kick")]
fn without_its_fence_a_kick_is_lost_with_event_indices() {
    kicks(true, false, 1);
}

#[test]
#[should_panic(expected = "a lost interrupt")]
fn without_its_fence_an_interrupt_is_lost() {
    interrupts(false, false);
}

#[test]
#[should_panic(expected = "a lost interrupt")]
fn without_its_fence_an_interrupt_is_lost_with_event_indices() {
    interrupts(true, false);
}
