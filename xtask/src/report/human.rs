//! The report for people: a table of checks, then where to look.

use std::fmt::Write;

use super::{CheckResult, Outcome, Report};

/// Evidence is cut to this many characters; all of it is in `report.json`.
const EVIDENCE_WIDTH: usize = 96;

/// The checks with their evidence and one line of sums.
pub(crate) fn table(report: &Report) -> String {
    let width = report.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in &report.checks {
        let mark = match check.result {
            CheckResult::Pass => "ok  ",
            CheckResult::Fail => "FAIL",
            CheckResult::Skip => "skip",
        };
        let failed = check.result == CheckResult::Fail;
        let evidence = if failed { indented(&check.evidence) } else { shortened(&check.evidence) };
        line(&mut text, format_args!("  {mark}  {:width$}  {evidence}", check.name));
    }
    let result = match report.result {
        Outcome::Pass => "passed",
        Outcome::Fail => "FAILED",
        Outcome::Error => "could not run",
        Outcome::Interrupted => "interrupted",
    };
    let mut sums = format!("{} {result} in {:.1} s", report.scenario, report.totals.seconds);
    if let Some(seconds) = report.totals.launch_to_vda_seconds {
        let _ = write!(sums, ", launch to /dev/vda {seconds:.1} s");
    }
    if let (Some(bare), Some(ratio)) = (report.totals.bare_boot_seconds, report.totals.ratio_to_bare_boot) {
        let _ = write!(sums, " = {ratio:.1} bare boots of {bare:.2} s");
    }
    if let Some(accelerator) = &report.accelerator {
        let _ = write!(sums, ", {}", accelerator.used);
    }
    line(&mut text, format_args!("{sums}"));
    text
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{line}");
}

/// The last line of `evidence`, which tells most, cut to the width.
fn shortened(evidence: &str) -> String {
    let last = evidence.trim().lines().next_back().unwrap_or_default();
    if last.chars().count() <= EVIDENCE_WIDTH {
        return last.to_owned();
    }
    let cut: String = last.chars().take(EVIDENCE_WIDTH - 2).collect();
    format!("{cut} …")
}

/// All of `evidence`, its further lines set in.
fn indented(evidence: &str) -> String {
    evidence.trim().replace('\n', "\n        ")
}
