//! The same VMs with KVM, in an outer VM whose CPU is emulated.

use std::time::{Duration, Instant};

use anyhow::Result;

use vvu_artifacts::image::OverlayEntry;
use vvu_process::progress::Progress;
use vvu_testvm::memory::ensure_free;
use vvu_testvm::outer::{NestedSetup, Outer, outside, proven};
use vvu_testvm::rundir::RunDir;
use vvu_testvm::setup::{Needs, Setup};

use super::Options;
use super::results::Bench;
use super::vms::{DISK_MIB, MEMORY_MIB, STORAGE_DAEMON};

/// How long a variant may take to start, beside its tests.
const START_LIMIT: Duration = Duration::from_secs(180);
/// More than there are variants, and tests of each.
const VARIANTS: u32 = 5;
const TESTS: u32 = 6;

/// Measures in an outer VM and takes over what came of it.
pub(super) fn measure(options: &Options, run: &RunDir, progress: &Progress, bench: &mut Bench) -> Result<()> {
    // The VMs of one variant, whose disks are on the outer VM's host side and in the device VM.
    let memory_mib = Outer::memory_mib(2 * MEMORY_MIB, 2 * DISK_MIB);
    ensure_free(memory_mib, 1)?;
    let begun = Instant::now();
    let setup = Setup::obtain(&outside(&options.setup), &Needs::programs([STORAGE_DAEMON]), progress)?;
    let nested = NestedSetup::obtain(&options.setup, progress)?;
    let extra = setup.programs.values().cloned().map(OverlayEntry::Tree).collect();
    let (mut vm, mut outer) = Outer::start(&setup, &[], &nested, extra, memory_mib, run, progress)?;

    let stage = progress.stage("nested run");
    let (rounds, seconds) = (options.rounds, options.seconds);
    stage.update(format!("{rounds} rounds with KVM inside"));
    let limit = (START_LIMIT + Duration::from_secs(seconds) * TESTS) * VARIANTS * rounds;
    let mut words = format!("bench vms --rounds {rounds} --seconds {seconds}");
    words.extend(options.only.iter().map(|name| format!(" --only {name}")));
    words.extend(options.poll_us.map(|poll| format!(" --poll-us {poll}")));
    let inner = vm.json::<Bench>(&words, limit);
    let fetched = vm.fetch_logs(run);
    let inner = inner?;
    let used = inner.accelerator.unwrap_or_default();
    stage.done(format!("{}: {}", used.used, used.reason));
    fetched?;
    vm.end(run, progress)??;
    proven(&used)?;

    outer.stages = progress.stages();
    outer.seconds = begun.elapsed().as_secs_f64();
    bench.outer = Some(outer);
    bench.accelerator = Some(used);
    bench.qemu = inner.qemu;
    bench.kernel = inner.kernel;
    bench.setup_stages = progress.stages();
    bench.results.extend(inner.results);
    bench.skipped.extend(inner.skipped);
    Ok(())
}
