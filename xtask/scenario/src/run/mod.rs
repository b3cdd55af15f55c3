//! `cargo xtask e2e`: runs scenarios in VMs and reports.

mod keep;
mod nested;
mod plan;
mod steps;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::format::{self, DiskFacts, DiskSpec, Pattern, Placed, Scenario};
use crate::report::{self, Check, CheckResult, Part, Report, Reports};
use vvu_artifacts::image::{DiskImage, OverlayEntry, Pattern as Content, with_overlay};
use vvu_artifacts::kernel::Kernel;
use vvu_process::children;
use vvu_process::interrupt;
use vvu_process::progress::Progress;
use vvu_testvm::facts::{self, Outcome};
use vvu_testvm::leftover;
use vvu_testvm::rundir::{RunDir, SocketDir};
use vvu_testvm::vm::args::{Guest, Serial, arguments};
use vvu_testvm::vm::proxy::Proxy;
use vvu_testvm::vm::{Logs, Vm};

use crate::matrix::{self, Coverage};
use plan::Plan;
use vvu_artifacts::workspace;
use vvu_testvm::memory;
use vvu_testvm::rundir::runs;
use vvu_testvm::setup::{Setup, SetupOptions};

/// How long a proxy may take until it listens, and a bare boot until its first line, at native speed.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Options of `cargo xtask e2e`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Scenarios to run; --list tells them
    #[arg(value_name = "SCENARIO", required_unless_present_any = ["all", "list", "scenario_file"])]
    pub(crate) scenarios: Vec<String>,
    /// Run every scenario
    #[arg(long, conflicts_with_all = ["scenarios", "scenario_file"])]
    all: bool,
    /// List the scenarios and end
    #[arg(long)]
    list: bool,
    /// Run a scenario file of your own
    #[arg(long, value_name = "FILE", conflicts_with = "scenarios")]
    scenario_file: Option<PathBuf>,
    /// Run the scenario in a set of variants from scenarios/matrix: those in which all pairs of values occur, `each` one
    /// changed by itself, or `all`
    #[arg(long, value_name = "SET", num_args = 0..=1, require_equals = true, default_missing_value = "pairs")]
    #[arg(conflicts_with_all = ["all", "list", "scenario_file", "nested", "prepared"])]
    matrix: Option<Coverage>,
    #[command(flatten)]
    setup: SetupOptions,
    /// Directory whose tree is laid over the root of every VM
    #[arg(long, value_name = "DIR")]
    overlay: Vec<PathBuf>,
    /// Print the report, and nothing else, on stdout
    #[arg(long)]
    pub(crate) json: bool,
    /// Measure a bare boot of the same guest and compare
    #[arg(long)]
    measure: bool,
    /// Keep the VMs before they are shut down, and when a check fails, and run commands in them from standard input
    #[arg(long, conflicts_with = "nested")]
    keep: bool,
    /// As --keep, but only when a check fails
    #[arg(long, conflicts_with = "nested")]
    interactive: bool,
    /// Run the scenario with KVM in a VM whose CPU QEMU emulates: for machines without KVM
    #[arg(long, conflicts_with_all = ["prepared", "overlay", "measure", "accel", "qemu", "file"])]
    nested: bool,
}

/// Runs `cargo xtask e2e`.
///
/// # Errors
///
/// A scenario could not be found or the set-up not be made.
pub fn main(options: &Options) -> Result<ExitCode> {
    let dir = workspace().join("scenarios");
    if options.list {
        for scenario in format::list(&dir)?.values() {
            println!("{:26} {}", scenario.name, scenario.description);
        }
        return Ok(ExitCode::SUCCESS);
    }
    for overlay in &options.overlay {
        if !overlay.is_dir() {
            bail!("--overlay {}: want a directory", overlay.display());
        }
    }
    if let Some(coverage) = options.matrix {
        return matrix::main(&dir, coverage, options);
    }
    let scenarios = match &options.scenario_file {
        Some(file) => vec![Scenario::load(file)?],
        None if options.all => format::list(&dir)?.into_values().collect(),
        None => options.scenarios.iter().map(|name| format::find(&dir, name)).collect::<Result<_>>()?,
    };
    let progress = Progress::new(false);
    let reports: Vec<Report> = if options.nested {
        let file = |scenario: &Scenario| {
            let named = options.scenario_file.clone();
            named.unwrap_or_else(|| dir.join(format!("{}.json", scenario.name)))
        };
        nested::run_all(&scenarios, file, options, &progress)?
    } else {
        // The directory exists from the first moment, so that whatever happens can be found there.
        let create = |scenario: &Scenario| RunDir::create(&runs(), &scenario.name);
        run_all(&scenarios, create, options, &progress)?.reports
    };
    if reports.len() > 1 {
        tell(&report::summary(&reports), options.json);
    }
    let worst = worst(&reports);
    if options.json {
        print_json(reports, options.all)?;
    }
    Ok(exit_code(worst))
}

