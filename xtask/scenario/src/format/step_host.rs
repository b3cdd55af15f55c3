//! The steps that are done on the host: to proxies, and to a VM's VMM while the VM runs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use vvu_testvm::Attack;

use super::message::ExpectedMessage;
use super::step::{Milestone, is_false};

/// An action on the proxy of a vvu device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProxyStep {
    /// The check that this step belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    /// The vvu device.
    pub vvu: String,
}

/// What a hostile VMM of the sibling VM does to the sibling memory file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TamperStep {
    /// The check that this step belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    /// The vvu device whose sibling's memory it is.
    pub vvu: String,
    /// What is done.
    pub attack: Attack,
}

/// A look at the messages of a vvu device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TraceStep {
    /// The check that this step belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    /// The vvu device.
    pub vvu: String,
    /// Messages that must be there in this order, with any others before, between and after them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expect: Vec<ExpectedMessage>,
    /// Regular expression that must match somewhere in the trace, one line of JSON for each message: for what
    /// `expect` cannot say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matches: Option<String>,
    /// Keeps the first capture group of `matches` (without a group, the whole match) as a placeholder of this name for
    /// later steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub save: Option<String>,
    /// Adds the saved number to the report's measurement of the same name.
    #[serde(default, skip_serializing_if = "is_false")]
    pub measure: bool,
}

/// The front-end of a vvu device that comes while its sibling VM runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachStep {
    /// The check that this step belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    /// The vvu device. Its back-end must be ready: the sibling VM may stand still until it answers.
    pub vvu: String,
    /// What the scenario has reached once this step is done; the report gives its time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub milestone: Option<Milestone>,
    /// Seconds allowed at native speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub timeout_s: Option<u64>,
}

/// The front-end of a vvu device that goes while its sibling VM runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DetachStep {
    /// The check that this step belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    /// The vvu device.
    pub vvu: String,
    /// Seconds allowed at native speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub timeout_s: Option<u64>,
}

/// A command to a VM's QEMU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QmpStep {
    /// The check that this step belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    /// The VM.
    pub vm: String,
    /// The command, such as `object-add`.
    pub execute: String,
    /// Its arguments. Their texts may have placeholders.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub arguments: Map<String, Value>,
    /// The answer that must come.
    #[serde(default, skip_serializing_if = "ExpectedReply::is_default")]
    pub expect: ExpectedReply,
    /// Name of an event that must come after the command was sent, such as `DEVICE_DELETED`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<String>,
    /// Seconds allowed at native speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub timeout_s: Option<u64>,
}

/// The answer to a QMP command.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExpectedReply {
    /// Regular expression that must match somewhere in the result, as JSON in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<String>,
    /// The command must fail, with a description in which this regular expression matches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl ExpectedReply {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
