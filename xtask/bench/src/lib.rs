//! `cargo xtask bench`: measures what VVU costs, against the same back-end on a plain vhost-user socket and others.
//!
//! `docs/performance.md` tells what each figure means.

mod back_end;
mod chain;
mod memory;
mod nested;
mod options;
mod plot;
mod results;
mod table;
mod usage;
mod vms;

use std::process::ExitCode;

use anyhow::Result;
use vvu_process::interrupt;
use vvu_process::progress::Progress;
use vvu_testvm::{KernelId, Lab, Needs, RunDir, Setup, facts, runs};

pub use options::Options;
use options::What;
use results::{FORMAT, Machine, Results, SUBJECT};

/// Measures the ways to the sibling's memory and prints what came of it.
fn measure_memory(options: &Options) -> Result<ExitCode> {
    let progress = Progress::new(false);
    let run = RunDir::create(&runs(), "bench-memory")?;
    let setup = Setup::obtain(&options.setup, &memory::needs(), &progress)?;
    let text = memory::measure(options, &Lab::new(&run, &setup)?, &progress)?;
    print!("{text}");
    run.write("memory.txt", text)?;
    println!("{}", run.path().display());
    Ok(ExitCode::SUCCESS)
}

/// Measures, prints the results and writes `bench.json` and `bench.svg` to the run directory.
///
/// # Errors
///
/// Fails if the set-up cannot be made, a VM fails, or the baseline cannot be read.
pub fn main(options: &Options) -> Result<ExitCode> {
    if options.what == Some(What::Memory) {
        return measure_memory(options);
    }
    // Read first, before minutes are spent on measuring.
    let baseline = options.baseline.as_deref().map(Results::load).transpose()?;
    let progress = Progress::new(false);
    let run = RunDir::create(&runs(), "bench")?;
    let mut results = Results {
        format: FORMAT,
        rounds: options.rounds,
        seconds: options.seconds,
        machine: Machine::now(),
        ..Results::default()
    };
    if options.what != Some(What::Vms) {
        chain::measure(options.rounds, options.seconds, &run, &progress, &mut results)?;
    }
    if options.what != Some(What::Chain) && options.nested {
        nested::measure(options, &run, &progress, &mut results)?;
    } else if options.what != Some(What::Chain) {
        let setup = Setup::obtain(&options.setup, &Needs::default(), &progress)?;
        results.accelerator = Some(facts::Accelerator::from(&setup.accelerator));
        results.qemu = Some(setup.vmm(None)?.into());
        results.kernel = Some(facts::Kernel::from(setup.kernel(&KernelId::default())?));
        results.setup_stages = progress.stages();
        vms::measure(options, &Lab::new(&run, &setup)?, &progress, &mut results)?;
    }
    interrupt::check()?;
    results.machine.load_after = results::load();
    if let Some(baseline) = &baseline {
        results.compare(baseline);
    }
    let json = results.write(&run)?;
    run.write("bench.svg", plot::svg(&results))?;
    let text = format!("{}{}\n", table::text(&results), run.path().display());
    if options.json {
        eprint!("{text}");
        println!("{json}");
    } else {
        print!("{text}");
    }
    // A failure of what VVU is compared with is no failure of this run.
    let failed = results.skipped.iter().any(|skipped| skipped.what.starts_with(SUBJECT));
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
