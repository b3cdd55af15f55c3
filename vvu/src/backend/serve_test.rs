//! Requests that end in any order, of back-ends that are killed at any time.

use std::sync::Mutex;
use std::time::Duration;

use proptest::prelude::*;
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::backend::inflight::{self, Limits, Region};
use crate::backend::queue::Taken;

const SIZE: u16 = 8;
const LIMITS: Limits = Limits { queues: 1, queue_size: SIZE };
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Most requests in flight: fewer than the ring has.
const ROOM: usize = 5;

/// What an engine has begun, in order, and which of that it is to finish when it is asked next.
#[derive(Debug, Default)]
struct Script {
    in_flight: Vec<Finished>,
    finishing: Vec<u8>,
}

/// Finishes what it has begun when a test says so, or when it is waited for.
#[derive(Clone, Debug, Default)]
struct Scripted(Arc<Mutex<Script>>);

impl Engine for Scripted {
    fn begin(
        &mut self,
        _memory: &Arc<GuestMemoryMmap>,
        Taken { head, .. }: Taken,
        _announce: &mut dyn FnMut(),
    ) -> Option<Finished> {
        self.0.lock().expect("script").in_flight.push(Finished { head, written: head.into(), size: 0 });
        None
    }

    fn has_room(&self) -> bool {
        self.in_flight() < ROOM
    }

    fn in_flight(&self) -> usize {
        self.0.lock().expect("script").in_flight.len()
    }

    fn next_finished(&mut self) -> Option<Finished> {
        let script = &mut *self.0.lock().expect("script");
        if script.in_flight.is_empty() {
            return None;
        }
        let which = usize::from(script.finishing.pop()?) % script.in_flight.len();
        Some(script.in_flight.swap_remove(which))
    }

    fn wait(&mut self) {
        self.0.lock().expect("script").finishing.push(1);
    }
}

/// A driver whose requests are numbered by the descriptor that is each one's head.
struct Driver {
    memory: Arc<GuestMemoryMmap>,
    region: Arc<Region>,
    available: u16,
    used: u16,
    free: Vec<u16>,
    offered: Vec<u16>,
}

impl Driver {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).expect("memory");
        let asked = VhostUserInflight { num_queues: 1, queue_size: SIZE, ..Default::default() };
        let (made, file) = inflight::create(&asked, LIMITS).expect("region");
        let region = Arc::new(Region::open(&made, file, LIMITS, None).expect("region"));
        let (free, offered) = ((0..SIZE).collect(), Vec::new());
        Self { memory: Arc::new(memory), region, available: 0, used: 0, free, offered }
    }

    /// A back-end that takes the queue over.
    fn back_end(&self) -> (Service, Scripted) {
        let mut queue = Queue::new(0, Duration::ZERO);
        queue.ring.size = SIZE;
        (queue.ring.available, queue.ring.used) = (GuestAddress(AVAILABLE), GuestAddress(USED));
        queue.memory = Arc::clone(&self.memory);
        queue.region = Some(Arc::clone(&self.region));
        queue.enabled = true;
        queue.start();
        let engine = Scripted::default();
        (Service::new(queue, Box::new(engine.clone())), engine)
    }

    /// Makes a request available if there is a descriptor for it.
    fn offer(&mut self) {
        if self.free.is_empty() {
            return;
        }
        let head = self.free.remove(0);
        let entry = AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.memory.write_obj(head, GuestAddress(entry)).expect("ring");
        self.available = self.available.wrapping_add(1);
        self.memory.write_obj(self.available, GuestAddress(AVAILABLE + 2)).expect("ring");
        self.offered.push(head);
    }

    /// Takes back what the device has used.
    fn take_back(&mut self) -> Result<(), TestCaseError> {
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).expect("ring");
        while self.used != used {
            let entry = USED + 4 + 8 * u64::from(self.used % SIZE);
            let [head, written]: [u32; 2] = self.memory.read_obj(GuestAddress(entry)).expect("ring");
            let position = self.offered.iter().position(|offered| u32::from(*offered) == head);
            prop_assert!(position.is_some(), "{head} comes back although it was not offered");
            prop_assert_eq!(head, written, "the length of another request");
            self.free.push(self.offered.remove(position.expect("some")));
            self.used = self.used.wrapping_add(1);
        }
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Step {
    Offer,
    /// The back-end is woken, and these requests have ended meanwhile.
    Serve(Vec<u8>),
    /// As before the front-end changes the queue.
    Drain,
    Kill,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Offer),
        4 => prop::collection::vec(any::<u8>(), 0..4).prop_map(Step::Serve),
        1 => Just(Step::Drain),
        1 => Just(Step::Kill),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Each request comes back once, with its own length, whatever ends first and whenever the back-end is killed.
    #[test]
    fn every_request_comes_back_once(steps in prop::collection::vec(step(), 1..80)) {
        let interrupt = AtomicBool::new(false);
        let mut driver = Driver::new();
        let (mut service, mut engine) = driver.back_end();
        for step in steps {
            match step {
                Step::Offer => driver.offer(),
                Step::Serve(finishing) => {
                    engine.0.lock().expect("script").finishing = finishing;
                    service.serve(&interrupt);
                    prop_assert!(engine.in_flight() <= ROOM);
                    prop_assert!(service.queue.is_running(), "the queue was broken");
                }
                Step::Drain => {
                    service.drain();
                    prop_assert_eq!(engine.in_flight(), 0);
                }
                Step::Kill => (service, engine) = driver.back_end(),
            }
            driver.take_back()?;
        }
        // The last one finishes everything.
        for _ in 0..2 {
            service.serve(&interrupt);
            service.drain();
        }
        driver.take_back()?;
        prop_assert!(driver.offered.is_empty(), "{:?} never came back", driver.offered);
    }
}
