//! Load that is checked: whatever was acknowledged must be there, and nothing else.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use crate::block::{self, Identity};
use crate::buffer::Buffer;
use crate::random::Random;
use crate::target::Target;
use crate::watchdog::{Slot, Watchdog};

/// Requests of a thread between two that make its writes durable.
const REQUESTS_PER_SYNC: u64 = 64;
/// Faults that are described in full, in each thread.
const FAULTS_SHOWN: u64 = 8;

/// Counts of what the load wrote and verified.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) blocks_written: u64,
    pub(crate) blocks_verified: u64,
    pub(crate) bad_blocks: u64,
    pub(crate) io_errors: u64,
    pub(crate) syncs: u64,
    /// Longest time that one request took.
    pub(crate) longest_stall: Duration,
}

impl Outcome {
    pub(crate) fn is_good(&self) -> bool {
        self.bad_blocks == 0 && self.io_errors == 0
    }

    pub(crate) fn to_json(&self) -> String {
        let Self { blocks_written, blocks_verified, bad_blocks, io_errors, syncs, longest_stall } = self;
        let stall = longest_stall.as_millis();
        format!(
            r#"{{"blocks_written":{blocks_written},"blocks_verified":{blocks_verified},"bad_blocks":{bad_blocks},"io_errors":{io_errors},"syncs":{syncs},"longest_stall_ms":{stall}}}"#
        )
    }

    fn add(&mut self, other: &Self) {
        self.blocks_written += other.blocks_written;
        self.blocks_verified += other.blocks_verified;
        self.bad_blocks += other.bad_blocks;
        self.io_errors += other.io_errors;
        self.syncs += other.syncs;
        self.longest_stall = self.longest_stall.max(other.longest_stall);
    }
}

/// Writes and checks the first `blocks` blocks with `depth` threads for `time`, then checks them all.
pub(crate) fn run(
    target: &Target,
    watchdog: &Watchdog,
    blocks: u64,
    depth: u32,
    seed: u64,
    time: Duration,
) -> anyhow::Result<Outcome> {
    let threads = u64::from(depth).min(blocks);
    let start = Instant::now();
    let mut total = Outcome::default();
    thread::scope(|scope| {
        let start_one = |index| {
            let slot = watchdog.slot(usize::try_from(index).unwrap_or(0));
            let work = move || {
                let mut worker = Worker::new(target, slot, blocks, seed, index, threads);
                while start.elapsed() < time {
                    worker.step();
                }
                worker.check_all();
                worker.outcome
            };
            thread::Builder::new().spawn_scoped(scope, work)
        };
        let workers: Vec<_> = (0..threads).map(start_one).collect::<io::Result<_>>()?;
        for worker in workers {
            let outcome = worker.join().map_err(|_| anyhow::anyhow!("a thread failed: this is a bug"))?;
            total.add(&outcome);
        }
        Ok(total)
    })
}

/// Generations that a block may have; both 0 before its first write.
#[derive(Clone, Copy, Debug, Default)]
struct Written {
    /// The last one that was acknowledged.
    oldest: u64,
    /// Later only if what became of a write is not known.
    newest: u64,
}

/// A thread with blocks of its own: `index`, `index + stride`, and so on.
struct Worker<'t> {
    target: &'t Target,
    slot: &'t Slot,
    seed: u64,
    index: u64,
    stride: u64,
    written: Vec<Written>,
    random: Random,
    buffer: Buffer,
    requests: u64,
    outcome: Outcome,
}

impl<'t> Worker<'t> {
    fn new(target: &'t Target, slot: &'t Slot, blocks: u64, seed: u64, index: u64, stride: u64) -> Self {
        let own = (index..blocks).step_by(usize::try_from(stride).unwrap_or(usize::MAX));
        let written = own.map(|_| Written::default()).collect();
        let random = Random::new(seed, index);
        let buffer = Buffer::new(target.block_size());
        let outcome = Outcome::default();
        Self { target, slot, seed, index, stride, written, random, buffer, requests: 0, outcome }
    }

