//! `cargo xtask`: builds the guests, runs the VMs and proves VVU end to end.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use vvu_artifacts::accel::{PROBE_COMMAND, serve_probe};
use vvu_artifacts::cache::Cache;
use vvu_artifacts::kernel::{Kernel, KernelOptions};
use vvu_process::interrupt;
use vvu_process::progress::Progress;
use vvu_scenario::{compatibility, e2e, soak, test, tool};
use vvu_testvm::clean;

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
    E2e(e2e::Options),
    /// Run random faults on random topologies, and make what fails small
    Soak(soak::Options),
    /// Check scenario files, or rewrite those of the old format
    #[command(subcommand)]
    Scenario(tool::Task),
    /// Run one VM in this terminal, with a shell on its console
    #[command(subcommand)]
    Vm(vvu_manual::Role),
    /// Run all tests: unit tests, the chain without VMs, and scenarios
    Test(test::Options),
    /// Check that this machine can run the VMs
    Doctor(vvu_doctor::Options),
    /// Measure what VVU costs
    Bench(vvu_bench::Options),
    /// Get or build the guest kernel
    Kernel(KernelOptions),
    /// Update the table of back-ends in docs/compatibility.md from the last runs
    Compatibility,
    /// Remove the cache and the run directories
    Clean,
    #[command(name = PROBE_COMMAND, hide = true)]
    AccelProbe,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = run(&cli);
    if interrupt::requested() {
        eprintln!("interrupted");
        return interrupt::exit_code();
    }
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::from(2)
    })
}

fn run(cli: &Cli) -> Result<ExitCode> {
    // The parent of the probe kills it.
    if !matches!(cli.task, Task::AccelProbe) {
        interrupt::listen()?;
    }
    match &cli.task {
        Task::E2e(options) => return e2e::main(options),
        Task::Soak(options) => return soak::main(options),
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
        Task::Clean => println!("{}", clean::all()?),
        Task::AccelProbe => serve_probe()?,
    }
    Ok(ExitCode::SUCCESS)
}
