use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use super::*;
use proptest::prelude::*;
use vm_memory::{GuestMemoryError, GuestMemoryMmap, ReadVolatile, WriteVolatile};

const SIZE: u16 = 8;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("memory")
}

fn fresh() -> (GuestMemoryMmap, Tracker<GuestMemoryMmap>) {
    let memory = memory();
    let mut tracker = Tracker::new(memory.clone(), GuestAddress(0), SIZE);
    assert_eq!(tracker.recover(5, 5).expect("fresh"), None);
    (memory, tracker)
}

fn recover(memory: &GuestMemoryMmap, used: u16, available: u16) -> Result<Option<Vec<u16>>, TrackerError> {
    Tracker::new(memory.clone(), GuestAddress(0), SIZE).recover(used, available)
}

/// vhost-user, "Inflight I/O tracking": `QueueRegionSplit` and `DescStateSplit`.
#[test]
fn golden_layout() {
    let (memory, mut tracker) = fresh();
    tracker.begin(2).expect("begin");
    tracker.begin(1).expect("begin");
    tracker.finish(2).expect("finish");
    tracker.forget().expect("forget");
    tracker.begin(0).expect("begin");
    tracker.finish(1).expect("finish");
    let mut bytes = [0; 64];
    memory.read_slice(&mut bytes, GuestAddress(0)).expect("read");
    #[rustfmt::skip]
    let want = [
        0, 0, 0, 0, 0, 0, 0, 0,  1, 0,  8, 0,  1, 0,  6, 0,
        1, 0, 0, 0, 0, 0,  0, 0,  2, 0, 0, 0, 0, 0, 0, 0,
        1, 0, 0, 0, 0, 0,  2, 0,  1, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0,  0, 0,  0, 0, 0, 0, 0, 0, 0, 0,
    ];
    assert_eq!(bytes, want);
}

#[test]
fn what_is_in_flight_comes_back_in_the_order_in_which_it_was_taken() {
    let (memory, mut tracker) = fresh();
    for head in [3, 7, 0, 5] {
        tracker.begin(head).expect("begin");
    }
    tracker.finish(7).expect("finish");
    // Request 7 is in the used ring and still marked.
    assert_eq!(recover(&memory, 6, 9).expect("recovery"), Some(vec![3, 0, 5]));
    assert_eq!(recover(&memory, 6, 9).expect("recovery"), Some(vec![3, 0, 5]), "and does so again");
}

/// Other back-ends give back several requests at once, and link them by `next`.
#[test]
fn a_whole_batch_is_written_off() {
    let (memory, mut tracker) = fresh();
    for head in 0..4 {
        tracker.begin(head).expect("begin");
    }
    for head in [1, 0, 3] {
        tracker.finish(head).expect("finish");
    }
    assert_eq!(recover(&memory, 8, 9).expect("recovery"), Some(vec![2]));
}

#[test]
fn the_counter_goes_on_after_a_recovery() {
    let (memory, mut tracker) = fresh();
    tracker.begin(6).expect("begin");
    let mut next = Tracker::new(memory.clone(), GuestAddress(0), SIZE);
    assert_eq!(next.recover(5, 6).expect("recovery"), Some(vec![6]));
    next.begin(1).expect("begin");
    assert_eq!(recover(&memory, 5, 7).expect("recovery"), Some(vec![6, 1]));
}

#[test]
fn used_indices_wrap() {
    let memory = memory();
    let mut tracker = Tracker::new(memory.clone(), GuestAddress(0), SIZE);
    assert_eq!(tracker.recover(u16::MAX, u16::MAX).expect("fresh"), None);
    tracker.begin(4).expect("begin");
    tracker.begin(5).expect("begin");
    tracker.finish(4).expect("finish");
    assert_eq!(recover(&memory, 0, 1).expect("recovery"), Some(vec![5]));
}

#[test]
fn heads_that_no_ring_has_are_refused() {
    let (_memory, mut tracker) = fresh();
    for head in [SIZE, u16::MAX] {
        assert!(matches!(tracker.begin(head), Err(TrackerError::Head { .. })));
        assert!(matches!(tracker.finish(head), Err(TrackerError::Head { .. })));
    }
}

#[test]
fn regions_of_others_are_refused() {
    let with = |offset: u64, value: u16| {
        let (memory, mut tracker) = fresh();
        tracker.begin(0).expect("begin");
        memory.write_obj(value, GuestAddress(offset)).expect("write");
        recover(&memory, 5, 6)
    };
    assert!(matches!(with(FEATURES, 1), Err(TrackerError::Unknown { version: 1, features: 1 })));
    assert!(matches!(with(VERSION, 2), Err(TrackerError::Unknown { version: 2, .. })));
    assert!(matches!(with(DESC_NUM, 7), Err(TrackerError::Size { got: 7, want: 8 })));
    // Nine batches ago.
    assert!(matches!(with(USED_IDX, 5u16.wrapping_sub(9)), Err(TrackerError::Foreign { .. })));
    // As after a reset of the driver's ring, in which nothing was made available.
    let (memory, mut tracker) = fresh();
    tracker.begin(0).expect("begin");
    assert!(matches!(recover(&memory, 0, 0), Err(TrackerError::Foreign { inflight: 1, .. })));
}

