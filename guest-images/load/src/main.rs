//! I/O load for a disk: writes that are verified while faults are injected, or measured speed.
//!
//! Depth comes from threads, each with one request in flight. The last line on standard output is one
//! JSON object; anything else goes to standard error: requests that failed, and those that take
//! longer than 5 s.

mod block;
mod buffer;
mod measure;
mod random;
mod target;
mod verify;
mod watchdog;

use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use measure::Pattern;
use target::Target;
use watchdog::Watchdog;

/// I/O load for a disk.
#[derive(Debug, clap::Parser)]
enum Command {
    /// Write blocks that say what they are, read them back and check them. Overwrites the file.
    /// Exit code 1 if a block was bad or a request failed.
    Verify(VerifyArgs),
    /// Measure how fast a pattern of requests is served. Write patterns overwrite the file.
    Measure(MeasureArgs),
}

#[derive(Debug, clap::Args)]
struct Common {
    /// Block device or file.
    #[arg(long, value_name = "PATH")]
    file: PathBuf,
    /// Duration of the run in seconds.
    #[arg(long, value_name = "N")]
    seconds: u64,
    /// Requests in flight.
    #[arg(long, value_name = "N", default_value = "1")]
    depth: NonZeroU32,
    /// Bytes of a request, a multiple of 512.
    #[arg(long, value_name = "BYTES", default_value = "4096", value_parser = block_size)]
    block: usize,
    /// Start of the sequence of random numbers.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Go through the page cache, for file systems without O_DIRECT.
    #[arg(long)]
    buffered: bool,
}

#[derive(Debug, clap::Args)]
struct VerifyArgs {
    #[command(flatten)]
    common: Common,
    /// Use the first so many blocks only.
    #[arg(long, value_name = "N")]
    blocks: Option<NonZeroU64>,
}

#[derive(Debug, clap::Args)]
struct MeasureArgs {
    #[command(flatten)]
    common: Common,
    /// Which requests.
    #[arg(long)]
    pattern: Pattern,
}

fn block_size(text: &str) -> Result<usize, String> {
    const MOST: usize = 16 << 20;
    let size: usize = text.parse().map_err(|error| format!("{error}"))?;
    let fits = (512..=MOST).contains(&size) && size.is_multiple_of(512);
    if fits { Ok(size) } else { Err(format!("want a multiple of 512 from 512 to {MOST}")) }
}

impl Common {
    fn open(&self, writable: bool) -> anyhow::Result<Target> {
        Target::open(&self.file, self.block, writable, !self.buffered)
    }

    fn watchdog(&self) -> Watchdog {
        Watchdog::new(&self.file, self.depth.get())
    }

    fn time(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }
}

fn run() -> anyhow::Result<ExitCode> {
    match Command::parse() {
        Command::Verify(VerifyArgs { common, blocks }) => {
            let target = common.open(true)?;
            let blocks = target.blocks().min(blocks.map_or(u64::MAX, NonZeroU64::get));
            let (watchdog, depth) = (common.watchdog(), common.depth.get());
            let load = || verify::run(&target, &watchdog, blocks, depth, common.seed, common.time());
            let outcome = watchdog.watch(load)?;
            println!("{}", outcome.to_json());
            Ok(if outcome.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Measure(MeasureArgs { common, pattern }) => {
            let target = common.open(pattern.writes())?;
            let (watchdog, depth) = (common.watchdog(), common.depth.get());
            let load = || measure::run(&target, &watchdog, pattern, depth, common.seed, common.time());
            let outcome = watchdog.watch(load)?;
            println!("{}", outcome.to_json());
            Ok(if outcome.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("vvu-load: {error:#}");
        ExitCode::from(2)
    })
}