    /// Makes one request. Two of three are writes.
    fn step(&mut self) {
        self.requests += 1;
        let choice = self.random.below(self.written.len() as u64);
        let slot = usize::try_from(choice).unwrap_or(0);
        if self.requests.is_multiple_of(REQUESTS_PER_SYNC) {
            let sync = || self.target.sync();
            let synced = timed(&mut self.outcome, || self.slot.during("sync", self.index, sync));
            self.outcome.syncs += 1;
            self.note(synced, "sync");
        } else if self.written[slot].newest == 0 || self.random.below(3) != 0 {
            self.write(slot);
        } else {
            self.check(slot);
        }
    }

    fn check_all(&mut self) {
        for slot in 0..self.written.len() {
            if self.written[slot].newest != 0 {
                self.check(slot);
            }
        }
    }

    fn block(&self, slot: usize) -> u64 {
        self.index + slot as u64 * self.stride
    }

    fn write(&mut self, slot: usize) {
        let (block, seed) = (self.block(slot), self.seed);
        let generation = self.written[slot].newest + 1;
        block::fill(&mut self.buffer, Identity { seed, block, generation });
        self.written[slot].newest = generation;
        let write = || self.target.write(block, &self.buffer);
        let done = timed(&mut self.outcome, || self.slot.during("write", block, write));
        if self.note(done, "write") {
            self.written[slot].oldest = generation;
            self.outcome.blocks_written += 1;
        }
    }

    fn check(&mut self, slot: usize) {
        let (block, Written { oldest, newest }) = (self.block(slot), self.written[slot]);
        let read = || self.target.read(block, &mut self.buffer);
        let done = timed(&mut self.outcome, || self.slot.during("read", block, read));
        // A write that was never acknowledged may be missing.
        if !self.note(done, "read") || oldest == 0 {
            return;
        }
        self.outcome.blocks_verified += 1;
        match block::check(&self.buffer, self.seed, block, oldest, newest) {
            // A block that was read once cannot become older.
            Ok(generation) => self.written[slot].oldest = generation,
            Err(fault) => {
                self.outcome.bad_blocks += 1;
                if self.outcome.bad_blocks <= FAULTS_SHOWN {
                    eprintln!("vvu-load: block {block} is bad: {fault}");
                }
            }
        }
    }

    /// Counts a request that failed; true if it did not.
    fn note(&mut self, done: io::Result<()>, what: &str) -> bool {
        let Err(error) = done else { return true };
        self.outcome.io_errors += 1;
        if self.outcome.io_errors <= FAULTS_SHOWN {
            eprintln!("vvu-load: {what} failed: {error}");
        }
        false
    }
}

