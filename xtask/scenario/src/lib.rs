//! End-to-end scenarios: their format, their runs and their reports.

pub mod compatibility;
pub mod e2e;
pub mod format;
pub mod matrix;
mod nested;
pub mod report;
pub mod run;
pub mod test;
pub mod tool;

/// Returns true if `text` is a valid scenario file of the current or the old format; for the fuzz target.
#[cfg(fuzzing)]
#[must_use]
pub fn is_scenario(text: &str) -> bool {
    format::Scenario::parse(text, std::path::Path::new(".")).is_ok() || format::upgraded(text).is_ok()
}
