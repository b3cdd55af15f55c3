//! The findings that the probe reports, and the speed that it wants.

use serde::{Deserialize, Serialize};

/// Least speed of a usable KVM as a fraction of the host's: hardware has about 1, emulation below 0.1.
pub(super) const LEAST_SPEED: f64 = 0.5;

/// A line that the probe writes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Finding {
    /// The probe begins this step; the steps before it have passed.
    Trying(String),
    /// The guest's speed as a fraction of the host's.
    Speed(f64),
    /// All steps have passed.
    Passed,
    /// The probe cannot go on, for this reason.
    Failed(String),
}
