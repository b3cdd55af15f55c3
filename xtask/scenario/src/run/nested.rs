//! `cargo xtask e2e SCENARIO --nested`: the KVM path, on a machine without KVM.
//!
//! In an [outer VM](vvu_testvm::outer) this same program runs the scenario with KVM. Its report is the report.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{Options, checked, finish};
use crate::format::Scenario;
use crate::report::Report;
use vvu_artifacts::image::OverlayEntry;
use vvu_process::children;
use vvu_process::progress::Progress;
use vvu_testvm::facts::Outcome;
use vvu_testvm::memory;
use vvu_testvm::outer::{NestedSetup, Outer, outside, proven};
use vvu_testvm::rundir::RunDir;
use vvu_testvm::rundir::runs;
use vvu_testvm::setup::Setup;

/// Where the scenario is in the outer VM.
const SCENARIO: &str = "/prepared/scenario.json";
/// How long the run inside may take.
const RUN_LIMIT: Duration = Duration::from_secs(900);

/// Runs scenarios, one after the other, each in an outer VM of its own. `file` tells where a scenario comes from.
///
/// # Errors
///
/// A scenario cannot be run that way, or the host has too little memory.
pub(super) fn run_all(
    scenarios: &[Scenario],
    file: impl Fn(&Scenario) -> PathBuf,
    options: &Options,
    progress: &Progress,
) -> Result<Vec<Report>> {
    for scenario in scenarios {
        let vms = scenario.vms.values().filter_map(|vm| vm.overlay.as_ref());
        let files: Vec<_> =
            scenario.disks.values().filter_map(|disk| disk.file.as_ref()).chain(vms).collect();
        ensure!(
            files.is_empty(),
            "{}: --nested takes no scenario that names files: {files:?}",
            scenario.name
        );
        let named = scenario.vms.values().filter_map(|vm| vm.vmm.as_ref()).chain(&scenario.kernel_source);
        let named: Vec<_> = named.collect();
        ensure!(
            named.is_empty(),
            "{}: --nested takes no scenario that names QEMUs or a kernel's source: {named:?}",
            scenario.name
        );
        memory::ensure_free(outer_memory_mib(scenario), 1)?;
    }
    let mut reports = Vec::new();
    for scenario in scenarios {
        let begun = Instant::now();
        let before = progress.stages().len();
        let run = RunDir::create(&runs(), &format!("{}-nested", scenario.name))?;
        let mut report = Report { scenario: scenario.name.clone(), ..Report::default() };
        let result = one(scenario, &file(scenario), &run, options, progress, &mut report);
        report.result = match result {
            _ if children::interrupted() => Outcome::Interrupted,
            // What could not run inside did not run.
            Ok(()) if report.error.is_some() => Outcome::Error,
            Ok(()) => report.judge(),
            Err(error) => {
                report.error = Some(format!("{error:#}"));
                Outcome::Error
            }
        };
        if let Some(outer) = &mut report.outer {
            outer.stages = progress.stages().split_off(before);
            outer.seconds = begun.elapsed().as_secs_f64();
        }
        finish(&run, &report, options.json)?;
        let interrupted = report.result == Outcome::Interrupted;
        reports.push(report);
        if interrupted {
            break;
        }
    }
    Ok(reports)
}

fn outer_memory_mib(scenario: &Scenario) -> u64 {
    let disks = scenario.disks.values().filter_map(|disk| disk.size_mib).fold(0, u64::saturating_add);
    Outer::memory_mib(scenario.memory_mib(), disks)
}

fn one(
    scenario: &Scenario,
    file: &Path,
    run: &RunDir,
    options: &Options,
    progress: &Progress,
    report: &mut Report,
) -> Result<()> {
    let setup = Setup::obtain(&outside(&options.setup), &crate::format::needs([scenario]), progress)?;
    let nested = NestedSetup::obtain(&options.setup, progress)?;
    let extra = OverlayEntry::File { path: SCENARIO.to_owned(), mode: 0o644, from: file.to_owned() };
    let memory_mib = outer_memory_mib(scenario);
    let (mut vm, outer) =
        Outer::start(&setup, &scenario.kernel, &nested, vec![extra], memory_mib, run, progress)?;
    report.outer = Some(outer);

    let stage = progress.stage("nested run");
    stage.update(format!("{} with KVM inside", scenario.name));
    let inner = vm.json::<Report>(&format!("e2e --scenario-file {SCENARIO}"), RUN_LIMIT);
    let fetched = vm.fetch_logs(run);
    let outer = report.outer.take();
    *report = inner?;
    report.outer = outer;
    let used = report.accelerator.clone().unwrap_or_default();
    stage.done(format!("{:.1} s, {}: {}", report.totals.seconds, used.used, used.reason));
    fetched?;

    let left = vm.end(run, progress)?;
    report.checks.push(checked("kvm-proven", proven(&used)));
    report.checks.push(checked("nothing-left-outside", left));
    Ok(())
}
