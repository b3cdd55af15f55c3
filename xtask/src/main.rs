//! `cargo xtask`: builds the guests, runs the VMs and proves VVU end to end.

mod apt;
mod cache;
mod children;
mod console;
mod control;
mod e2e;
mod image;
mod interrupt;
mod leftover;
mod logged;
mod packages;
mod progress;
mod qemu;
mod report;
mod rundir;
mod scenario;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

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
    interrupt::listen()?;
    match &cli.task {
        Task::E2e(options) => e2e::main(options),
    }
}
