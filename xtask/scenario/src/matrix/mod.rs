//! `cargo xtask e2e SCENARIO --matrix`: runs variants of a scenario, which are made from data, and reports on all.

mod cells;
mod cover;
mod junit;
mod page;
mod results;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use vvu_process::progress::Progress;
use vvu_testvm::facts::Outcome;
use vvu_testvm::{RunDir, runs};

pub use cover::Coverage;
use results::{AxisNames, CellResult, Results};

use crate::format::{Matrix, Scenario};
use crate::report::{exit_code, tell, worst};
use crate::run::{RunOptions, run_all};

/// The report on all cells.
const RESULTS: &str = "matrix.json";
const JUNIT: &str = "junit.xml";
const PAGE: &str = "matrix.html";
/// The scenario of a cell, in its directory.
const SCENARIO: &str = "scenario.json";

/// Runs the cells that `coverage` chooses from the matrix of the one scenario in `names`.
///
/// # Errors
///
/// Fails if there is no such matrix, a cell is no valid scenario, or a report cannot be written.
pub(crate) fn main(
    dir: &Path,
    names: &[String],
    coverage: Coverage,
    options: &RunOptions,
) -> Result<ExitCode> {
    let [name] = names else { bail!("--matrix: want one scenario") };
    let (matrix, cells) = Matrix::load(dir, name, coverage, |scenario| options.apply(scenario))?;
    let started = Instant::now();
    let run = RunDir::create(&runs(), &format!("matrix-{name}"))?;
    let scenarios: Vec<Scenario> = cells.iter().map(|cell| cell.scenario.clone()).collect();
    let mut results = Results {
        scenario: name.clone(),
        result: Outcome::Error,
        coverage: coverage.describe().to_owned(),
        seconds: 0.0,
        axes: matrix.axes.iter().map(AxisNames::of).collect(),
        impossible: matrix.impossible.clone(),
        set_up: Vec::new(),
        cells: cells
            .iter()
            .map(|cell| CellResult::planned(&cell.scenario, matrix.names(&cell.values)))
            .collect(),
    };
    let texts = cells.iter().map(|cell| (cell.scenario.name.as_str(), cell.text.as_str()));
    let texts: std::collections::BTreeMap<_, _> = texts.collect();
    let create = |scenario: &Scenario| {
        let part = run.part(&scenario.name)?;
        part.write(SCENARIO, texts.get(scenario.name.as_str()).context("a cell has a scenario")?)?;
        Ok(part)
    };
    let ran = run_all(&scenarios, create, options, &Progress::new(false))?;
    results.result = worst(&ran.reports);
    results.seconds = started.elapsed().as_secs_f64();
    results.take(ran.reports, ran.common);

    let json = serde_json::to_string_pretty(&results).context("cannot write the report")?;
    run.write(RESULTS, &json)?;
    run.write(JUNIT, junit::document(&results)?)?;
    run.write(PAGE, page::document(&results))?;
    tell(&format!("{}{}\n", results.table(), run.file(PAGE).display()), options.json);
    if options.json {
        println!("{json}");
    }
    if results.result == Outcome::Pass {
        run.prune(name, RESULTS);
    }
    Ok(exit_code(results.result))
}
