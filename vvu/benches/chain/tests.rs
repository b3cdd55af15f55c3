//! The tests that are measured.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_T_IN;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vvu::backend::block::EngineKind;

use crate::common::{Backend, DEADLINE, Driver, Setup, pattern, wait};
use crate::echo::Echo;
use crate::latencies::{Latencies, Outcome};
use crate::links::{Link, Via};
use crate::wake_ups;

/// Bytes of the disk.
const DISK: usize = 4 << 20;
/// Bytes of a request.
const BLOCK: u32 = 4096;
/// Most requests in flight: each takes three of the queue's 128 descriptors.
const DEPTH_MAX: usize = 42;

/// A test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Test {
    /// A kick that is answered by a call at once.
    Notify,
    /// A vhost-user message and its reply.
    Message,
    /// 4 KiB reads, one at a time.
    ReadDepth1,
    /// 4 KiB reads, 32 at a time.
    ReadDepth32,
}

/// How the block back-end carries out requests.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    pub name: &'static str,
    engine: EngineKind,
    direct: bool,
}

impl Way {
    pub const ALL: [Self; 4] = [
        Self { name: "sync", engine: EngineKind::Sync, direct: false },
        Self { name: "io-uring", engine: EngineKind::IoUring, direct: false },
        Self { name: "sync-direct", engine: EngineKind::Sync, direct: true },
        Self { name: "io-uring-direct", engine: EngineKind::IoUring, direct: true },
    ];
    /// That of a back-end which is told nothing.
    pub const DEFAULT: Self = Self::ALL[0];
}

/// When a test ends.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    Time(Duration),
    Operations(u64),
}

/// A test while it runs.
struct Course {
    limit: Limit,
    start: Instant,
    wake_ups: BTreeMap<String, u64>,
    operations: u64,
}

impl Course {
    fn start(limit: Limit) -> Self {
        Self { limit, wake_ups: wake_ups::count(), start: Instant::now(), operations: 0 }
    }

    /// Counts another operation and returns true, or returns false at the limit.
    fn next(&mut self) -> bool {
        let due = match self.limit {
            Limit::Time(limit) => self.start.elapsed() < limit,
            Limit::Operations(count) => self.operations < count,
        };
        self.operations += u64::from(due);
        due
    }

    fn end(self, latencies: BTreeMap<&'static str, Latencies>) -> Outcome {
        let elapsed = self.start.elapsed();
        let wake_ups = wake_ups::since(&self.wake_ups);
        Outcome { operations: self.operations, elapsed, latencies, wake_ups }
    }
}

impl Test {
    pub const ALL: [Self; 4] = [Self::Notify, Self::Message, Self::ReadDepth1, Self::ReadDepth32];

    pub fn name(self) -> &'static str {
        match self {
            Self::Notify => "notify",
            Self::Message => "message",
            Self::ReadDepth1 => "read-depth1",
            Self::ReadDepth32 => "read-depth32",
        }
    }

    /// Runs the test over a new link, with a back-end that carries out requests in `way` and whose poll window is `poll`.
    pub fn run(self, via: Via, way: Way, limit: Limit, poll: Duration) -> Outcome {
        if self == Self::Notify {
            let echo = Echo::start();
            let mut link = Link::new(via, &echo.socket, Setup::default());
            let outcome = notify(&mut link.driver, &echo, limit);
            link.end();
            echo.end();
            return outcome;
        }
        let backend = Backend::start(&pattern(1, DISK), |options| {
            (options.engine, options.direct, options.poll) = (Some(way.engine), way.direct, poll);
        });
        let mut link = Link::new(via, &backend.socket, Setup::default());
        let outcome = match self {
            Self::Notify | Self::Message => message(&mut link.driver, limit),
            Self::ReadDepth1 => read(&mut link.driver, 1, limit),
            Self::ReadDepth32 => read(&mut link.driver, 32, limit),
        };
        link.end();
        backend.end();
        outcome
    }
}

