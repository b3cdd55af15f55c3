//! The content of `report.json`.
//!
//! `scenarios/README.md` describes the keys; they do not change.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use vvu_process::interrupt;
use vvu_process::progress::StageTime;
use vvu_testvm::facts::{Accelerator, Kernel, Outcome, Outer, Qemu};

/// The report of one scenario.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the scenario.
    pub scenario: String,
    /// The result as a whole.
    pub result: Outcome,
    /// Why the scenario could not run, or `null`.
    pub error: Option<String>,
    /// The accelerator; `null` if the run ended before one was chosen.
    pub accelerator: Option<Accelerator>,
    /// The QEMU of the VMs that name none.
    pub qemu: Option<Qemu>,
    /// The QEMUs of the VMs that name one, by VM.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub qemus: BTreeMap<String, Qemu>,
    /// The kernel of the guests that name none.
    pub kernel: Option<Kernel>,
    /// The kernels of the VMs that name one, by VM.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub kernels: BTreeMap<String, Kernel>,
    /// The stages of the run in the order in which they ended.
    pub stages: Vec<StageTime>,
    /// The checks in the scenario's order.
    pub checks: Vec<Check>,
    /// Numbers that the scenario's steps measured, by name.
    pub measurements: BTreeMap<String, f64>,
    /// Totals.
    pub totals: Totals,
    /// The VM in which the scenario ran (`--nested`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub outer: Option<Outer>,
}

/// A check of a scenario.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Name of the check in the scenario.
    pub name: String,
    /// Result of the check.
    pub result: CheckResult,
    /// The output or value that the check saw, or the reason for its failure.
    pub evidence: String,
}

/// The result of a check.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckResult {
    /// Passed.
    Pass,
    /// Failed.
    Fail,
    /// Not reached.
    #[default]
    Skip,
}

/// Totals of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Duration of the whole run.
    pub seconds: f64,
    /// From the launch of the first VM until the check `vda-appears` passed.
    pub launch_to_vda_seconds: Option<f64>,
    /// From the launch of one VM with the same kernel and base image until the first line of its init (`--measure`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub bare_boot_seconds: Option<f64>,
    /// `launch_to_vda_seconds` divided by `bare_boot_seconds` (`--measure`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ratio_to_bare_boot: Option<f64>,
}

/// The reports of several scenarios, as `e2e --all --json` prints them.
#[derive(Debug, Serialize)]
pub struct Reports {
    /// One report for each scenario.
    pub scenarios: Vec<Report>,
}

impl Report {
    /// Sets the outcome of a run that ended with `result`.
    pub fn conclude(&mut self, result: Result<()>) {
        self.result = match result {
            _ if interrupt::requested() => Outcome::Interrupted,
            Ok(()) if self.error.is_some() => Outcome::Error,
            Ok(()) => self.judge(),
            Err(error) => {
                self.error = Some(format!("{error:#}"));
                Outcome::Error
            }
        };
    }

    /// The outcome that follows from the checks: it passed if there are checks and all have passed.
    #[must_use]
    pub fn judge(&self) -> Outcome {
        let passed =
            !self.checks.is_empty() && self.checks.iter().all(|check| check.result == CheckResult::Pass);
        if passed { Outcome::Pass } else { Outcome::Fail }
    }
}

impl Check {
    /// A check that passed with this evidence or failed with this error.
    pub fn of(name: &str, result: Result<String>) -> Self {
        let (result, evidence) = match result {
            Ok(evidence) => (CheckResult::Pass, evidence),
            Err(error) => (CheckResult::Fail, format!("{error:#}")),
        };
        Self { name: name.to_owned(), result, evidence }
    }
}

/// The worst outcome of the reports; a pass if there are none.
pub fn worst<'a>(reports: impl IntoIterator<Item = &'a Report>) -> Outcome {
    let severity = |outcome: &Outcome| match outcome {
        Outcome::Pass => 0,
        Outcome::Fail => 1,
        Outcome::Error => 2,
        Outcome::Interrupted => 3,
    };
    let outcomes = reports.into_iter().map(|report| report.result);
    outcomes.max_by_key(severity).unwrap_or(Outcome::Pass)
}
