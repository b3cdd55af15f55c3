//! `cargo xtask e2e SCENARIO --nested`: runs scenarios with KVM on a machine without KVM.
//!
//! This program runs the scenario inside an [outer VM](vvu_testvm::outer), and its report there is the report.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use vvu_artifacts::image::OverlayEntry;
use vvu_process::progress::Progress;
use vvu_testvm::facts::Outcome;
use vvu_testvm::outer::{NestedSetup, Outer, outside, proven};
use vvu_testvm::{Lab, RunDir, Setup, SetupOptions, memory, runs};

use crate::format::{self, KernelSpec, Scenario};
use crate::report::{Check, Report, publish};

/// Path of the scenario in the outer VM.
const SCENARIO: &str = "/prepared/scenario.json";
/// How long the run inside may take.
const RUN_LIMIT: Duration = Duration::from_secs(900);

/// Runs scenarios one after the other, each in an outer VM of its own. `file` returns the file of a scenario.
///
/// # Errors
///
/// Fails if a scenario cannot run that way or the host has too little memory.
pub(crate) fn run_all(
    scenarios: &[Scenario],
    file: impl Fn(&Scenario) -> PathBuf,
    options: &SetupOptions,
    json: bool,
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
        fragments(scenario)?;
        memory::ensure_free(outer_memory_mib(scenario), 1)?;
    }
    let mut reports = Vec::new();
    for scenario in scenarios {
        let begun = Instant::now();
        let before = progress.stages().len();
        let run = RunDir::create(&runs(), &format!("{}-nested", scenario.name))?;
        let mut report = Report { scenario: scenario.name.clone(), ..Report::default() };
        let result = one(scenario, &file(scenario), &run, options, progress, &mut report);
        report.conclude(result);
        if let Some(outer) = &mut report.outer {
            outer.stages = progress.stages().split_off(before);
            outer.seconds = begun.elapsed().as_secs_f64();
        }
        publish(&report, &run, json)?;
        let interrupted = report.result == Outcome::Interrupted;
        reports.push(report);
        if interrupted {
            break;
        }
    }
    Ok(reports)
}

/// The fragments of the one kernel that the outer VM holds.
fn fragments(scenario: &Scenario) -> Result<&[String]> {
    match &scenario.kernel {
        KernelSpec::Fragments(names) if scenario.vms.values().all(|vm| vm.kernel.is_none()) => Ok(names),
        _ => bail!(
            "{}: --nested takes no scenario with a distribution's kernel, or several kernels",
            scenario.name
        ),
    }
}

fn outer_memory_mib(scenario: &Scenario) -> u64 {
    let disks = scenario.disks.values().filter_map(|disk| disk.size_mib).fold(0, u64::saturating_add);
    Outer::memory_mib(scenario.memory_mib(), disks)
}

fn one(
    scenario: &Scenario,
    file: &Path,
    run: &RunDir,
    options: &SetupOptions,
    progress: &Progress,
    report: &mut Report,
) -> Result<()> {
    let setup = Setup::obtain(&outside(options), &format::needs([scenario]), progress)?;
    let nested = NestedSetup::obtain(options, progress)?;
    let lab = Lab::new(run, &setup)?;
    let extra = OverlayEntry::File { path: SCENARIO.to_owned(), mode: 0o644, from: file.to_owned() };
    let memory_mib = outer_memory_mib(scenario);
    let (vm, outer) = Outer::start(&lab, fragments(scenario)?, &nested, vec![extra], memory_mib, progress)?;
    report.outer = Some(outer);

    let stage = progress.stage("nested run");
    stage.update(format!("{} with KVM inside", scenario.name));
    let inner = vm.json::<Report>(&format!("e2e --scenario-file {SCENARIO}"), RUN_LIMIT);
    let fetched = vm.fetch_logs();
    let outer = report.outer.take();
    *report = inner?;
    report.outer = outer;
    let used = report.accelerator.clone().unwrap_or_default();
    stage.done(format!("{:.1} s, {}: {}", report.totals.seconds, used.used, used.reason));
    fetched?;

    let left = vm.end(progress)?;
    report.checks.push(Check::of("kvm-proven", proven(&used)));
    report.checks.push(Check::of("nothing-left-outside", left));
    Ok(())
}