/// The worst of the results; of none, a pass.
pub(crate) fn worst<'a>(reports: impl IntoIterator<Item = &'a Report>) -> Outcome {
    let results = reports.into_iter().map(|report| report.result);
    results.max_by_key(|result| severity(*result)).unwrap_or(Outcome::Pass)
}

pub(crate) fn exit_code(worst: Outcome) -> ExitCode {
    match worst {
        Outcome::Pass => ExitCode::SUCCESS,
        Outcome::Fail => ExitCode::from(1),
        Outcome::Error => ExitCode::from(2),
        Outcome::Interrupted => interrupt::exit_code(),
    }
}

fn severity(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Pass => 0,
        Outcome::Fail => 1,
        Outcome::Error => 2,
        Outcome::Interrupted => 3,
    }
}

fn print_json(mut reports: Vec<Report>, all: bool) -> Result<()> {
    let text = match reports.pop() {
        Some(report) if !all && reports.is_empty() => serde_json::to_string_pretty(&report),
        last => {
            reports.extend(last);
            serde_json::to_string_pretty(&Reports { scenarios: reports })
        }
    };
    println!("{}", text.context("cannot write the report")?);
    Ok(())
}

/// What came of several scenarios.
pub(crate) struct Ran {
    /// Their reports, in their order; those that an interruption kept from running have none.
    pub(crate) reports: Vec<Report>,
    /// How many of the first stages of each report are those of the set-up that they share.
    pub(crate) common: usize,
}

/// Runs scenarios one after the other in the directories that `create` makes.
pub(crate) fn run_all(
    scenarios: &[Scenario],
    create: impl Fn(&Scenario) -> Result<RunDir>,
    options: &Options,
    progress: &Progress,
) -> Result<Ran> {
    let started = Instant::now();
    // Before the kernel is built for nothing.
    for scenario in scenarios {
        memory::ensure_free(scenario.memory_mib(), scenario.vms.len())?;
    }
    let mut reports = Vec::new();
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
            Ok(setup) => one(scenario, run, setup, options, progress, &mut report),
            Err(error) => Err(anyhow::anyhow!("{error:#}")),
        };
        report.result = match result {
            _ if children::interrupted() => Outcome::Interrupted,
            Ok(()) => report.judge(),
            Err(error) => {
                report.error = Some(format!("{error:#}"));
                Outcome::Error
            }
        };
        let stages = progress.stages();
        report.stages = stages[..common].iter().chain(&stages[before..]).cloned().collect();
        report.totals.seconds = set_up_seconds + begun.elapsed().as_secs_f64();
        set_up_seconds = 0.0;
        finish(run, &report, options.json)?;
        let interrupted = report.result == Outcome::Interrupted;
        reports.push(report);
        if interrupted {
            break;
        }
    }
    Ok(Ran { reports, common })
}

/// Writes the report and tells a person about it.
fn finish(run: &RunDir, report: &Report, json: bool) -> Result<()> {
    run.write("report.json", serde_json::to_vec_pretty(report).context("cannot write the report")?)?;
    if let Some(error) = &report.error {
        eprintln!("error: {error}");
    }
    tell(&format!("{}{}\n", report::table(report), run.path().display()), json);
    if report.result == Outcome::Pass {
        run.prune(&report.scenario, "report.json");
    }
    Ok(())
}