#[test]
fn a_region_with_nothing_in_flight_fits_any_ring() {
    let (memory, mut tracker) = fresh();
    tracker.begin(0).expect("begin");
    tracker.finish(0).expect("finish");
    tracker.forget().expect("forget");
    assert_eq!(recover(&memory, 40_000, 40_003).expect("recovery"), Some(vec![]));
}

/// Memory that ignores stores after a number of them, as if the process had been killed then.
#[derive(Clone, Debug)]
struct Mortal {
    memory: GuestMemoryMmap,
    stores_left: Rc<Cell<usize>>,
}

impl Mortal {
    fn dies(&self) -> bool {
        let left = self.stores_left.get();
        self.stores_left.set(left.saturating_sub(1));
        left == 0
    }
}

impl Bytes<GuestAddress> for Mortal {
    type E = GuestMemoryError;

    fn store<T: AtomicAccess>(&self, value: T, at: GuestAddress, order: Ordering) -> Result<(), Self::E> {
        if self.dies() { Ok(()) } else { self.memory.store(value, at, order) }
    }

    fn load<T: AtomicAccess>(&self, at: GuestAddress, order: Ordering) -> Result<T, Self::E> {
        self.memory.load(at, order)
    }

    fn write(&self, _: &[u8], _: GuestAddress) -> Result<usize, Self::E> {
        unreachable!("trackers store and load")
    }

    fn read(&self, _: &mut [u8], _: GuestAddress) -> Result<usize, Self::E> {
        unreachable!("trackers store and load")
    }

    fn write_slice(&self, _: &[u8], _: GuestAddress) -> Result<(), Self::E> {
        unreachable!("trackers store and load")
    }

    fn read_slice(&self, _: &mut [u8], _: GuestAddress) -> Result<(), Self::E> {
        unreachable!("trackers store and load")
    }

    fn read_volatile_from<F: ReadVolatile>(
        &self,
        _: GuestAddress,
        _: &mut F,
        _: usize,
    ) -> Result<usize, Self::E> {
        unreachable!("trackers store and load")
    }

    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        _: GuestAddress,
        _: &mut F,
        _: usize,
    ) -> Result<(), Self::E> {
        unreachable!("trackers store and load")
    }

    fn write_volatile_to<F: WriteVolatile>(
        &self,
        _: GuestAddress,
        _: &mut F,
        _: usize,
    ) -> Result<usize, Self::E> {
        unreachable!("trackers store and load")
    }

    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        _: GuestAddress,
        _: &mut F,
        _: usize,
    ) -> Result<(), Self::E> {
        unreachable!("trackers store and load")
    }
}

/// The driver's side of a ring. Its requests are numbered from 0.
#[derive(Default)]
struct Ring {
    /// The request at each first descriptor.
    at: [Option<u32>; SIZE as usize],
    /// All first descriptors made available so far.
    available: Vec<u16>,
    used: Vec<u32>,
    seen: usize,
    submitted: u32,
}

impl Ring {
    fn submit(&mut self) {
        while let Some(done) = self.used.get(self.seen) {
            self.seen += 1;
            let slot = self.at.iter_mut().find(|at| **at == Some(*done)).expect("used once");
            *slot = None;
        }
        // A driver that has run for a while does not use its descriptors in order.
        let from = usize::try_from(self.submitted * 3).expect("small") % self.at.len();
        let free = (0..self.at.len()).map(|i| (i + from) % self.at.len()).find(|i| self.at[*i].is_none());
        if let Some(head) = free {
            self.at[head] = Some(self.submitted);
            self.available.push(u16::try_from(head).expect("head"));
            self.submitted += 1;
        }
    }

    fn request(&self, head: u16) -> u32 {
        self.at[usize::from(head)].expect("a request")
    }

    fn indices(&self) -> (u16, u16) {
        let index = |len: usize| u16::try_from(len).expect("short run");
        (index(self.used.len()), index(self.available.len()))
    }
}

