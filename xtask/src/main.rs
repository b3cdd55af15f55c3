//! `cargo xtask`: builds the guests, runs the VMs and proves VVU end to end.

mod test;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use vvu_artifacts::accel::{PROBE_COMMAND, serve_probe};
use vvu_artifacts::cache::Cache;
use vvu_artifacts::kernel::{Kernel, KernelOptions};
use vvu_process::progress::Progress;
use vvu_process::{children, interrupt};
use vvu_scenario::{compatibility, run, tool};
use vvu_testvm::rundir::runs;

/// Builds the guests, runs the VMs and proves VVU end to end.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run scenarios in VMs
    E2e(run::Options),
    /// Check scenario files, or rewrite those of the old format
    #[command(subcommand)]
    Scenario(tool::Task),
    /// Run one VM in this terminal, with a shell on its console
    #[command(subcommand)]
    Vm(vvu_manual::Role),
    /// Run all tests: units, the chain without VMs, faults and scenarios
    Test(test::Options),
    /// Tell what this machine has and lacks of what the runs need
    Doctor(vvu_doctor::Options),
    /// Measure what VVU costs
    Bench(vvu_bench::Options),
    /// Get or build the guest kernel
    Kernel(KernelOptions),
    /// Write the table of back-ends in docs/compatibility.md from the last runs
    Compatibility,
    /// Remove the cache and the run directories
    Clean,
    #[command(name = PROBE_COMMAND, hide = true)]
    AccelProbe,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = run(&cli);
    if children::interrupted() {
        eprintln!("interrupted");
        return interrupt::exit_code();
    }
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::from(2)
    })
}

fn run(cli: &Cli) -> Result<ExitCode> {
    // The probe is a process that its parent kills.
    if !matches!(cli.task, Task::AccelProbe) {
        interrupt::listen()?;
    }
    match &cli.task {
        Task::E2e(options) => return run::main(options),
        Task::Bench(options) => return vvu_bench::main(options),
        Task::Vm(role) => return vvu_manual::main(role),
        Task::Doctor(options) => return vvu_doctor::main(options),
        Task::Test(options) => test::main(options)?,
        Task::Kernel(options) => {
            let progress = Progress::new(false);
            let kernel = Kernel::obtain(&progress, &Cache::open(&progress)?, options)?;
            println!("{}", kernel.vmlinux.display());
        }
        Task::Scenario(task) => tool::main(task)?,
        Task::Compatibility => compatibility::main()?,
        Task::Clean => clean()?,
        Task::AccelProbe => serve_probe()?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Removes what runs and downloads have left.
fn clean() -> Result<()> {
    let freed = Cache::open(&Progress::new(true))?.clean()?;
    let runs = runs();
    if runs.exists() {
        std::fs::remove_dir_all(&runs).with_context(|| format!("cannot remove {}", runs.display()))?;
    }
    println!("{} MiB of cache and {} removed", freed >> 20, runs.display());
    Ok(())
}