/// Prints what is for people; stdout is the report's alone if that is wanted there.
pub(crate) fn tell(text: &str, json: bool) {
    if json { eprint!("{text}") } else { print!("{text}") }
}

/// Runs one scenario. An error means that it could not run; a check that failed is in the report.
fn one(
    scenario: &Scenario,
    run: &RunDir,
    setup: &Setup,
    options: &Options,
    progress: &Progress,
    report: &mut Report,
) -> Result<()> {
    report.accelerator = Some(facts::Accelerator::from(&setup.accelerator));
    report.qemu = Some(facts::Qemu::from(&setup.qemu));
    for (vm, name) in scenario.vms.iter().filter_map(|(vm, spec)| Some((vm, spec.vmm.as_deref()?))) {
        report.qemus.insert(vm.clone(), setup.qemu(Some(name))?.into());
    }
    let kernel = setup.kernel(&scenario.kernel_id())?;
    report.kernel = Some(facts::Kernel::from(kernel));
    let sockets = SocketDir::for_run(run)?;
    let plan = Plan::new(scenario, run, &sockets)?;
    let images = Images::build(scenario, run, setup, options, progress)?;
    let values = scenario.values(
        |vvu| plan.proxies[vvu].slot.to_string(),
        |disk| images.disks.get(disk).cloned().unwrap_or_default(),
    );
    let bench = Bench { run, setup, kernel, plan: &plan, images: &images };
    bench.write_replay(scenario, &values, &sockets)?;

    if options.measure {
        report.totals.bare_boot_seconds = Some(bench.bare_boot(progress)?);
    }
    // It may have been long ago that this was looked at.
    memory::ensure_free(scenario.memory_mib(), scenario.vms.len())?;
    let _transient = Transient(plan.transient());
    let mut running = bench.start(scenario, values)?;
    let mut prompt = |running: &mut steps::Running<'_>| match options.keep {
        true => keep::prompt(running, run, &mut std::io::stdin()),
        false => Ok(()),
    };
    let done = steps::carry_out(scenario, &mut running, progress, &mut prompt);
    let failure = done.checks.iter().find(|check| check.result == CheckResult::Fail);
    let failure = failure.map(|check| format!("{}: {}", check.name, check.evidence));
    if let Some(failure) = failure.or(done.error.as_ref().map(|error| format!("{error:#}")))
        && (options.keep || options.interactive)
        && !children::interrupted()
    {
        eprintln!("{failure}");
        keep::prompt(&mut running, run, &mut std::io::stdin())?;
    }
    report.checks = done.checks;
    report.measurements = std::mem::take(&mut running.measurements);
    report.totals.launch_to_vda_seconds = done.launch_to_vda;
    let totals = &mut report.totals;
    totals.ratio_to_bare_boot =
        totals.launch_to_vda_seconds.zip(totals.bare_boot_seconds).map(|(vda, bare)| vda / bare);
    let stage = progress.stage("nothing-left");
    let left = bench.end(running);
    interrupt::check()?;
    let left = left.and_then(|()| leftover::check(&run.id(), &plan.transient()));
    match &left {
        Ok(evidence) => stage.done(evidence),
        Err(_) => drop(stage),
    }
    report.checks.push(checked("nothing-left", left));
    done.error.map_or(Ok(()), Err)
}

/// Sockets and links that a proxy removes when it ends well; this is for when it was killed.
struct Transient(Vec<PathBuf>);

