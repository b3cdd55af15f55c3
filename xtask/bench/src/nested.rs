//! Measures the same VMs with KVM, in an outer VM whose CPU is emulated.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vvu_artifacts::image::OverlayEntry;
use vvu_process::interrupt;
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
const VARIANTS: u32 = 6;
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
    let extra = || setup.programs.values().cloned().map(OverlayEntry::Tree).collect();
    let start = || Outer::start(&lab, &[], &nested, extra(), memory_mib, progress);
    let mut running = None;
    let mut failures = 0;
    let mut round = 1;
    while round <= options.rounds {
        let (vm, outer) = match running.take() {
            Some(running) => running,
            None => start()?,
        };
        let stage = progress.stage(format!("nested round {round}"));
        match measure_round(&vm, options, round) {
            Ok(inner) => {
                let used = inner.accelerator.clone().unwrap_or_default();
                stage.done(format!("{}: {}", used.used, used.reason));
                proven(&used)?;
                results.add_round(round, &inner);
                results.skipped.extend(inner.skipped);
                results.accelerator = Some(used);
                (results.qemu, results.kernel) = (inner.qemu, inner.kernel);
                results.write(run)?;
                round += 1;
                running = Some((vm, outer));
            }
            // The emulated CPU resets the outer VM now and then, and all that is in it is lost: that costs one round.
            Err(error) if failures < options.rounds && !interrupt::requested() => {
                failures += 1;
                results.skip(&format!("attempt {failures} at round {round}"), format!("{error:#}"));
                stage.done("lost, once more in a new outer VM");
            }
            Err(error) => return Err(error),
        }
    }
    let (vm, mut outer) = running.context("want at least one round")?;
    vm.fetch_logs()?;
    vm.end(progress)??;

    outer.stages = progress.stages();
    outer.seconds = begun.elapsed().as_secs_f64();
    results.outer = Some(outer);
    results.setup_stages = progress.stages();
    Ok(())
}

/// Measures one round in the outer VM.
fn measure_round(vm: &Outer<'_>, options: &Options, round: u32) -> Result<Results> {
    let seconds = options.seconds;
    let limit = (START_LIMIT + Duration::from_secs(seconds) * TESTS) * VARIANTS;
    let mut words = format!("bench vms --rounds 1 --first-round {round} --seconds {seconds}");
    words.extend(options.only.iter().map(|name| format!(" --only {name}")));
    words.extend(options.poll_us.map(|poll| format!(" --poll-us {poll}")));
    vm.json(&words, limit)
}
