//! `cargo xtask bench`: what VVU costs, against the same back-end on a plain vhost-user socket and others.
//!
//! The documentation, with what each figure means, is `docs/performance.md`.

mod back_end;
mod chain;
mod nested;
mod plot;
mod results;
mod table;
mod usage;
mod vms;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};

use vvu_process::interrupt;
use vvu_process::progress::Progress;
use vvu_testvm::facts;
use vvu_testvm::rundir::RunDir;
use vvu_testvm::rundir::runs;
use vvu_testvm::setup::{KernelId, Needs, Setup, SetupOptions};

use results::{Bench, FORMAT, Machine, SUBJECT};

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// What to measure; everything by default
    #[arg(value_enum)]
    what: Option<What>,
    /// Rounds, each with fresh connections and VMs
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// How long each test of a round takes
    #[arg(long, value_name = "S", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// VMs: measure these variants only (vvu, plain, qsd, qemu)
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = ["vvu", "plain", "qsd", "qemu"])]
    only: Vec<String>,
    /// VMs: give our back-ends, in the device VM and on the host, this --poll-us instead of their default
    #[arg(long, value_name = "N")]
    poll_us: Option<u32>,
    /// Compare with an earlier run's JSON
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// Print the JSON, and nothing else, on stdout
    #[arg(long)]
    json: bool,
    /// Run the VMs with KVM in a VM whose CPU QEMU emulates: for machines without KVM
    #[arg(long, conflicts_with_all = ["prepared", "accel", "qemu", "file"])]
    nested: bool,
    #[command(flatten)]
    setup: SetupOptions,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// The chain in one process, without VMs
    Chain,
    /// A sibling VM's disk, and how long it takes to appear
    Vms,
}

/// Measures, prints, and leaves `bench.json` and `bench.svg` in the run directory.
///
/// # Errors
///
/// The set-up cannot be made, a VM fails, or the baseline cannot be read.
pub fn main(options: &Options) -> Result<ExitCode> {
    // Before minutes are spent for nothing.
    let baseline = options.baseline.as_deref().map(Bench::load).transpose()?;
    let progress = Progress::new(false);
    let run = RunDir::create(&runs(), "bench")?;
    let mut bench = Bench {
        format: FORMAT,
        rounds: options.rounds,
        seconds: options.seconds,
        machine: Machine::now(),
        ..Bench::default()
    };
    if options.what != Some(What::Vms) {
        chain::measure(options.rounds, options.seconds, &run, &progress, &mut bench)?;
    }
    if options.what != Some(What::Chain) && options.nested {
        nested::measure(options, &run, &progress, &mut bench)?;
    } else if options.what != Some(What::Chain) {
        let setup = Setup::obtain(&options.setup, &Needs::default(), &progress)?;
        bench.accelerator = Some(facts::Accelerator::from(&setup.accelerator));
        bench.qemu = Some(facts::Qemu::from(&setup.qemu));
        bench.kernel = Some(facts::Kernel::from(setup.kernel(&KernelId::default())?));
        bench.setup_stages = progress.stages();
        vms::measure(options, &setup, &run, &progress, &mut bench)?;
    }
    interrupt::check()?;
    bench.machine.load_after = results::load();
    if let Some(baseline) = &baseline {
        bench.compare(baseline);
    }
    let json = serde_json::to_string_pretty(&bench).context("cannot write the results")?;
    run.write("bench.json", &json)?;
    run.write("bench.svg", plot::svg(&bench))?;
    let text = format!("{}{}\n", table::text(&bench), run.path().display());
    if options.json {
        eprint!("{text}");
        println!("{json}");
    } else {
        print!("{text}");
    }
    // Others may fail; what is measured may not.
    let failed = bench.skipped.iter().any(|skipped| skipped.what.starts_with(SUBJECT));
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

impl Bench {
    fn load(path: &std::path::Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let bench: Self = serde_json::from_str(&text)
            .with_context(|| format!("{} is no output of bench", path.display()))?;
        anyhow::ensure!(
            bench.format == FORMAT,
            "{} has format {}, want {FORMAT}: measure it again with this version",
            path.display(),
            bench.format
        );
        Ok(bench)
    }
}
