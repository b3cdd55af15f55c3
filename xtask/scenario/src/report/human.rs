//! The report for people: a table of the checks and one line of totals.

use std::fmt::Write;

use vvu_process::progress::StageTime;
use vvu_process::text::printable;
use vvu_testvm::facts::Outcome;

use super::record::{CheckResult, Report};

/// Longest evidence of a passed check, in characters. `report.json` has all of it.
const EVIDENCE_WIDTH: usize = 96;

/// Formats a report: each check with its evidence, then one line of totals.
pub fn table(report: &Report) -> String {
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
    if let Some(stages) = long_stages(&report.stages) {
        line(&mut text, format_args!("stages of 1 s or more, partly side by side: {stages}"));
    }
    let mut sums =
        format!("{} {} in {:.1} s", report.scenario, verdict(report.result), report.totals.seconds);
    if let Some(seconds) = report.totals.launch_to_vda_seconds {
        let _ = write!(sums, ", launch to /dev/vda {seconds:.1} s");
    }
    if let (Some(bare), Some(ratio)) = (report.totals.bare_boot_seconds, report.totals.ratio_to_bare_boot) {
        let _ = write!(sums, " = {ratio:.1} bare boots of {bare:.2} s");
    }
    if let Some(accelerator) = &report.accelerator {
        let _ = write!(sums, ", {}", accelerator.used);
    }
    for (name, value) in &report.measurements {
        let _ = write!(sums, ", {name} {value}");
    }
    line(&mut text, format_args!("{sums}"));
    text
}

/// The stages that took a second or more, in the order in which they began; `None` if there is none.
fn long_stages(stages: &[StageTime]) -> Option<String> {
    let mut long: Vec<_> = stages.iter().filter(|stage| stage.seconds >= 1.0).collect();
    long.sort_by(|a, b| a.began.total_cmp(&b.began));
    let named = long.iter().map(|stage| format!("{} {:.0} s", stage.name, stage.seconds));
    (!long.is_empty()).then(|| named.collect::<Vec<_>>().join(", "))
}

/// Formats the reports of several scenarios: one line for each, then one for all.
pub fn summary(reports: &[Report]) -> String {
    let width = reports.iter().map(|report| report.scenario.len()).max().unwrap_or(0);
    let mut text = String::from("\n");
    for Report { scenario, result, totals, .. } in reports {
        line(&mut text, format_args!("{scenario:width$}  {:13}  {:6.1} s", verdict(*result), totals.seconds));
    }
    let passed = reports.iter().filter(|report| report.result == Outcome::Pass).count();
    let seconds: f64 = reports.iter().map(|report| report.totals.seconds).sum();
    line(&mut text, format_args!("{passed} of {} passed in {seconds:.1} s", reports.len()));
    text
}

/// The words for an outcome in a table.
pub fn verdict(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Pass => "passed",
        Outcome::Fail => "FAILED",
        Outcome::Error => "could not run",
        Outcome::Interrupted => "interrupted",
    }
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{line}");
}

/// The last line of `evidence`, cut to [`EVIDENCE_WIDTH`]. Programs print their result last.
fn shortened(evidence: &str) -> String {
    let evidence = printable(evidence.trim());
    let last = evidence.lines().next_back().unwrap_or_default();
    if last.chars().count() <= EVIDENCE_WIDTH {
        return last.to_owned();
    }
    let cut: String = last.chars().take(EVIDENCE_WIDTH - 2).collect();
    format!("{cut} …")
}

/// All of `evidence`, with its lines after the first indented.
fn indented(evidence: &str) -> String {
    printable(evidence.trim()).replace('\n', "\n        ")
}
