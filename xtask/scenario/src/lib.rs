//! End-to-end scenarios: their format, their runs and their reports.

pub mod compatibility;
pub mod e2e;
pub mod format;
pub mod matrix;
mod nested;
pub mod report;
pub mod run;
pub mod soak;
pub mod test;
pub mod tool;