/// Runs a device until it is killed: it recovers, then does what `steps` say.
fn live(ring: &mut Ring, mortal: &Mortal, steps: &[u8]) -> Result<(), TestCaseError> {
    let mut tracker = Tracker::new(mortal.clone(), GuestAddress(0), SIZE);
    let (used, available) = ring.indices();
    let recovered = tracker.recover(used, available);
    if mortal.stores_left.get() == 0 {
        // The device was killed meanwhile, so the result does not count.
        return Ok(());
    }
    let recovered = recovered.expect("recovery").unwrap_or_default();
    let order: Vec<u32> = recovered.iter().map(|head| ring.request(*head)).collect();
    prop_assert!(order.is_sorted_by(|a, b| a < b), "in order of submission: {order:?}");
    let mut next = ring.used.len() + recovered.len();
    let mut inflight: VecDeque<u16> = recovered.into();
    for step in steps {
        if mortal.stores_left.get() == 0 {
            break;
        }
        match step % 4 {
            0 => ring.submit(),
            1 | 2 if next < ring.available.len() => {
                let head = ring.available[next];
                next += 1;
                tracker.begin(head).expect("begin");
                inflight.push_back(head);
            }
            3 if !inflight.is_empty() => {
                let head = inflight.remove(usize::from(step / 4) % inflight.len()).expect("in flight");
                tracker.finish(head).expect("finish");
                if !mortal.dies() {
                    ring.used.push(ring.request(head));
                }
                tracker.forget().expect("forget");
            }
            _ => {}
        }
    }
    Ok(())
}

/// The orders in which `requests` requests can be taken and finished, as [`live`] takes them: they are taken one after the
/// other, and finished in any order.
fn orders(requests: usize) -> Vec<Vec<u8>> {
    fn extend(steps: &[u8], left: usize, in_flight: usize, all: &mut Vec<Vec<u8>>) {
        if left == 0 && in_flight == 0 {
            all.push(steps.to_vec());
        }
        if left > 0 {
            extend(&[steps, &[0, 1]].concat(), left - 1, in_flight + 1, all);
        }
        for position in 0..in_flight {
            let finish = u8::try_from(4 * position + 3).expect("few");
            extend(&[steps, &[finish]].concat(), left, in_flight - 1, all);
        }
    }
    let mut all = Vec::new();
    extend(&[], requests, 0, &mut all);
    all
}

/// A back-end with several requests in flight is killed after each store, whatever the order in which they end, and so is
/// the next one, after each store of its recovery and of what it finishes.
#[test]
fn with_several_in_flight_each_request_completes_once_after_any_two_kills() {
    let (orders, finish) = (orders(4), [1, 3].repeat(4));
    assert_eq!(orders.len(), 105, "as many as there are ways to pair begins and ends");
    let mut kills = 0;
    for order in &orders {
        for first in 0.. {
            let mut first_died = false;
            for second in 0.. {
                let memory = memory();
                let mut ring = Ring::default();
                let mortal = |stores| {
                    let stores_left = Rc::new(Cell::new(stores));
                    Mortal { memory: memory.clone(), stores_left }
                };
                let killed = |mortal: &Mortal| mortal.stores_left.get() == 0;
                let device = mortal(first);
                live(&mut ring, &device, order).expect("recovery");
                first_died = killed(&device);
                let device = mortal(second);
                live(&mut ring, &device, &finish).expect("recovery");
                let second_died = killed(&device);
                live(&mut ring, &mortal(usize::MAX), &finish).expect("recovery");
                let mut used = ring.used.clone();
                used.sort_unstable();
                let all: Vec<_> = (0..ring.submitted).collect();
                assert_eq!(used, all, "{order:?} killed after {first} and {second} stores");
                kills += 1;
                if !second_died {
                    break;
                }
            }
            if !first_died {
                break;
            }
        }
    }
    assert!(kills > 10_000, "{kills}");
}

