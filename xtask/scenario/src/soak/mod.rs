//! `cargo xtask soak`: random faults on random topologies, as scenarios that `cargo xtask e2e --scenario-file` runs as well.

mod course;
mod minimise;
mod scenario;
#[cfg(test)]
#[path = "soak_test.rs"]
mod tests;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vvu_process::progress::Progress;
use vvu_testvm::facts::Outcome;
use vvu_testvm::{RunDir, SetupOptions, runs};

use crate::format::Scenario;
use crate::report::{Report, exit_code};
use crate::run::{RunOptions, run_all};
use course::Course;
use minimise::minimise;
use scenario::VERIFIED;

/// The scenario of a run, in the run's directory.
const SCENARIO: &str = "scenario.json";
/// The smallest scenario that is known to fail.
const MINIMAL: &str = "minimal.json";

/// Options of `cargo xtask soak`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Minutes during which runs begin, and those to make a run that fails smaller
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    minutes: u64,
    /// Seed of the first run; the next runs have the next seeds [default: random]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    #[command(flatten)]
    setup: SetupOptions,
}

/// The sum of the runs that passed.
#[derive(Debug, Default, PartialEq)]
struct Totals {
    runs: usize,
    faults: usize,
    verified: f64,
}

impl Totals {
    fn add(&mut self, course: &Course, report: &Report) {
        self.runs += 1;
        self.faults += course.fault_count();
        self.verified += report.measurements.get(VERIFIED).copied().unwrap_or_default();
    }
}

/// Runs one random course after the other until the time is over or one fails.
///
/// # Errors
///
/// Fails if a run directory cannot be written.
pub fn main(options: &Options) -> Result<ExitCode> {
    let limit = Duration::from_secs(60 * options.minutes);
    // It is part of names, so it is kept short.
    let first = options.seed.unwrap_or_else(|| fastrand::u64(..1_000_000_000));
    let dir = RunDir::create(&runs(), "soak")?;
    let soak = Soak { options, dir: &dir };
    let (began, mut totals) = (Instant::now(), Totals::default());
    for seed in (0..).map(|number| first.wrapping_add(number)) {
        let course = Course::random(seed);
        let report = soak.run(&course, &course.name())?;
        match report.result {
            Outcome::Pass => totals.add(&course, &report),
            Outcome::Interrupted => return Ok(exit_code(Outcome::Interrupted)),
            Outcome::Fail | Outcome::Error => {
                let faults = course.fault_count();
                let minimal = soak.shrink(course, limit)?;
                dir.write(MINIMAL, minimal.to_text())?;
                tell(&totals, began);
                eprintln!(
                    "seed {seed} failed: `cargo xtask soak --seed {seed}` begins with it. {} of its {faults} faults are left \
                     in {}, which `cargo xtask e2e --scenario-file` runs",
                    minimal.fault_count(),
                    dir.file(MINIMAL).display()
                );
                return Ok(exit_code(report.result));
            }
        }
        if began.elapsed() >= limit {
            break;
        }
    }
    tell(&totals, began);
    Ok(exit_code(Outcome::Pass))
}

fn tell(Totals { runs, faults, verified }: &Totals, began: Instant) {
    let seconds = began.elapsed().as_secs();
    eprintln!("{runs} runs passed in {seconds} s: {faults} faults, {verified} blocks verified, none bad");
}

/// What all runs have in common.
struct Soak<'a> {
    options: &'a Options,
    dir: &'a RunDir,
}

impl Soak<'_> {
    /// Makes a course that failed smaller. No run of that begins after `limit`.
    fn shrink(&self, course: Course, limit: Duration) -> Result<Course> {
        let deadline = Instant::now() + limit;
        let mut number = 0;
        minimise(course, |smaller| {
            if Instant::now() >= deadline {
                return Ok(None);
            }
            number += 1;
            Ok(match self.run(smaller, &format!("smaller-{number}"))?.result {
                Outcome::Interrupted => None,
                result => Some(result != Outcome::Pass),
            })
        })
    }

    /// Runs a course in the directory `name`, which gets its scenario.
    fn run(&self, course: &Course, name: &str) -> Result<Report> {
        let text = course.to_text();
        let scenario = Scenario::parse(&text, Path::new(".")).context("a course is a scenario")?;
        // Each report has the stages of its own run.
        let progress = Progress::new(false);
        progress.note(format!("{name}: {}", scenario.description));
        let options = RunOptions { setup: self.options.setup.clone(), ..RunOptions::default() };
        let create = |_: &Scenario| {
            let part = self.dir.part(name)?;
            part.write(SCENARIO, &text)?;
            Ok(part)
        };
        let ran = run_all(std::slice::from_ref(&scenario), create, &options, &progress)?;
        ran.reports.into_iter().next().context("a run has a report")
    }
}
