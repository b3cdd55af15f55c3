//! `cargo xtask`: builds the guests, runs the VMs and proves VVU end to end.

mod accel;
mod apt;
mod bench;
mod byhand;
mod cache;
mod children;
mod compatibility;
mod console;
mod control;
mod doctor;
mod e2e;
mod image;
mod interrupt;
mod kernel;
mod leftover;
mod logged;
mod packages;
mod progress;
mod qemu;
mod report;
mod rundir;
mod scenario;
mod test;
mod versions;
mod vm;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use cache::Cache;
use kernel::Kernel;
use progress::Progress;

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
    /// Run one VM in this terminal, with a shell on its console
    #[command(subcommand)]
    Vm(byhand::Role),
    /// Run all tests: units, the chain without VMs, faults and scenarios
    Test(test::Options),
    /// Tell what this machine has and lacks of what the runs need
    Doctor(doctor::Options),
    /// Measure what VVU costs
    Bench(bench::Options),
    /// Get or build the guest kernel
    Kernel(kernel::KernelOptions),
    /// Write the table of back-ends in docs/compatibility.md from the last runs
    Compatibility,
    /// Remove the cache and the run directories
    Clean,
    #[command(name = accel::PROBE_COMMAND, hide = true)]
    AccelProbe,
}

/// Reads `text` as a scenario file and tells whether it is one, for the fuzz target.
#[cfg(fuzzing)]
#[must_use]
pub fn is_scenario(text: &str) -> bool {
    scenario::Scenario::parse(text, std::path::Path::new(".")).is_ok()
}

/// Runs the command line.
pub fn main() -> ExitCode {
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
        Task::E2e(options) => return e2e::main(options),
        Task::Bench(options) => return bench::main(options),
        Task::Vm(role) => return byhand::main(role),
        Task::Doctor(options) => return doctor::main(options),
        Task::Test(options) => test::main(options)?,
        Task::Kernel(options) => {
            let progress = Progress::new(false);
            let kernel = Kernel::obtain(&progress, &Cache::open(&progress)?, options)?;
            println!("{}", kernel.vmlinux.display());
        }
        Task::Compatibility => compatibility::main()?,
        Task::Clean => clean()?,
        Task::AccelProbe => accel::serve_probe()?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Removes what runs and downloads have left.
fn clean() -> Result<()> {
    let freed = Cache::open(&Progress::new(true))?.clean()?;
    let runs = e2e::runs();
    if runs.exists() {
        std::fs::remove_dir_all(&runs).with_context(|| format!("cannot remove {}", runs.display()))?;
    }
    println!("{} MiB of cache and {} removed", freed >> 20, runs.display());
    Ok(())
}
