//! Measures how fast requests are served.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::buffer::Buffer;
use crate::random::Random;
use crate::target::Target;
use crate::watchdog::{Slot, Watchdog};

/// Which requests are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Pattern {
    /// Reads anywhere.
    #[value(name = "randread")]
    RandomRead,
    /// Writes anywhere.
    #[value(name = "randwrite")]
    RandomWrite,
    /// Reads one after the other, again from the start at the end.
    Read,
}

impl Pattern {
    pub(crate) fn writes(self) -> bool {
        self == Self::RandomWrite
    }
}

/// Counts of times, to within a 32nd of each.
#[derive(Clone, Debug)]
struct Histogram {
    counts: Vec<u64>,
}

/// Steps for each power of two.
const STEPS: u32 = 32;

impl Histogram {
    fn new() -> Self {
        Self { counts: vec![0; 64 * STEPS as usize] }
    }

    fn add(&mut self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.counts[Self::bucket(nanoseconds)] += 1;
    }

    fn bucket(value: u64) -> usize {
        let shift = value.max(1).ilog2().saturating_sub(STEPS.ilog2());
        let within = usize::try_from(value >> shift).unwrap_or(0);
        shift as usize * STEPS as usize + within
    }

    /// The largest value of a bucket.
    fn value(bucket: usize) -> u64 {
        let steps = STEPS as usize;
        let shift = (bucket / steps).saturating_sub(1);
        let within = (bucket - shift * steps) as u64;
        (((u128::from(within) + 1) << shift) - 1).try_into().unwrap_or(u64::MAX)
    }

    fn merge(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(count, more)| *count += more);
    }

    fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// A time that so many percent of all do not exceed.
    fn percentile(&self, percent: u64) -> Duration {
        let wanted = (self.total() * percent).div_ceil(100).max(1);
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        Duration::from_nanos(bucket.map_or(0, Self::value))
    }
}

/// The measurement.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    times: Histogram,
    elapsed: Duration,
    block: usize,
    io_errors: u64,
}

impl Outcome {
    pub(crate) fn is_good(&self) -> bool {
        self.io_errors == 0
    }

    pub(crate) fn to_json(&self) -> String {
        let requests = self.times.total();
        // Exact enough: nobody makes 2^53 requests.
        let iops = requests as f64 / self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
        let megabytes = iops * self.block as f64 / 1e6;
        let microseconds = |percent| self.times.percentile(percent).as_secs_f64() * 1e6;
        let (p50, p99, errors) = (microseconds(50), microseconds(99), self.io_errors);
        format!(
            r#"{{"requests":{requests},"iops":{iops:.1},"mb_per_s":{megabytes:.2},"latency_p50_us":{p50:.1},"latency_p99_us":{p99:.1},"io_errors":{errors}}}"#
        )
    }
}

/// Makes requests with `depth` threads for `time`.
pub(crate) fn run(
    target: &Target,
    watchdog: &Watchdog,
    pattern: Pattern,
    depth: u32,
    seed: u64,
    time: Duration,
) -> anyhow::Result<Outcome> {
    let position = AtomicU64::new(0);
    let start = Instant::now();
    thread::scope(|scope| {
        let start_one = |index: u32| {
            let (position, slot) = (&position, watchdog.slot(index as usize));
            let random = Random::new(seed, index.into());
            let work = move || work(target, slot, pattern, random, position, start, time);
            thread::Builder::new().spawn_scoped(scope, work)
        };
        let workers: Vec<_> = (0..depth).map(start_one).collect::<io::Result<_>>()?;
        let (mut times, mut io_errors) = (Histogram::new(), 0);
        for worker in workers {
            let (own, errors) =
                worker.join().map_err(|_| anyhow::anyhow!("a thread failed: this is a bug"))?;
            times.merge(&own);
            io_errors += errors;
        }
        Ok(Outcome { times, elapsed: start.elapsed(), block: target.block_size(), io_errors })
    })
}

fn work(
    target: &Target,
    slot: &Slot,
    pattern: Pattern,
    mut random: Random,
    position: &AtomicU64,
    start: Instant,
    time: Duration,
) -> (Histogram, u64) {
    let (mut times, mut io_errors) = (Histogram::new(), 0);
    let mut buffer = Buffer::new(target.block_size());
    let mut begun = Instant::now();
    // At least one request, however late the thread starts.
    loop {
        let block = match pattern {
            Pattern::RandomRead | Pattern::RandomWrite => random.below(target.blocks()),
            Pattern::Read => position.fetch_add(1, Ordering::Relaxed) % target.blocks(),
        };
        let done = match pattern {
            Pattern::RandomWrite => slot.during("write", block, || target.write(block, &buffer)),
            Pattern::RandomRead | Pattern::Read => {
                slot.during("read", block, || target.read(block, &mut buffer))
            }
        };
        let now = Instant::now();
        match done {
            Ok(()) => times.add(now - begun),
            Err(error) => {
                if io_errors == 0 {
                    eprintln!("vvu-load: request failed: {error}");
                }
                io_errors += 1;
            }
        }
        begun = now;
        if begun - start >= time {
            return (times, io_errors);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_kept_to_within_a_32nd() {
        for value in [0, 1, 31, 32, 33, 63, 64, 1000, 123_456_789, u64::MAX / 3, u64::MAX] {
            let kept = Histogram::value(Histogram::bucket(value));
            assert!(kept >= value && kept - value <= value / 32, "{value} is kept as {kept}");
        }
    }

    #[test]
    fn percentiles_split_the_times() {
        let mut times = Histogram::new();
        (1..=100).for_each(|count| times.add(Duration::from_nanos(count)));
        let percentile = |percent| times.percentile(percent).as_nanos();
        assert!((50..=52).contains(&percentile(50)) && (99..=103).contains(&percentile(99)));
        assert_eq!(Histogram::new().percentile(50), Duration::ZERO);
    }

    #[test]
    fn every_pattern_runs_and_reports() {
        let file = tempfile::NamedTempFile::new().expect("file");
        file.as_file().set_len(16 * 4096).expect("size");
        for pattern in [Pattern::RandomRead, Pattern::RandomWrite, Pattern::Read] {
            let target = Target::open(file.path(), 4096, pattern.writes(), false).expect("target");
            let watchdog = Watchdog::new(file.path(), 2);
            let outcome = run(&target, &watchdog, pattern, 2, 1, Duration::from_millis(5)).expect("run");
            assert!(outcome.is_good() && outcome.times.total() > 0, "{pattern:?}");
            let json = outcome.to_json();
            for key in ["iops", "mb_per_s", "latency_p50_us", "latency_p99_us"] {
                assert!(json.contains(&format!("\"{key}\":")), "{json}");
            }
        }
    }
}
