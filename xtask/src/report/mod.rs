//! What a run reports: `report.json`, and the same for people.
//!
//! The keys are described in `scenarios/README.md` and do not change.

mod human;
mod replay;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(crate) use human::{summary, table, verdict};
pub(crate) use replay::{Part, by_hand, command_line, replay_script};

use crate::progress::StageTime;

/// The report of one scenario.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Name of the scenario.
    pub(crate) scenario: String,
    /// How it went as a whole.
    pub(crate) result: Outcome,
    /// Why it could not run, or `null`.
    pub(crate) error: Option<String>,
    /// What ran the VMs' code; `null` if it was not chosen yet.
    pub(crate) accelerator: Option<Accelerator>,
    /// The QEMU used.
    pub(crate) qemu: Option<Qemu>,
    /// The QEMUs of the VMs that name their own, by VM.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub(crate) qemus: BTreeMap<String, Qemu>,
    /// The guest kernel used.
    pub(crate) kernel: Option<Kernel>,
    /// What took how long, in the order it ended.
    pub(crate) stages: Vec<StageTime>,
    /// What was checked, in the scenario's order.
    pub(crate) checks: Vec<Check>,
    /// Numbers that the scenario's steps gave, by name.
    pub(crate) measurements: BTreeMap<String, f64>,
    /// Sums.
    pub(crate) totals: Totals,
    /// The VM in which all this ran (`--nested`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) outer: Option<Outer>,
}

/// The VM in which a nested run took place.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outer {
    /// What ran its code.
    pub(crate) accelerator: Accelerator,
    /// The QEMU used.
    pub(crate) qemu: Qemu,
    /// Its kernel, which has KVM.
    pub(crate) kernel: Kernel,
    /// What took how long outside, in the order it ended.
    pub(crate) stages: Vec<StageTime>,
    /// The whole run.
    pub(crate) seconds: f64,
}

/// How a run went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    /// Every check passed.
    Pass,
    /// A check failed.
    Fail,
    /// It could not run.
    #[default]
    Error,
    /// It was interrupted.
    Interrupted,
}

/// What ran the VMs' code.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Accelerator {
    /// `kvm` or `tcg`.
    pub(crate) used: String,
    /// Why this one.
    pub(crate) reason: String,
}

impl From<&crate::accel::Accelerator> for Accelerator {
    fn from(accelerator: &crate::accel::Accelerator) -> Self {
        Self { used: accelerator.kind.to_string(), reason: accelerator.reason.clone() }
    }
}

/// The QEMU used.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Qemu {
    /// Its binary.
    pub(crate) path: PathBuf,
    /// As it tells it.
    pub(crate) version: String,
}

impl From<&crate::qemu::Qemu> for Qemu {
    fn from(qemu: &crate::qemu::Qemu) -> Self {
        Self { path: qemu.path.clone(), version: qemu.version.clone() }
    }
}

/// The guest kernel used.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Kernel {
    /// Its release, such as `6.12.117`.
    pub(crate) version: String,
    /// SHA-256 of its resolved configuration.
    pub(crate) config_digest: String,
}

impl From<&crate::kernel::Kernel> for Kernel {
    fn from(kernel: &crate::kernel::Kernel) -> Self {
        Self { version: kernel.version.clone(), config_digest: kernel.config_digest.clone() }
    }
}

/// One thing that was checked.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Check {
    /// Its name in the scenario.
    pub(crate) name: String,
    /// How it went.
    pub(crate) result: CheckResult,
    /// What was seen, or why it failed.
    pub(crate) evidence: String,
}

/// How a check went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum CheckResult {
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
pub(crate) struct Totals {
    /// The whole run.
    pub(crate) seconds: f64,
    /// From the launch of the first VM until the check `vda-appears` passed.
    pub(crate) launch_to_vda_seconds: Option<f64>,
    /// Launch of one VM with the same kernel and initramfs until the first line of its init (`--measure`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) bare_boot_seconds: Option<f64>,
    /// `launch_to_vda_seconds` over `bare_boot_seconds` (`--measure`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) ratio_to_bare_boot: Option<f64>,
}

/// The reports of several scenarios, as `e2e --all --json` prints them.
#[derive(Debug, Serialize)]
pub(crate) struct Reports {
    /// One for each scenario.
    pub(crate) scenarios: Vec<Report>,
}

impl Report {
    /// The whole outcome that the checks amount to.
    pub(crate) fn judge(&self) -> Outcome {
        let passed =
            !self.checks.is_empty() && self.checks.iter().all(|check| check.result == CheckResult::Pass);
        if passed { Outcome::Pass } else { Outcome::Fail }
    }
}

#[cfg(test)]
mod tests;
