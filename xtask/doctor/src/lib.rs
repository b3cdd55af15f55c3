//! `cargo xtask doctor`: checks that this machine can run the VMs.

mod checks;
mod host;
mod requirement;

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use serde::Serialize;
use vvu_artifacts::cache::Cache;
use vvu_artifacts::kernel;
use vvu_artifacts::packages;
use vvu_process::logged;
use vvu_process::progress::Progress;
use vvu_testvm::{Needs, Setup, SetupOptions};

use host::Host;
use requirement::{Requirement, Status};

/// Exit code if the next run, or `--fix`, sees to everything that is missing.
const UNFINISHED: u8 = 1;
/// Exit code if a person has to see to something. 2 is the exit code of a doctor that fails itself.
const BY_HAND: u8 = 3;

/// Options of `cargo xtask doctor`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Print the findings as JSON, and nothing else, on stdout
    #[arg(long)]
    json: bool,
    /// First repair what can be repaired: packages, QEMU, kernel, guest programs, cargo-nextest
    #[arg(long)]
    fix: bool,
}

/// The output of `--json`.
#[derive(Serialize)]
struct Findings<'a> {
    /// The worst status.
    status: Status,
    requirements: &'a [Requirement],
}

/// Runs `cargo xtask doctor`. The exit code is 0 if the machine is ready, 1 if the next run or `--fix` sees to what is
/// missing, and 3 if a person has to.
///
/// # Errors
///
/// Fails if the cache cannot be read.
pub fn main(options: &Options) -> Result<ExitCode> {
    if options.fix {
        // The findings show what is still missing.
        if let Err(error) = fix() {
            eprintln!("error: {error:#}");
        }
    }
    let requirements = checks::all(&Host::this()?);
    let status = requirements.iter().map(|requirement| requirement.status).max().unwrap_or(Status::Ok);
    if options.json {
        let findings = Findings { status, requirements: &requirements };
        println!("{}", serde_json::to_string_pretty(&findings).context("cannot write the findings")?);
    } else {
        print!("{}", text(&requirements, status));
    }
    Ok(match status {
        Status::Ok | Status::Worse => ExitCode::SUCCESS,
        Status::Unfinished => ExitCode::from(UNFINISHED),
        Status::Missing => ExitCode::from(BY_HAND),
    })
}

/// Repairs what needs no person.
fn fix() -> Result<()> {
    let progress = Progress::new(false);
    let cache = Cache::open(&progress)?;
    packages::ensure(&progress, &cache, &kernel::PACKAGES)?;
    let host = Host::this()?;
    let run = |name: &str, args: &[&str]| -> Result<()> {
        let stage = progress.stage(name);
        let mut command = Command::new(args[0]);
        command.args(&args[1..]);
        logged::run(command, &cache.dir("logs")?.join(format!("{name}.log")), |line| {
            stage.update(line.trim())
        })?;
        stage.done(args.join(" "));
        Ok(())
    };
    if !checks::has_target(&host) && host.program("rustup").is_some() {
        run("rust-target", &["rustup", "target", "add", checks::target_triple(&host)])?;
    }
    if !checks::has_nextest(&host) {
        run("nextest", &["cargo", "install", "cargo-nextest", "--locked"])?;
    }
    Setup::obtain(&SetupOptions::default(), &Needs::default(), &progress).map(drop)
}

fn text(requirements: &[Requirement], status: Status) -> String {
    let mut text = String::new();
    let width = requirements.iter().map(|requirement| requirement.id.len()).max().unwrap_or_default();
    for Requirement { id, status, evidence, consequence, fix } in requirements {
        text.push_str(&format!("{:<11} {id:<width$}  {evidence}\n", status.word()));
        for (label, line) in [("so", consequence), ("fix", fix)] {
            if let Some(line) = line {
                text.push_str(&format!("{:<11} {:<width$}  {label}: {line}\n", "", ""));
            }
        }
    }
    text.push_str(match status {
        Status::Ok => "ready\n",
        Status::Worse => "ready, but some things could be better\n",
        Status::Unfinished => {
            "not ready yet: the next run sees to what is missing, or `cargo xtask doctor --fix` now\n"
        }
        Status::Missing => "not ready: you have to see to what is missing\n",
    });
    text
}

#[cfg(test)]
#[path = "doctor_test.rs"]
mod tests;