/// Waits for calls with one system call each.
struct Calls {
    poll: Epoll,
}

impl Calls {
    fn new(call: &EventFd) -> Self {
        let poll = Epoll::new().expect("epoll");
        let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        poll.ctl(ControlOperation::Add, call.as_raw_fd(), interest).expect("epoll");
        // Takes the call that the back-end makes when the queue is started.
        let _ = wait(&poll, Duration::from_millis(1));
        Self { poll }
    }

    fn wait(&self) {
        assert!(wait(&self.poll, DEADLINE), "want a call, got none within {DEADLINE:?}");
    }
}

fn notify(driver: &mut Driver, echo: &Echo, limit: Limit) -> Outcome {
    let ring = &driver.rings[0];
    let calls = Calls::new(&ring.call);
    // The answer shows that the kicks of the start have been handled.
    ring.kick();
    calls.wait();
    let (mut kick, mut call, mut both) = (Latencies::default(), Latencies::default(), Latencies::default());
    let mut course = Course::start(limit);
    while course.next() {
        let sent = Instant::now();
        ring.kick();
        calls.wait();
        let done = Instant::now();
        kick.add(echo.stamps.kicked().saturating_duration_since(sent));
        call.add(done.saturating_duration_since(echo.stamps.called()));
        both.add(done - sent);
    }
    course.end(BTreeMap::from([("kick", kick), ("call", call), ("round_trip", both)]))
}

fn message(driver: &mut Driver, limit: Limit) -> Outcome {
    let mut times = Latencies::default();
    let mut course = Course::start(limit);
    while course.next() {
        let sent = Instant::now();
        driver.frontend.get_features().expect("features");
        times.add(sent.elapsed());
    }
    course.end(BTreeMap::from([("round_trip", times)]))
}

/// Reads blocks in random order, `depth` at a time.
fn read(driver: &mut Driver, depth: usize, limit: Limit) -> Outcome {
    assert!(depth <= DEPTH_MAX, "no room for {depth} requests");
    let calls = Calls::new(&driver.rings[0].call);
    let buffers = Driver::buffers(&driver.memory, 1);
    let mut sectors = Sectors(1);
    // By the first descriptor of the request.
    let mut sent = [Instant::now(); 128];
    let mut times = Latencies::default();
    let mut course = Course::start(limit);
    let mut in_flight = 0;
    while in_flight < depth && course.next() {
        let buffer = buffers + in_flight as u64 * u64::from(BLOCK);
        let head = driver.prepare(0, VIRTIO_BLK_T_IN, sectors.next(), &[(buffer, BLOCK)]);
        sent[usize::from(head)] = Instant::now();
        in_flight += 1;
    }
    driver.rings[0].kick();
    while in_flight > 0 {
        let before = driver.rings[0].next_avail();
        while let Some((head, used)) = driver.rings[0].pop(&driver.memory) {
            let header = Driver::header(&driver.memory, 0, head);
            let status = driver.memory.read(header + 16, 1)[0];
            assert_eq!((status, used), (0, BLOCK + 1), "a read");
            times.add(sent[usize::from(head)].elapsed());
            in_flight -= 1;
            if course.next() {
                // The chain is reused with another sector.
                driver.memory.write(header + 8, &sectors.next().to_le_bytes());
                driver.rings[0].push(&driver.memory, head);
                sent[usize::from(head)] = Instant::now();
                in_flight += 1;
            }
        }
        if driver.rings[0].wants_kick(&driver.memory, before) {
            driver.rings[0].kick();
        }
        if in_flight > 0 && driver.rings[0].is_idle(&driver.memory) {
            calls.wait();
        }
    }
    course.end(BTreeMap::from([("round_trip", times)]))
}

/// First sectors of blocks of the disk, in random order.
struct Sectors(u64);

impl Sectors {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let blocks = DISK as u64 / u64::from(BLOCK);
        self.0 % blocks * (u64::from(BLOCK) / 512)
    }
}
