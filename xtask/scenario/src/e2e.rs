//! `cargo xtask e2e`: chooses scenarios and how to run them.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use vvu_artifacts::workspace;
use vvu_process::progress::Progress;
use vvu_testvm::{RunDir, runs};

use crate::format::{self, Scenario};
use crate::matrix::{self, Coverage};
use crate::nested;
use crate::report::{self, Report, Reports, exit_code, tell, worst};
use crate::run::{RunOptions, run_all};

/// Options of `cargo xtask e2e`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Scenarios to run; --list shows them
    #[arg(value_name = "SCENARIO", required_unless_present_any = ["all", "list", "scenario_file"])]
    scenarios: Vec<String>,
    /// Run every scenario
    #[arg(long, conflicts_with_all = ["scenarios", "scenario_file"])]
    all: bool,
    /// List the scenarios
    #[arg(long)]
    list: bool,
    /// Run a scenario file of your own
    #[arg(long, value_name = "FILE", conflicts_with = "scenarios")]
    scenario_file: Option<PathBuf>,
    /// Run variants of the scenario from scenarios/matrix: `pairs` covers all pairs of values, `each` changes one value
    /// at a time, `all` is every combination
    #[arg(long, value_name = "SET", num_args = 0..=1, require_equals = true, default_missing_value = "pairs")]
    #[arg(conflicts_with_all = ["all", "list", "scenario_file", "nested", "prepared"])]
    matrix: Option<Coverage>,
    /// Run the scenario with KVM in a VM whose CPU QEMU emulates, on a machine without KVM
    #[arg(long)]
    #[arg(conflicts_with_all = [
        "prepared", "overlay", "program", "variables", "measure", "accel", "qemu", "file", "package", "quick",
        "keep", "interactive",
    ])]
    nested: bool,
    #[command(flatten)]
    run: RunOptions,
}

/// Runs `cargo xtask e2e`.
///
/// # Errors
///
/// Fails if a scenario does not exist or the set-up cannot be made.
pub fn main(options: &Options) -> Result<ExitCode> {
    let dir = workspace().join("scenarios");
    if options.list {
        for scenario in format::list(&dir)?.values() {
            println!("{:26} {}", scenario.name, scenario.description);
        }
        return Ok(ExitCode::SUCCESS);
    }
    options.run.check()?;
    if let Some(coverage) = options.matrix {
        return matrix::main(&dir, &options.scenarios, coverage, &options.run);
    }
    let mut scenarios = match &options.scenario_file {
        Some(file) => vec![Scenario::load(file)?],
        None if options.all => format::list(&dir)?.into_values().collect(),
        None => options.scenarios.iter().map(|name| format::find(&dir, name)).collect::<Result<_>>()?,
    };
    for scenario in &mut scenarios {
        options.run.apply(scenario)?;
    }
    let progress = Progress::new(false);
    let json = options.run.json;
    let reports: Vec<Report> = if options.nested {
        let file = |scenario: &Scenario| {
            let named = options.scenario_file.clone();
            named.unwrap_or_else(|| dir.join(format!("{}.json", scenario.name)))
        };
        nested::run_all(&scenarios, file, &options.run.setup, json, &progress)?
    } else {
        // Each directory exists from the first moment, so that a failure of the set-up has a report as well.
        let create = |scenario: &Scenario| RunDir::create(&runs(), &scenario.name);
        run_all(&scenarios, create, &options.run, &progress)?.reports
    };
    if reports.len() > 1 {
        tell(&report::summary(&reports), json);
    }
    let worst = worst(&reports);
    if json {
        print_json(reports, options.all)?;
    }
    Ok(exit_code(worst))
}

/// Prints one report by itself, and several, or those of `--all`, in a list.
fn print_json(mut reports: Vec<Report>, all: bool) -> Result<()> {
    let text = match reports.pop() {
        Some(report) if !all && reports.is_empty() => serde_json::to_string_pretty(&report),
        last => {
            reports.extend(last);
            serde_json::to_string_pretty(&Reports { scenarios: reports })
        }
    };
    println!("{}", text.context("cannot write the report")?);
    Ok(())
}
