//! What a run reports: `report.json`, and the same for people.
//!
//! The keys are described in `scenarios/README.md` and do not change.

mod human;
mod replay;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use human::{summary, table, verdict};
pub use replay::{Part, by_hand, replay_script};

use vvu_process::progress::StageTime;
use vvu_testvm::facts::{Accelerator, Kernel, Outcome, Outer, Qemu};

/// The report of one scenario.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the scenario.
    pub scenario: String,
    /// How it went as a whole.
    pub result: Outcome,
    /// Why it could not run, or `null`.
    pub error: Option<String>,
    /// What ran the VMs' code; `null` if it was not chosen yet.
    pub accelerator: Option<Accelerator>,
    /// The QEMU used.
    pub qemu: Option<Qemu>,
    /// The QEMUs of the VMs that name their own, by VM.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub qemus: BTreeMap<String, Qemu>,
    /// The guest kernel used.
    pub kernel: Option<Kernel>,
    /// What took how long, in the order it ended.
    pub stages: Vec<StageTime>,
    /// What was checked, in the scenario's order.
    pub checks: Vec<Check>,
    /// Numbers that the scenario's steps gave, by name.
    pub measurements: BTreeMap<String, f64>,
    /// Sums.
    pub totals: Totals,
    /// The VM in which all this ran (`--nested`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub outer: Option<Outer>,
}

/// One thing that was checked.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Its name in the scenario.
    pub name: String,
    /// How it went.
    pub result: CheckResult,
    /// What was seen, or why it failed.
    pub evidence: String,
}

/// How a check went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckResult {
    /// As wanted.
    Pass,
    /// Not as wanted.
    Fail,
    /// The run ended before.
    #[default]
    Skip,
}

/// Sums of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// The whole run.
    pub seconds: f64,
    /// From the launch of the first VM until the check `vda-appears` passed.
    pub launch_to_vda_seconds: Option<f64>,
    /// Launch of one VM with the same kernel and initramfs until the first line of its init (`--measure`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub bare_boot_seconds: Option<f64>,
    /// `launch_to_vda_seconds` over `bare_boot_seconds` (`--measure`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ratio_to_bare_boot: Option<f64>,
}

/// The reports of several scenarios, as `e2e --all --json` prints them.
#[derive(Debug, Serialize)]
pub struct Reports {
    /// One for each scenario.
    pub scenarios: Vec<Report>,
}

impl Report {
    /// The whole outcome that the checks amount to.
    pub fn judge(&self) -> Outcome {
        let passed =
            !self.checks.is_empty() && self.checks.iter().all(|check| check.result == CheckResult::Pass);
        if passed { Outcome::Pass } else { Outcome::Fail }
    }
}

#[cfg(test)]
mod tests;
