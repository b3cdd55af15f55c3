//! The results as a JUnit file, a test case for each cell.

use std::time::Duration;

use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report as Document, TestCase, TestCaseStatus, TestSuite};

use super::results::{CellResult, Results};
use crate::report::{CheckResult, Report, verdict};
use vvu_testvm::facts::Outcome;

/// The file.
///
/// # Errors
///
/// It cannot be made.
pub(super) fn document(results: &Results) -> Result<String> {
    let mut suite = TestSuite::new(format!("matrix-{}", results.scenario));
    for cell in &results.cells {
        let values = cell.on(&results.axes).map(|(axis, value)| format!("{}={value}", axis.name));
        let name = format!("{} {}", cell.name, values.collect::<Vec<_>>().join(" "));
        let mut case = TestCase::new(name, status(cell));
        case.set_classname(&results.scenario);
        case.set_time(duration(cell.seconds().unwrap_or_default()));
        suite.add_test_case(case);
    }
    suite.set_time(duration(results.seconds));
    let mut document = Document::new(format!("matrix-{}", results.scenario));
    document.set_time(duration(results.seconds)).add_test_suite(suite);
    document.to_string().context("cannot write the JUnit file")
}

fn status(cell: &CellResult) -> TestCaseStatus {
    let Some(report) = &cell.report else {
        let mut status = TestCaseStatus::skipped();
        status.set_message("not run");
        return status;
    };
    let kind = match report.result {
        Outcome::Pass => return TestCaseStatus::success(),
        Outcome::Fail => NonSuccessKind::Failure,
        Outcome::Error | Outcome::Interrupted => NonSuccessKind::Error,
    };
    let mut status = TestCaseStatus::non_success(kind);
    let (message, evidence) = why(report);
    status.set_message(message).set_description(evidence);
    status
}

/// The failure, in one line and at length.
fn why(report: &Report) -> (String, String) {
    let failed = report.checks.iter().filter(|check| check.result == CheckResult::Fail);
    let failed: Vec<_> = failed.map(|check| (check.name.as_str(), check.evidence.as_str())).collect();
    let names: Vec<_> = failed.iter().map(|(name, _)| *name).collect();
    let error = report.error.iter().map(|error| ("error", error.as_str()));
    let texts = error.chain(failed.iter().copied()).map(|(name, text)| format!("{name}: {text}"));
    let message = if names.is_empty() { verdict(report.result).to_owned() } else { names.join(", ") };
    (message, texts.collect::<Vec<_>>().join("\n"))
}

fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::results::tests::sample;
    use super::*;

    #[test]
    fn each_cell_is_a_case_and_evidence_is_escaped() {
        let text = document(&sample("no <disk> & \u{1b}[31m]]>")).expect("written");
        for want in [
            r#"<testsuites name="matrix-block" tests="3" skipped="1" failures="1" errors="0""#,
            r#"name="block-01 iommu=virtio" classname="block" time="3.500""#,
            r#"<failure message="vda-appears">"#,
            "no &lt;disk&gt; &amp; ]]&gt;",
            r#"<skipped message="not run"/>"#,
        ] {
            assert!(text.contains(want), "{text} lacks {want}");
        }
    }
}