/// Every record of a ring of two descriptors, with fields at the edges, and every position of the ring.
#[test]
fn recovery_takes_what_is_marked_and_not_in_the_last_batch_or_refuses() {
    const USED: u16 = 1;
    let memory = memory();
    let put = |at: u64, value: u16| memory.write_obj(value, GuestAddress(at)).expect("write");
    put(VERSION, THE_VERSION);
    put(DESC_NUM, 2);
    let entries: Vec<(u8, u16, u64)> = [0, 1, 255]
        .into_iter()
        .flat_map(|mark| [0, 1, 2].map(|next| (mark, next)))
        .flat_map(|(mark, next)| [0, 1, u64::MAX].map(|counter| (mark, next, counter)))
        .collect();
    let write_entries = |both: [(u8, u16, u64); 2]| {
        for (head, (mark, next, counter)) in (0..).zip(both) {
            let at = HEADER_SIZE + ENTRY_SIZE * head;
            memory.write_obj(mark, GuestAddress(at + INFLIGHT)).expect("write");
            memory.write_obj(next, GuestAddress(at + NEXT)).expect("write");
            memory.write_obj(counter, GuestAddress(at + COUNTER)).expect("write");
        }
    };
    let (mut recovered, mut refused) = (0, 0);
    for (first, second) in
        entries.iter().flat_map(|first| entries.iter().map(move |second| (*first, *second)))
    {
        for (last, region_used, available) in positions() {
            write_entries([first, second]);
            put(LAST_BATCH_HEAD, last);
            put(USED_IDX, region_used);
            // What the last batch has: a chain from its head on, as long as the indices differ.
            let batch = USED.wrapping_sub(region_used);
            let mut done = Vec::new();
            let mut head = last;
            for _ in 0..if batch <= 2 { batch } else { 0 } {
                if head >= 2 {
                    break;
                }
                done.push(head);
                head = [first, second][usize::from(head)].1;
            }
            let mut want: Vec<(u64, u16)> = (0..2)
                .filter(|head| [first, second][usize::from(*head)].0 != 0 && !done.contains(head))
                .map(|head| ([first, second][usize::from(head)].2, head))
                .collect();
            want.sort_unstable();
            let want: Vec<u16> = want.into_iter().map(|(_, head)| head).collect();
            let room = available.wrapping_sub(USED);
            let fits = batch <= 2 && room <= 2 && want.len() <= usize::from(room);
            let mut tracker = Tracker::new(memory.clone(), GuestAddress(0), 2);
            match tracker.recover(USED, available) {
                Ok(heads) => {
                    assert!(want.is_empty() || fits);
                    assert_eq!(heads.as_ref(), Some(&want));
                    let again = Tracker::new(memory.clone(), GuestAddress(0), 2).recover(USED, available);
                    assert_eq!(again.expect("the same again"), heads);
                    recovered += 1;
                }
                Err(error) => {
                    assert!(
                        matches!(error, TrackerError::Foreign { .. }) && !want.is_empty() && !fits,
                        "{error}"
                    );
                    refused += 1;
                }
            }
        }
    }
    assert!(recovered > 1000 && refused > 1000, "{recovered} {refused}");
    let mut beyond = [1; 64];
    memory.read_slice(&mut beyond, GuestAddress(HEADER_SIZE + 2 * ENTRY_SIZE)).expect("read");
    assert_eq!(beyond, [0; 64]);
}

/// Last batch's head, used index of the record, and available index of the ring.
fn positions() -> impl Iterator<Item = (u16, u16, u16)> {
    let lasts = [0, 1, 2, u16::MAX].into_iter();
    let used = lasts.flat_map(|last| [1, 0, u16::MAX, u16::MAX - 1, 2].map(|used| (last, used)));
    used.flat_map(|(last, used)| [0, 1, 2, 3, 4].map(|available| (last, used, available)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Each request is used exactly once, wherever devices are killed, also during a recovery.
    #[test]
    fn every_request_completes_exactly_once(
        lives in proptest::collection::vec((0..60usize, proptest::collection::vec(any::<u8>(), 1..120)), 1..12)
    ) {
        let memory = memory();
        let mut ring = Ring::default();
        for (stores, steps) in &lives {
            live(&mut ring, &Mortal { memory: memory.clone(), stores_left: Rc::new(Cell::new(*stores)) }, steps)?;
        }
        // The last device is not killed, and finishes everything.
        let steps = [1, 3].repeat(64);
        live(&mut ring, &Mortal { memory, stores_left: Rc::new(Cell::new(usize::MAX)) }, &steps)?;
        let mut used = ring.used.clone();
        used.sort_unstable();
        prop_assert_eq!(used, (0..ring.submitted).collect::<Vec<_>>());
    }

    /// A front-end can write anything into the region.
    #[test]
    fn a_hostile_region_gives_distinct_heads_of_the_ring_or_an_error(
        mut bytes in proptest::collection::vec(any::<u8>(), 16 * (1 + usize::from(SIZE))),
        plausible: bool,
        used: u16,
        ahead in 0..20u16,
    ) {
        let memory = memory();
        if plausible {
            bytes[..12].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 8, 0]);
            bytes[14..16].copy_from_slice(&used.wrapping_sub(ahead).to_le_bytes());
        }
        memory.write_slice(&bytes, GuestAddress(0)).expect("write");
        let mut tracker = Tracker::new(memory.clone(), GuestAddress(0), SIZE);
        if let Ok(Some(heads)) = tracker.recover(used, used.wrapping_add(ahead)) {
            let mut distinct = heads.clone();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(distinct.len(), heads.len());
            prop_assert!(heads.len() <= usize::from(ahead) && heads.iter().all(|head| *head < SIZE));
        }
        // The front-end may change the region later, too.
        memory.write_slice(&bytes, GuestAddress(0)).expect("write");
        for head in 0..SIZE {
            tracker.begin(head).expect("begin");
            tracker.finish(head).expect("finish");
            tracker.forget().expect("forget");
        }
        let mut beyond = [1; 64];
        memory.read_slice(&mut beyond, GuestAddress(bytes.len() as u64)).expect("read");
        prop_assert_eq!(beyond, [0; 64]);
    }
}
