//! The results of a matrix: `matrix.json`, and a table of it.

use std::fmt::Write;

use serde::Serialize;

use crate::format::{Axis, Impossible, Scenario};
use crate::report::{Report, verdict};
use vvu_process::progress::StageTime;
use vvu_testvm::facts::Outcome;

/// All of it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Results {
    /// Name of the scenario that was varied.
    pub(super) scenario: String,
    /// The worst result of a cell.
    pub(super) result: Outcome,
    /// Which cells there are, in words.
    pub(super) coverage: String,
    /// The whole run.
    pub(super) seconds: f64,
    /// The axes that were varied.
    pub(super) axes: Vec<AxisNames>,
    /// Values that do not occur together, and why.
    pub(super) impossible: Vec<Impossible>,
    /// Stages of the set-up, before the first cell.
    pub(super) set_up: Vec<StageTime>,
    /// The cells in the order they ran.
    pub(super) cells: Vec<CellResult>,
}

/// An axis.
#[derive(Debug, Clone, Serialize)]
pub(super) struct AxisNames {
    /// Name of the axis.
    pub(super) name: String,
    /// Names of the values; the first is the default.
    pub(super) values: Vec<String>,
}

/// A cell.
#[derive(Debug, Clone, Serialize)]
pub(super) struct CellResult {
    /// Name of its scenario, and of its directory beside the report.
    pub(super) name: String,
    /// Name of the cell's value on each axis.
    pub(super) values: Vec<String>,
    /// The report on the cell without the stages of the set-up; `null` if it was not run.
    pub(super) report: Option<Report>,
}

impl AxisNames {
    /// The names in `axis`.
    pub(super) fn of(axis: &Axis) -> Self {
        Self { name: axis.name.clone(), values: axis.values.iter().map(|value| value.name.clone()).collect() }
    }
}

impl CellResult {
    /// A cell that has not run yet.
    pub(super) fn planned(scenario: &Scenario, values: Vec<String>) -> Self {
        Self { name: scenario.name.clone(), values, report: None }
    }

    /// How it went; `None` if it was not run.
    pub(super) fn result(&self) -> Option<Outcome> {
        self.report.as_ref().map(|report| report.result)
    }

    /// How it went, in words.
    pub(super) fn verdict(&self) -> &'static str {
        self.result().map_or("not run", verdict)
    }

    /// Seconds from the begin of the first stage of the cell to the end of the last.
    pub(super) fn seconds(&self) -> Option<f64> {
        let stages = &self.report.as_ref()?.stages;
        let end = stages.iter().map(|stage| stage.began + stage.seconds).fold(f64::NAN, f64::max);
        (!stages.is_empty()).then(|| end - self.began())
    }

    /// When its first stage began.
    pub(super) fn began(&self) -> f64 {
        let stages = self.report.iter().flat_map(|report| &report.stages);
        stages.map(|stage| stage.began).fold(f64::NAN, f64::min)
    }

    /// From the launch of its first VM to the disk in the sibling VM.
    pub(super) fn launch_to_vda(&self) -> Option<f64> {
        self.report.as_ref()?.totals.launch_to_vda_seconds
    }

    /// Each axis with this cell's value.
    pub(super) fn on<'a>(&'a self, axes: &'a [AxisNames]) -> impl Iterator<Item = (&'a AxisNames, &'a str)> {
        axes.iter().zip(self.values.iter().map(String::as_str))
    }
}

impl Results {
    /// Takes the cells' reports, whose first `common` stages are those of the set-up.
    pub(super) fn take(&mut self, reports: Vec<Report>, common: usize) {
        for (cell, mut report) in self.cells.iter_mut().zip(reports) {
            let own = report.stages.split_off(common.min(report.stages.len()));
            self.set_up = std::mem::replace(&mut report.stages, own);
            cell.report = Some(report);
        }
    }

    /// How many cells passed.
    pub(super) fn passed(&self) -> usize {
        self.cells.iter().filter(|cell| cell.result() == Some(Outcome::Pass)).count()
    }

