//! `cargo xtask e2e SCENARIO --nested`: the KVM path, on a machine without KVM.
//!
//! An outer VM, whose emulated CPU has SVM and whose kernel has KVM, holds all that a run needs; in it this same
//! program runs the scenario with KVM. Its report is the report.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vvu_init::protocol::End;

use super::setup::{Needs, Setup, SetupOptions};
use super::{Options, checked, finish, memory, prepared, runs};
use crate::accel::{self, Kind};
use crate::cache::Cache;
use crate::image::{OverlayEntry, build_xtask, with_overlay};
use crate::kernel::{Kernel, KernelOptions};
use crate::progress::Progress;
use crate::qemu::Qemu;
use crate::report::{self, Outcome, Report};
use crate::rundir::RunDir;
use crate::scenario::Scenario;
use crate::vm::args::{Config, Guest, Serial, arguments};
use crate::vm::{Logs, Vm, ending, printed};
use crate::{children, interrupt, leftover};

/// Adds KVM to the guest kernel.
const FRAGMENT: &str = "kvm";
/// A CPU that QEMU emulates well enough for KVM.
const CPU: &str = "EPYC,+svm,+npt";
/// Where the run's needs are in the outer VM.
const PLACE: &str = "/prepared";
const XTASK: &str = "/prepared/xtask";
const SCENARIO: &str = "/prepared/scenario.json";
/// Where the run's directory is in the outer VM.
const TARGET: &str = "/run/target";
/// RAM of the outer VM beside that of the VMs in it: twice its initramfs, while that is unpacked, and their disks.
const ROOM_MIB: u64 = 1280;
/// How much longer than at native speed things may take inside.
const SLOWNESS: u32 = 20;
/// How long the outer VM may take to boot, and to shut down.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// How long the run inside may take.
const RUN_LIMIT: Duration = Duration::from_secs(900);
/// How long it may take to fetch a file.
const FETCH_LIMIT: Duration = Duration::from_secs(60);

/// What a nested run needs beside the usual set-up.
pub(crate) struct NestedSetup {
    /// The QEMU for the outer VM's inside.
    qemu_root: PathBuf,
    /// The outer VM's kernel.
    kernel: Kernel,
    /// This program, static.
    xtask: PathBuf,
}

impl NestedSetup {
    /// Obtains everything.
    ///
    /// # Errors
    ///
    /// The first thing that cannot be had, and the remedy.
    pub(crate) fn obtain(options: &SetupOptions, progress: &Progress) -> Result<Self> {
        let cache = Cache::open(progress)?;
        let qemu_root = Qemu::portable(progress, &cache)?;
        let mut fragments = options.kernel.fragments.clone();
        fragments.push(FRAGMENT.to_owned());
        let kernel = KernelOptions { fragments, ..options.kernel.clone() };
        let kernel = Kernel::obtain(progress, &cache, &kernel)?;
        Ok(Self { qemu_root, kernel, xtask: build_xtask(progress)? })
    }
}

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
        let named = scenario.vms.values().filter_map(|vm| vm.qemu.as_ref()).chain(&scenario.kernel_source);
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

/// The inner VMs, what the harness wants free beside them, and the files.
fn outer_memory_mib(scenario: &Scenario) -> u64 {
    let disks = scenario.disks.values().map(|disk| disk.size_mib).fold(0, u64::saturating_add);
    // A disk is in an initramfs, and in the memory of the VM that unpacks it.
    scenario.memory_mib().saturating_add(disks.saturating_mul(2)).saturating_add(ROOM_MIB)
}

