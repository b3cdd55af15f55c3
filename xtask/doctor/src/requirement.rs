//! A requirement of the test VMs and how this machine meets it.

use serde::Serialize;

/// Something that a run needs or is better with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Requirement {
    /// Stable name for scripts.
    pub(super) id: String,
    /// How far it is met.
    pub(super) status: Status,
    /// The state of the machine that decides about the requirement.
    pub(super) evidence: String,
    /// The feature that is missing or slow; `None` if the requirement is met.
    pub(super) consequence: Option<String>,
    /// The remedy; `None` if the requirement is met or nothing can be done.
    pub(super) fix: Option<String>,
}

/// How far a requirement is met, from best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    /// It is met.
    Ok,
    /// Everything works without it, but less well.
    Worse,
    /// It is not met yet; the next run, or `--fix`, sees to it.
    Unfinished,
    /// It is not met, and a person has to see to it.
    Missing,
}

impl Requirement {
    /// A requirement that is met.
    pub(super) fn met(id: impl Into<String>, evidence: impl Into<String>) -> Self {
        Self { id: id.into(), status: Status::Ok, evidence: evidence.into(), consequence: None, fix: None }
    }

    /// A requirement that is not met. An empty `fix` means that nothing can be done.
    pub(super) fn unmet(
        id: impl Into<String>,
        status: Status,
        evidence: impl Into<String>,
        consequence: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        let fix = Some(fix.into()).filter(|fix: &String| !fix.is_empty());
        Self { status, consequence: Some(consequence.into()), fix, ..Self::met(id, evidence) }
    }
}

impl Status {
    /// The status in a word.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Worse => "worse",
            Self::Unfinished => "unfinished",
            Self::Missing => "missing",
        }
    }
}