    /// A line for each cell, and the sum.
    pub(super) fn table(&self) -> String {
        let head = ["cell".to_owned()].into_iter().chain(self.axes.iter().map(|axis| axis.name.clone()));
        let head = head.chain(["result", "seconds", "to /dev/vda"].map(str::to_owned)).collect();
        let mut rows: Vec<Vec<String>> = vec![head];
        let number = |seconds: Option<f64>| seconds.map_or("-".to_owned(), |seconds| format!("{seconds:.1}"));
        for cell in &self.cells {
            let mut row = vec![cell.name.clone()];
            row.extend(cell.values.iter().cloned());
            row.extend([cell.verdict().to_owned(), number(cell.seconds()), number(cell.launch_to_vda())]);
            rows.push(row);
        }
        let width = |column: usize| {
            rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..self.axes.len() + 4).map(width).collect();
        let mut text = String::from("\n");
        for row in &rows {
            let mut line = String::new();
            for (column, (entry, width)) in row.iter().zip(&widths).enumerate() {
                // The last two are numbers.
                let _ = if column + 2 < widths.len() {
                    write!(line, "{entry:width$}  ")
                } else {
                    write!(line, "{entry:>width$}  ")
                };
            }
            let _ = writeln!(text, "{}", line.trim_end());
        }
        let _ = writeln!(
            text,
            "{} of {} cells passed in {:.1} s: {}",
            self.passed(),
            self.cells.len(),
            self.seconds,
            self.coverage
        );
        for Impossible { values, because } in &self.impossible {
            let values: Vec<_> = values.iter().map(|(axis, value)| format!("{axis} {value}")).collect();
            let _ = writeln!(text, "left out: {}: {because}", values.join(" with "));
        }
        text
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::report::{Check, CheckResult};

    /// Three cells: one passed, one failed with `evidence`, one that was not run.
    pub(in super::super) fn sample(evidence: &str) -> Results {
        let stage = |name: &str, began: f64, seconds: f64| StageTime { name: name.into(), began, seconds };
        let report = |result, evidence: &str, began: f64| Report {
            scenario: "block".into(),
            result,
            stages: vec![
                stage("qemu", 0.0, 2.0),
                stage("image", began, 1.0),
                stage("vda-appears", began + 1.5, 2.0),
            ],
            checks: vec![Check {
                name: "vda-appears".into(),
                result: if result == Outcome::Pass { CheckResult::Pass } else { CheckResult::Fail },
                evidence: evidence.into(),
            }],
            totals: crate::report::Totals {
                seconds: 9.0,
                launch_to_vda_seconds: Some(2.25),
                ..Default::default()
            },
            ..Report::default()
        };
        let cell = |name: &str, value: &str| CellResult {
            name: name.into(),
            values: vec![value.into()],
            report: None,
        };
        let mut results = Results {
            scenario: "block".into(),
            result: Outcome::Fail,
            coverage: "every combination".into(),
            seconds: 20.0,
            axes: vec![AxisNames { name: "iommu".into(), values: vec!["virtio".into(), "amd".into()] }],
            impossible: vec![Impossible {
                values: [("iommu".into(), "none".into()), ("vm".into(), "x".into())].into(),
                because: "of <that>".into(),
            }],
            set_up: Vec::new(),
            cells: vec![cell("block-01", "virtio"), cell("block-02", "amd"), cell("block-03", "amd")],
        };
        let reports = vec![report(Outcome::Pass, "[vda] 1", 3.0), report(Outcome::Fail, evidence, 10.0)];
        results.take(reports, 1);
        results
    }

    #[test]
    fn the_set_up_is_told_once_and_each_cell_has_its_own_time() {
        let results = sample("no disk");
        assert_eq!(results.set_up.len(), 1);
        assert_eq!(results.cells[0].seconds(), Some(3.5));
        assert_eq!(results.cells[1].began(), 10.0);
        assert_eq!(results.cells[2].seconds(), None);
        let json = serde_json::to_value(&results).expect("JSON");
        assert_eq!(json["cells"][1]["report"]["checks"][0]["evidence"], "no disk");
        assert_eq!(json["cells"][2]["report"], serde_json::Value::Null);
        assert_eq!((&json["scenario"], &json["result"]), (&"block".into(), &"fail".into()));
    }

    #[test]
    fn the_table_has_a_line_for_each_cell() {
        let want = "
cell      iommu   result   seconds  to /dev/vda
block-01  virtio  passed       3.5          2.2
block-02  amd     FAILED       3.5          2.2
block-03  amd     not run        -            -
1 of 3 cells passed in 20.0 s: every combination
left out: iommu none with vm x: of <that>
";
        assert_eq!(sample("").table(), want);
    }
}
