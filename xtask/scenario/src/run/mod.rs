//! Runs scenarios in VMs.

mod images;
mod keep;
mod launch;
mod options;
mod plan;
mod steps;

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Result, anyhow};
use vvu_process::interrupt;
use vvu_process::progress::Progress;
use vvu_testvm::facts::{self, Outcome};
use vvu_testvm::{Iommu, Lab, RunDir, Setup, memory};

use crate::format::{self, Scenario, VmSpec, VvuFacts};
use crate::report::{Check, CheckResult, Report, publish};

use images::Images;
use launch::Launcher;
use options::Overlay;
pub use options::RunOptions;
use plan::Plan;

/// The result of several scenarios.
pub(crate) struct Ran {
    /// The reports in the scenarios' order, without those of scenarios that an interruption kept from running.
    pub(crate) reports: Vec<Report>,
    /// How many of the first stages of each report belong to the set-up that all share.
    pub(crate) common: usize,
}

/// Runs scenarios one after the other in the directories that `create` makes.
pub(crate) fn run_all(
    scenarios: &[Scenario],
    create: impl Fn(&Scenario) -> Result<RunDir>,
    options: &RunOptions,
    progress: &Progress,
) -> Result<Ran> {
    let started = Instant::now();
    // Checked before minutes are spent on building a kernel.
    for scenario in scenarios {
        memory::ensure_free(scenario.memory_mib(), scenario.vms.len())?;
    }
    let mut reports = Vec::new();
    let overlay = Overlay::new(options)?;
    let runs = scenarios.iter().map(create).collect::<Result<Vec<_>>>()?;
    let setup = Setup::obtain(&options.setup, &format::needs(scenarios), progress);
    let common = progress.stages().len();
    let mut set_up_seconds = started.elapsed().as_secs_f64();
    for (scenario, run) in scenarios.iter().zip(&runs) {
        let begun = Instant::now();
        let before = progress.stages().len();
        if scenarios.len() > 1 {
            progress.note(format!("{}: {}", scenario.name, scenario.description));
        }
        let mut report = Report { scenario: scenario.name.clone(), ..Report::default() };
        let result = match &setup {
            Ok(setup) => one(scenario, run, setup, &overlay, options, progress, &mut report),
            Err(error) => Err(anyhow!("{error:#}")),
        };
        report.conclude(result);
        let stages = progress.stages();
        report.stages = stages[..common].iter().chain(&stages[before..]).cloned().collect();
        report.totals.seconds = set_up_seconds + begun.elapsed().as_secs_f64();
        set_up_seconds = 0.0;
        publish(&report, run, options.json)?;
        let interrupted = report.result == Outcome::Interrupted;
        reports.push(report);
        if interrupted {
            break;
        }
    }
    Ok(Ran { reports, common })
}

/// Runs one scenario. An error means that it could not run; a check that failed is in the report.
fn one(
    scenario: &Scenario,
    run: &RunDir,
    setup: &Setup,
    overlay: &Overlay,
    options: &RunOptions,
    progress: &Progress,
    report: &mut Report,
) -> Result<()> {
    report.accelerator = Some(facts::Accelerator::from(&setup.accelerator));
    report.qemu = Some(setup.vmm(None)?.into());
    for (vm, name) in scenario.vms.iter().filter_map(|(vm, spec)| Some((vm, spec.vmm.as_deref()?))) {
        report.qemus.insert(vm.clone(), setup.vmm(Some(name))?.into());
    }
    let kernel = setup.kernel(&scenario.kernel_id())?;
    report.kernel = Some(facts::Kernel::from(kernel));
    let mut kernels = BTreeMap::new();
    for (name, vm) in &scenario.vms {
        let kernel = setup.kernel(&scenario.kernel_of(vm))?;
        kernels.insert(name.clone(), kernel);
        if vm.kernel.is_some() {
            report.kernels.insert(name.clone(), facts::Kernel::from(kernel));
        }
    }
    let lab = Lab::new(run, setup)?;
    let default_iommu = |vm: &VmSpec| Ok(Iommu::default_for(setup.kernel(&scenario.kernel_of(vm))?));
    let plan = Plan::new(scenario, run, lab.sockets(), default_iommu)?;
    let images = Images::build(scenario, &plan, &lab, &overlay.trees, progress)?;
    let values = scenario.values(
        |vvu| VvuFacts { bdf: plan.proxies[vvu].slot.to_string(), memory: plan.proxies[vvu].memory_file() },
        |disk| images.disks.get(disk).cloned().unwrap_or_default(),
    )?;
    let launcher = Launcher { lab: &lab, kernels, kernel, plan: &plan, images: &images };
    launcher.write_replay(scenario, &values)?;

    if options.measure {
        report.totals.bare_boot_seconds = Some(launcher.bare_boot(progress)?);
    }
    // The set-up may have taken long since the first check.
    memory::ensure_free(scenario.memory_mib(), scenario.vms.len())?;
    let mut running = launcher.start(scenario, values)?;
    let mut prompt = |running: &mut steps::Running<'_>| match options.keep {
        true => keep::prompt(running, &lab, &mut std::io::stdin()),
        false => Ok(()),
    };
    let done = steps::carry_out(scenario, &mut running, progress, &mut prompt);
    let failure = done.checks.iter().find(|check| check.result == CheckResult::Fail);
    let failure = failure.map(|check| format!("{}: {}", check.name, check.evidence));
    if let Some(failure) = failure.or(done.error.as_ref().map(|error| format!("{error:#}")))
        && (options.keep || options.interactive)
        && !interrupt::requested()
    {
        eprintln!("{failure}");
        keep::prompt(&mut running, &lab, &mut std::io::stdin())?;
    }
    report.checks = done.checks;
    report.measurements = std::mem::take(&mut running.measurements);
    let totals = &mut report.totals;
    totals.launch_to_vda_seconds = done.launch_to_vda;
    totals.ratio_to_bare_boot =
        totals.launch_to_vda_seconds.zip(totals.bare_boot_seconds).map(|(vda, bare)| vda / bare);
    let stage = progress.stage("nothing-left");
    let left = launcher.end(running);
    interrupt::check()?;
    match &left {
        Ok(evidence) => stage.done(evidence),
        Err(_) => drop(stage),
    }
    report.checks.push(Check::of("nothing-left", left));
    done.error.map_or(Ok(()), Err)
}
