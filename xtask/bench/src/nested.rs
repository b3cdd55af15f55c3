//! Measures the same VMs with KVM, in an outer VM whose CPU is emulated.

use std::time::{Duration, Instant};

use anyhow::Result;
use vvu_artifacts::image::OverlayEntry;
use vvu_process::progress::Progress;
use vvu_testvm::memory::ensure_free;
use vvu_testvm::outer::{NestedSetup, Outer, outside, proven};
use vvu_testvm::{Lab, Needs, RunDir, Setup};

use super::back_end::STORAGE_DAEMON;
use super::options::Options;
use super::results::Results;
use super::vms::{DISK_MIB, MEMORY_MIB};

/// How long a variant may take to start, in addition to its tests.
const START_LIMIT: Duration = Duration::from_secs(180);
/// More than the number of variants.
const VARIANTS: u32 = 5;
/// More than the number of tests of each variant.
const TESTS: u32 = 6;

/// Measures in an outer VM and adds its results to `results`.
///
/// # Errors
///
/// Fails if the outer VM does, if the run inside prints no results, or if it did not use a proven KVM.
pub(super) fn measure(
    options: &Options,
    run: &RunDir,
    progress: &Progress,
    results: &mut Results,
) -> Result<()> {
    // One variant runs at a time; its disks are files of the outer VM and of the device VM.
    let memory_mib = Outer::memory_mib(2 * MEMORY_MIB, 2 * DISK_MIB);
    ensure_free(memory_mib, 1)?;
    let begun = Instant::now();
    let setup = Setup::obtain(&outside(&options.setup), &Needs::programs([STORAGE_DAEMON]), progress)?;
    let nested = NestedSetup::obtain(&options.setup, progress)?;
    let lab = Lab::new(run, &setup)?;
    let extra = setup.programs.values().cloned().map(OverlayEntry::Tree).collect();
    let (vm, mut outer) = Outer::start(&lab, &[], &nested, extra, memory_mib, progress)?;

    let stage = progress.stage("nested run");
    let (rounds, seconds) = (options.rounds, options.seconds);
    stage.update(format!("{rounds} rounds with KVM inside"));
    let limit = (START_LIMIT + Duration::from_secs(seconds) * TESTS) * VARIANTS * rounds;
    let mut words = format!("bench vms --rounds {rounds} --seconds {seconds}");
    words.extend(options.only.iter().map(|name| format!(" --only {name}")));
    words.extend(options.poll_us.map(|poll| format!(" --poll-us {poll}")));
    let inner = vm.json::<Results>(&words, limit);
    let fetched = vm.fetch_logs();
    let inner = inner?;
    let used = inner.accelerator.unwrap_or_default();
    stage.done(format!("{}: {}", used.used, used.reason));
    fetched?;
    vm.end(progress)??;
    proven(&used)?;

    outer.stages = progress.stages();
    outer.seconds = begun.elapsed().as_secs_f64();
    results.outer = Some(outer);
    results.accelerator = Some(used);
    results.qemu = inner.qemu;
    results.kernel = inner.kernel;
    results.setup_stages = progress.stages();
    results.results.extend(inner.results);
    results.skipped.extend(inner.skipped);
    Ok(())
}