impl Drop for Transient {
    fn drop(&mut self) {
        for path in &self.0 {
            // Mostly it is gone already.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn checked(name: &str, result: Result<String>) -> Check {
    let (result, evidence) = match result {
        Ok(evidence) => (CheckResult::Pass, evidence),
        Err(error) => (CheckResult::Fail, format!("{error:#}")),
    };
    Check { name: name.to_owned(), result, evidence }
}

/// The initramfs of each VM and what is known of the disks in them.
struct Images {
    files: BTreeMap<String, PathBuf>,
    disks: BTreeMap<String, DiskFacts>,
}

impl Images {
    fn build(
        scenario: &Scenario,
        run: &RunDir,
        setup: &Setup,
        options: &Options,
        progress: &Progress,
    ) -> Result<Self> {
        let stage = progress.stage("image");
        let mut images = Self { files: BTreeMap::new(), disks: BTreeMap::new() };
        let mut bytes = 0;
        for (name, vm) in &scenario.vms {
            let programs = vm.programs.iter().filter_map(|program| setup.programs.get(program));
            let trees = programs.chain(&options.overlay).chain(&vm.overlay);
            let mut overlay: Vec<_> = trees.map(|tree| OverlayEntry::Tree(tree.clone())).collect();
            let mut disks = Vec::new();
            for (disk, spec) in scenario.disks.iter().filter(|(_, spec)| spec.vm == *name) {
                let image = disk_image(spec)?;
                disks.push((disk, image.size));
                overlay.push(OverlayEntry::Disk { path: format!("/{disk}.img"), image });
            }
            if overlay.is_empty() {
                images.files.insert(name.clone(), setup.base.path.clone());
                continue;
            }
            stage.update(format!("initramfs of {name}"));
            let file = run.file(&format!("{name}.cpio"));
            let written = with_overlay(&setup.base, &overlay, &file)?;
            bytes += written.bytes;
            for (disk, size) in disks {
                let sha256 =
                    written.disks.get(&format!("/{disk}.img")).context("a disk has no digest")?.clone();
                images.disks.insert(disk.clone(), DiskFacts { sha256, bytes: size });
            }
            images.files.insert(name.clone(), file);
        }
        stage.done(format!("{} MiB base, {} MiB with disks", setup.base.bytes >> 20, bytes >> 20));
        Ok(images)
    }
}

fn disk_image(spec: &DiskSpec) -> Result<DiskImage> {
    Ok(match &spec.file {
        Some(file) => {
            let size = file.metadata().with_context(|| format!("cannot open {}", file.display()))?.len();
            DiskImage { size, pattern: Content::Copy(file.clone()) }
        }
        None => match spec.pattern {
            Pattern::Random => DiskImage::seeded(spec.size_mib.unwrap_or_default() << 20, spec.seed),
            Pattern::Zero => DiskImage::zero(spec.size_mib.unwrap_or_default() << 20),
        },
    })
}

/// All that is needed to start the VMs of a run.
struct Bench<'a> {
    run: &'a RunDir,
    setup: &'a Setup,
    kernel: &'a Kernel,
    plan: &'a Plan,
    images: &'a Images,
}

impl<'a> Bench<'a> {
    /// Starts the proxies, then the VMs that no step starts.
    fn start(&'a self, scenario: &Scenario, values: format::Values) -> Result<steps::Running<'a>> {
        let proxies = self.plan.proxies.keys().map(|name| Ok((name.clone(), self.launch_proxy(name)?)));
        let mut running = steps::Running {
            vms: BTreeMap::new(),
            proxies: proxies.collect::<Result<_>>()?,
            launch: Box::new(|name| self.launch(name)),
            launch_proxy: Box::new(|name| self.launch_proxy(name)),
            trace: Box::new(|name| self.trace(name)),
            launched: None,
            values,
            measurements: steps::Measurements::new(),
            slowness: self.setup.slowness,
        };
        for name in scenario.vms.keys().filter(|name| !scenario.starts(name)) {
            running.start(name)?;
        }
        Ok(running)
    }

    /// Ends everything; the proxies must end well.
    fn end(&self, running: steps::Running<'_>) -> Result<()> {
        let steps::Running { mut vms, mut proxies, .. } = running;
        vms.values_mut().for_each(Vm::end);
        drop(vms);
        let stopped: Vec<Result<()>> = proxies.values_mut().map(Proxy::stop).collect();
        proxies.values_mut().for_each(Proxy::end);
        stopped.into_iter().collect()
    }

    /// Starts the proxy of a vvu device and waits until it listens.
    fn launch_proxy(&self, name: &str) -> Result<Proxy> {
        let plan =
            self.plan.proxies.get(name).with_context(|| format!("no vvu device is called {name:?}"))?;
        let words = plan.words(&self.setup.binaries.vvu);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).env(leftover::RUN_VARIABLE, self.run.id());
        self.note(&format!("proxy-{name}"), &words)?;
        let mut proxy = Proxy::start(name, command, self.run.file(&format!("proxy-{name}.log")))?;
        proxy.ready(Instant::now() + START_LIMIT * self.setup.slowness)?;
        Ok(proxy)
    }

