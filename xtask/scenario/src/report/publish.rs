//! Publishes reports: in the run directory, on the terminal and as the exit code.

use std::process::ExitCode;

use anyhow::{Context, Result};
use vvu_process::interrupt;
use vvu_process::text::printable;
use vvu_testvm::RunDir;
use vvu_testvm::facts::Outcome;

use super::human::table;
use super::record::Report;

/// The report's name in a run directory.
const REPORT: &str = "report.json";

/// Writes `report` into its run directory, prints it for people and, if it passed, removes old runs of the scenario.
///
/// # Errors
///
/// Fails if the report cannot be written.
pub fn publish(report: &Report, run: &RunDir, json: bool) -> Result<()> {
    run.write(REPORT, serde_json::to_vec_pretty(report).context("cannot write the report")?)?;
    if let Some(error) = &report.error {
        eprintln!("error: {}", printable(error));
    }
    tell(&format!("{}{}\n", table(report), run.path().display()), json);
    if report.result == Outcome::Pass {
        run.prune(&report.scenario, REPORT);
    }
    Ok(())
}

/// Prints `text` for people: to stderr if stdout is for JSON alone.
pub fn tell(text: &str, json: bool) {
    if json { eprint!("{text}") } else { print!("{text}") }
}

/// The exit code of this program for an outcome.
#[must_use]
pub fn exit_code(outcome: Outcome) -> ExitCode {
    match outcome {
        Outcome::Pass => ExitCode::SUCCESS,
        Outcome::Fail => ExitCode::from(1),
        Outcome::Error => ExitCode::from(2),
        Outcome::Interrupted => interrupt::exit_code(),
    }
}