fn timed<T>(outcome: &mut Outcome, request: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = request();
    outcome.longest_stall = outcome.longest_stall.max(start.elapsed());
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    const BLOCKS: u64 = 32;

    fn target() -> (tempfile::NamedTempFile, Target) {
        let file = tempfile::NamedTempFile::new().expect("file");
        file.as_file().set_len(BLOCKS * 1024 + 100).expect("size");
        let target = Target::open(file.path(), 1024, true, false).expect("target");
        assert_eq!(target.blocks(), BLOCKS);
        (file, target)
    }

    fn load(target: &Target, blocks: u64, depth: u32, time: Duration) -> Outcome {
        let watchdog = Watchdog::new(Path::new("/dev/null"), depth);
        run(target, &watchdog, blocks, depth, 1, time).expect("run")
    }

    fn worker(target: &Target, seed: u64) -> Worker<'_> {
        Worker::new(target, Box::leak(Box::default()), BLOCKS, seed, 0, 1)
    }

    fn worked(target: &Target, steps: usize) -> Worker<'_> {
        let mut worker = worker(target, 1);
        (0..steps).for_each(|_| worker.step());
        worker
    }

    #[test]
    fn a_good_disk_passes_and_all_threads_take_part() {
        let (_file, target) = target();
        let mut outcome = load(&target, BLOCKS, 4, Duration::from_millis(20));
        assert!(
            outcome.is_good() && outcome.blocks_written > 0 && outcome.blocks_verified > 0,
            "{outcome:?}"
        );
        outcome.longest_stall = Duration::from_millis(7);
        let json = outcome.to_json();
        assert!(
            json.starts_with(r#"{"blocks_written":"#) && json.ends_with(r#""longest_stall_ms":7}"#),
            "{json}"
        );
    }

    #[test]
    fn more_threads_than_blocks_are_not_needed() {
        let (_file, target) = target();
        assert!(load(&target, 2, 64, Duration::ZERO).is_good());
    }

    #[test]
    fn the_same_seed_gives_the_same_disk() {
        let content = |seed| {
            let (file, target) = target();
            let mut worker = worker(&target, seed);
            (0..500).for_each(|_| worker.step());
            worker.check_all();
            assert!(worker.outcome.is_good() && worker.outcome.syncs == 7, "{:?}", worker.outcome);
            std::fs::read(file.path()).expect("content")
        };
        assert_eq!(content(1), content(1));
        assert_ne!(content(1), content(2));
    }

    #[test]
    fn corruption_is_found() {
        type Damage = fn(&std::fs::File, u64);
        let damage: [(&str, Damage); 4] = [
            ("a flipped bit", |file, at| {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at + 700).expect("read");
                file.write_all_at(&[byte[0] ^ 1], at + 700).expect("write");
            }),
            ("a lost block", |file, at| file.write_all_at(&[0; 1024], at).expect("write")),
            ("half a block", |file, at| file.write_all_at(&[0; 512], at + 512).expect("write")),
            ("another block", |file, at| {
                let mut other = [0; 1024];
                file.read_exact_at(&mut other, (at + 1024) % (BLOCKS * 1024)).expect("read");
                file.write_all_at(&other, at).expect("write");
            }),
        ];
        for (name, damage) in damage {
            let (file, target) = target();
            let mut worker = worked(&target, 1000);
            assert!(worker.written.iter().all(|written| written.newest != 0), "all were written");
            damage(file.as_file(), 5 * 1024);
            worker.check_all();
            assert_eq!(worker.outcome.bad_blocks, 1, "{name}");
            assert!(!worker.outcome.is_good());
        }
    }

    #[test]
    fn an_acknowledged_write_that_is_gone_is_found() {
        let (_file, target) = target();
        let mut worker = worked(&target, 0);
        worker.write(3);
        let mut old = vec![0; 1024];
        target.read(3, &mut old).expect("read");
        worker.write(3);
        target.write(3, &old).expect("undo");
        worker.check(3);
        assert_eq!(worker.outcome.bad_blocks, 1);
    }

    #[test]
    fn a_write_that_failed_may_or_may_not_be_there_but_not_come_and_go() {
        let (_file, target) = target();
        let mut worker = worked(&target, 0);
        let identity = |generation| Identity { seed: 1, block: 3, generation };
        let mut data = vec![0; 1024];
        worker.write(3);
        worker.written[3].newest = 2;
        worker.check(3);
        block::fill(&mut data, identity(2));
        target.write(3, &data).expect("late");
        worker.check(3);
        assert_eq!(worker.outcome.bad_blocks, 0);
        block::fill(&mut data, identity(1));
        target.write(3, &data).expect("undo");
        worker.check(3);
        assert_eq!(worker.outcome.bad_blocks, 1);
    }

    #[test]
    fn failing_requests_are_counted() {
        let (file, _) = target();
        let read_only = Target::open(file.path(), 1024, false, false).expect("target");
        let mut worker = worker(&read_only, 1);
        worker.write(0);
        file.as_file().set_len(0).expect("truncate");
        worker.check(0);
        assert_eq!((worker.outcome.io_errors, worker.outcome.blocks_written), (2, 0));
        assert!(!worker.outcome.is_good());
    }
}