fn one(
    scenario: &Scenario,
    file: &Path,
    run: &RunDir,
    options: &Options,
    progress: &Progress,
    report: &mut Report,
) -> Result<()> {
    let setup_options = SetupOptions { accel: accel::Request::Tcg, ..options.setup.clone() };
    let setup = Setup::obtain(&setup_options, &Needs::of([scenario]), progress)?;
    let NestedSetup { qemu_root, kernel, xtask } = NestedSetup::obtain(&options.setup, progress)?;

    let stage = progress.stage("outer image");
    let mut overlay = prepared::lay_out(&setup, &scenario.kernel, &qemu_root, run, PLACE)?;
    for (path, mode, from) in [(XTASK, 0o755, xtask.as_path()), (SCENARIO, 0o644, file)] {
        overlay.push(OverlayEntry::File { path: path.to_owned(), mode, from: from.to_owned() });
    }
    let initramfs = run.file("outer.cpio");
    let written = with_overlay(&setup.base, &overlay, &initramfs)?;
    stage.done(format!("{} MiB", written.bytes >> 20));

    report.outer = Some(report::Outer {
        accelerator: report::Accelerator {
            used: Kind::Tcg.to_string(),
            reason: format!("--nested: it emulates the SVM of -cpu {CPU}"),
        },
        qemu: report::Qemu::from(&setup.qemu),
        kernel: report::Kernel {
            version: kernel.version.clone(),
            config_digest: kernel.config_digest.clone(),
        },
        ..report::Outer::default()
    });
    let config = Config {
        name: "outer".to_owned(),
        memory_mib: outer_memory_mib(scenario),
        cpus: 2,
        cpu_model: Some(CPU.to_owned()),
        ..Config::default()
    };
    let guest = Guest { accelerator: Kind::Tcg, kernel: &kernel.vmlinux, initramfs: &initramfs };
    let logs = Logs { console: run.file("outer-console.log"), qemu: run.file("outer-qemu.log") };
    let words = arguments(&config, guest, Serial::Inherited(&logs.console))?;
    run.write("outer.cmd", report::command_line(setup.qemu.argv_prefix().iter().chain(&words)) + "\n")?;
    let mut command = setup.qemu.command();
    command.args(&words).env(leftover::RUN_VARIABLE, run.id());

    let stage = progress.stage("outer boot");
    let mut vm = Vm::launch("outer", command, logs)?;
    vm.ready(Instant::now() + BOOT_LIMIT, &mut interrupt::check)?;
    stage.done(format!("Linux {} with KVM", kernel.version));

    let stage = progress.stage("nested run");
    stage.update(format!("{} with KVM inside", scenario.name));
    let inner = inner(&mut vm);
    let fetched = fetch_logs(&mut vm, run);
    let outer = report.outer.take();
    *report = inner?;
    report.outer = outer;
    let used = report.accelerator.clone().unwrap_or_default();
    stage.done(format!("{:.1} s, {}: {}", report.totals.seconds, used.used, used.reason));
    fetched?;

    let stage = progress.stage("outer end");
    vm.power_off(Instant::now() + BOOT_LIMIT, &mut interrupt::check)?;
    drop(vm);
    let left = leftover::check(&run.id(), &[]);
    stage.done("powered off");
    report.checks.push(checked("kvm-proven", proven(&used)));
    report.checks.push(checked("nothing-left-outside", left));
    Ok(())
}

fn proven(used: &report::Accelerator) -> Result<String> {
    let report::Accelerator { used, reason } = used;
    ensure!(*used == Kind::Kvm.to_string(), "{used} was used: {reason}");
    ensure!(!reason.starts_with(accel::UNPROVEN), "KVM is not proven: {reason}");
    Ok(reason.clone())
}

/// Runs the scenario in the outer VM and returns its report.
fn inner(vm: &mut Vm) -> Result<Report> {
    let command = format!(
        "CARGO_TARGET_DIR={TARGET} {XTASK} e2e --scenario-file {SCENARIO} --prepared {PLACE} --accel kvm \
         --slowness {SLOWNESS} --json"
    );
    let exit = vm.run(&command, RUN_LIMIT, &mut interrupt::check)?;
    // Before the run had a report, only its words tell what happened.
    serde_json::from_str(&exit.output.stdout).with_context(|| {
        format!("the run inside ended with {} and no report{}", ending(exit.end), printed(&exit.output))
    })
}

/// Copies the logs of the inner run into `inner/` of the run directory.
fn fetch_logs(vm: &mut Vm, run: &RunDir) -> Result<()> {
    let dir = run.file("inner");
    std::fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let latest = format!("{TARGET}/e2e/latest");
    let mut output = |command: &str| -> Result<String> {
        let exit = vm.run(command, FETCH_LIMIT, &mut interrupt::check)?;
        if exit.end != End::Code(0) {
            bail!("outer: `{command}` ended with {}{}", ending(exit.end), printed(&exit.output));
        }
        Ok(exit.output.stdout)
    };
    for name in output(&format!("cd {latest} && ls *.log *.cmd *.json"))?.lines() {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        ensure!(name.bytes().all(plain), "outer: {name:?} is no name of a log");
        run.write(&format!("inner/{name}"), output(&format!("cat {latest}/{name}"))?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_counts_only_with_proof() {
        let used = |used: &str, reason: &str| report::Accelerator {
            used: used.to_owned(),
            reason: reason.to_owned(),
        };
        proven(&used("kvm", "KVM runs kernel code at 1.00 of the host's speed")).expect("proven");
        for (kind, reason) in
            [("tcg", "no /dev/kvm"), ("kvm", "asked for by --accel kvm, although KVM hangs")]
        {
            let error = proven(&used(kind, reason)).expect_err("not proven").to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
