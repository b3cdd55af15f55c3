//! Reports of runs: `report.json`, the same for people, and `replay.sh`.

mod human;
mod publish;
mod record;
mod replay;

pub use human::{summary, table, verdict};
pub use publish::{exit_code, publish, tell};
pub use record::{Check, CheckResult, Report, Reports, Totals, worst};
pub use replay::{Part, by_hand, replay_script};

#[cfg(test)]
#[path = "report_test.rs"]
mod tests;
