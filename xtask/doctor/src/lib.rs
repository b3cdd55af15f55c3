//! `cargo xtask doctor`: what this machine has and lacks of what the runs need.

mod checks;
mod host;

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

/// Exit code if something is missing that the next run, or `--fix`, gets by itself.
const UNFINISHED: u8 = 1;
/// Exit code if something is missing that a person has to see to. 2 is for a doctor that could not work.
const BY_HAND: u8 = 3;

/// Options of `cargo xtask doctor`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Print the findings, and nothing else, on stdout as JSON
    #[arg(long)]
    json: bool,
    /// First do all that can be done: packages, QEMU, kernel, guest programs, cargo-nextest
    #[arg(long)]
    fix: bool,
}

/// Something that a run needs, or is better with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Requirement {
    /// Its name, which does not change.
    id: String,
    /// How it is met.
    status: Status,
    /// What was seen.
    evidence: String,
    /// What does not work, or works less well; none if it is met.
    consequence: Option<String>,
    /// What to do about it; none if it is met or nothing can be done.
    fix: Option<String>,
}

/// How a requirement is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// It is there.
    Ok,
    /// Everything works without it, but not as well.
    Worse,
    /// It is not there yet: the next run, or `--fix`, gets it.
    Unfinished,
    /// A person has to see to it.
    Missing,
}

/// What is printed with `--json`.
#[derive(Serialize)]
struct Findings<'a> {
    /// The worst of all.
    status: Status,
    requirements: &'a [Requirement],
}

/// Runs `cargo xtask doctor`. Exit code 0: ready; 1: something is missing that the next run or `--fix` gets;
/// 3: something is missing that a person has to see to.
///
/// # Errors
///
/// The machine cannot be looked at.
pub fn main(options: &Options) -> Result<ExitCode> {
    if options.fix {
        // What could not be done shows in the findings.
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

/// Does what can be done without a person.
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
        Status::Worse => "ready, though it could be better\n",
        Status::Unfinished => {
            "not ready yet: the next run gets what is missing, or `cargo xtask doctor --fix` now\n"
        }
        Status::Missing => "not ready: something is missing that a person has to see to\n",
    });
    text
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Worse => "worse",
            Self::Unfinished => "unfinished",
            Self::Missing => "missing",
        }
    }
}

#[cfg(test)]
mod tests;