    fn trace(&self, name: &str) -> Result<String> {
        let path = self.plan.proxies.get(name).and_then(|plan| plan.trace.as_deref());
        let path = path.with_context(|| format!("{name:?} has no trace"))?;
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    }

    fn launch(&self, name: &str) -> Result<Vm> {
        let config = self.plan.vms.get(name).with_context(|| format!("no VM is called {name:?}"))?;
        self.launch_config(config, name)
    }

    fn launch_config(&self, config: &vvu_testvm::vm::args::Config, name: &str) -> Result<Vm> {
        let logs = Logs {
            console: self.run.file(&format!("{name}-console.log")),
            qemu: self.run.file(&format!("{name}-qemu.log")),
        };
        let args = arguments(config, self.guest(&config.name), Serial::Inherited(&logs.console))?;
        let qemu = self.setup.qemu(config.vmm.as_deref())?;
        let mut words = qemu.argv_prefix();
        words.extend(args.iter().cloned());
        self.note(name, &words)?;
        let mut command = qemu.command();
        command.args(args).env(leftover::RUN_VARIABLE, self.run.id());
        Vm::launch(name, command, logs)
    }

    fn guest(&self, vm: &str) -> Guest<'_> {
        Guest {
            accelerator: self.setup.accelerator.kind,
            kernel: &self.kernel.vmlinux,
            initramfs: self.images.files.get(vm).unwrap_or(&self.setup.base.path),
        }
    }

    /// Writes down the exact command line of a process.
    fn note(&self, name: &str, words: &[String]) -> Result<()> {
        self.run.write(&format!("{name}.cmd"), facts::command_line(words) + "\n")
    }

    /// Seconds from the launch of one VM, without devices, to the first line of its init.
    fn bare_boot(&self, progress: &Progress) -> Result<f64> {
        let stage = progress.stage("bare-boot");
        let config = vvu_testvm::vm::args::Config {
            name: "bare".to_owned(),
            memory_mib: 512,
            cpus: 1,
            ..vvu_testvm::vm::args::Config::default()
        };
        let mut vm = self.launch_config(&config, "bare")?;
        let pattern = regex::Regex::new(&regex::escape(vvu_init::protocol::READY_LINE))?;
        let deadline = Instant::now() + START_LIMIT * self.setup.slowness;
        vm.wait_for(&pattern, deadline, &mut interrupt::check)?;
        let seconds = vm.launched().elapsed().as_secs_f64();
        vm.end();
        stage.done(format!("{seconds:.2} s"));
        Ok(seconds)
    }

    fn write_replay(&self, scenario: &Scenario, values: &format::Values, sockets: &SocketDir) -> Result<()> {
        let mut parts = Vec::new();
        for (name, proxy) in &self.plan.proxies {
            let words = proxy.words(&self.setup.binaries.vvu);
            parts.push(Part { name: name.clone(), words, steps: Vec::new() });
        }
        // In the order in which the scenario uses them.
        let mut names: Vec<&String> = scenario.vms.keys().collect();
        let steps = scenario.unrolled(1);
        let in_vm = |placed: &Placed<'_>, name: &str| placed.step.vm() == Some(name);
        names.sort_by_key(|name| steps.iter().position(|placed| in_vm(placed, name)));
        for name in names {
            let config = self.plan.vms.get(name).context("every VM is planned")?;
            let mut words = self.setup.qemu(config.vmm.as_deref())?.argv_prefix();
            words.extend(arguments(config, self.guest(name), Serial::Terminal)?);
            let steps = steps.iter().filter(|placed| in_vm(placed, name));
            let steps = steps.map(|placed| {
                let text = report::by_hand(placed.step);
                // A value that a step saves is not known yet.
                values.fill(&text).unwrap_or(text)
            });
            parts.push(Part { name: name.clone(), words, steps: steps.collect() });
        }
        let script = report::replay_script(&self.run.id(), &sockets.path().display().to_string(), &parts);
        self.run.write_script("replay.sh", &script)
    }
}
