//! The results as one page for a browser, complete in itself. `maud` escapes all that is put into it.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::results::{CellResult, Results};
use crate::report::{CheckResult, Report};
use vvu_testvm::facts::Outcome;

const STYLE: &str = include_str!("page.css");
/// Nothing is loaded and nothing is run, whatever evidence may hold.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";
/// About how many marks a time axis has.
const MARKS: f64 = 8.0;

/// The page. Its links lead to the cells' directories beside it.
pub(super) fn document(results: &Results) -> String {
    let title = format!("{} matrix: {}", results.scenario, sum(results));
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                main {
                    h1 { "Matrix of " code { (results.scenario) } }
                    p class={ "sum " (class(Some(results.result))) } { (mark(Some(results.result))) " " (sum(results)) }
                    p .muted { (facts(results)) }
                    h2 { "Cells" }
                    (table(results))
                    @for impossible in &results.impossible {
                        p .muted {
                            "Left out: "
                            @for (index, (axis, value)) in impossible.values.iter().enumerate() {
                                @if index > 0 { " with " } (axis) " " (value)
                            }
                            ": " (impossible.because)
                        }
                    }
                    h2 { "Timelines" }
                    (timelines(results))
                    h2 { "Checks" }
                    @for cell in &results.cells { (details(cell, results)) }
                    @if !results.set_up.is_empty() {
                        h2 { "Set-up before the first cell" }
                        dl .checks {
                            @for stage in &results.set_up {
                                dt { (stage.name) } dd { (format!("{:.1} s", stage.seconds)) }
                            }
                        }
                    }
                }
            }
        }
    }
    .into_string()
}

fn sum(results: &Results) -> String {
    format!("{} of {} cells passed", results.passed(), results.cells.len())
}

fn facts(results: &Results) -> String {
    let mut text = format!("{:.0} s in all", results.seconds);
    let accelerator = results.cells.iter().find_map(|cell| cell.report.as_ref()?.accelerator.as_ref());
    if let Some(accelerator) = accelerator {
        text.push_str(&format!(", {} ({})", accelerator.used, accelerator.reason));
    }
    text.push_str(&format!(". Cells: {}. ", results.coverage));
    text.push_str(
        "Values in grey are the defaults; seconds are those of the cell alone, and from the launch of its ",
    );
    text.push_str("first VM to the disk in the sibling VM.");
    text
}

fn table(results: &Results) -> Markup {
    html! {
        div .scroll {
            table {
                thead {
                    tr {
                        th { "cell" } th { "result" }
                        @for axis in &results.axes { th { (axis.name) } }
                        th .number { "seconds" } th .number { "to /dev/vda" }
                    }
                }
                tbody {
                    @for cell in &results.cells {
                        tr {
                            td { a href={ "#" (cell.name) } { (cell.name) } }
                            td class={ "result " (class(cell.result())) } {
                                (mark(cell.result())) " " (cell.verdict())
                            }
                            @for (axis, value) in cell.on(&results.axes) {
                                td .default[axis.values.first().is_some_and(|first| first == value)] { (value) }
                            }
                            td .number { (seconds(cell.seconds())) }
                            td .number { (seconds(cell.launch_to_vda())) }
                        }
                    }
                }
            }
        }
    }
}

fn seconds(seconds: Option<f64>) -> String {
    seconds.map_or("–".to_owned(), |seconds| format!("{seconds:.1} s"))
}

fn timelines(results: &Results) -> Markup {
    let mut names: Vec<&str> = Vec::new();
    for stage in
        results.cells.iter().filter_map(|cell| cell.report.as_ref()).flat_map(|report| &report.stages)
    {
        if !names.contains(&stage.name.as_str()) {
            names.push(&stage.name);
        }
    }
    let longest = results.cells.iter().filter_map(CellResult::seconds).fold(0.0, f64::max);
    if longest <= 0.0 {
        return html! { p .muted { "No cell got as far as its first stage." } };
    }
    let marks = marks(longest);
    let percent = |seconds: f64| format!("{:.2}%", seconds / longest * 100.0);
    html! {
        p .muted { "The first check in a VM has to wait until that has booted." }
        ul .legend {
            @for name in &names { li { span style={ "background:" (colour(&names, name)) } {} (name) } }
        }
        div .chart {
            div .corner {}
            div .scale {
                @for mark in &marks { span style={ "left:" (percent(f64::from(*mark))) } { (mark) " s" } }
            }
            @for cell in &results.cells {
                div { a href={ "#" (cell.name) } { (cell.name) } }
                div .track {
                    @for mark in &marks { i style={ "left:" (percent(f64::from(*mark))) } {} }
                    @for stage in cell.report.iter().flat_map(|report| &report.stages) {
                        @let place = format!(
                            "left:{};width:{};background:{}",
                            percent(stage.began - cell.began()),
                            percent(stage.seconds),
                            colour(&names, &stage.name)
                        );
                        div .bar .broken[has_failed(cell, &stage.name)] style=(place)
                            title=(format!("{} {:.1} s", stage.name, stage.seconds)) {}
                    }
                }
            }
        }
    }
}

/// The positions of the marks on a time axis of `longest` seconds, in whole seconds.
fn marks(longest: f64) -> Vec<u32> {
    let steps = [1_u32, 2, 5, 10, 20, 30, 60, 120, 300, 600];
    let step = steps.into_iter().find(|step| longest / f64::from(*step) <= MARKS).unwrap_or(3600);
    (0_u32..)
        .map(|number| number.saturating_mul(step))
        .take_while(|mark| f64::from(*mark) <= longest)
        .collect()
}

/// A colour of its own for each name, the next ones well apart, and none of them red.
fn colour(names: &[&str], name: &str) -> String {
    let index = names.iter().position(|known| *known == name).unwrap_or_default();
    // The step is the golden section of the range, so that no few steps come back to where they began.
    let hue = 50 + index * 107 % 280;
    let lightness = if index.is_multiple_of(2) { 58 } else { 72 };
    format!("oklch({lightness}% 0.13 {hue})")
}

fn has_failed(cell: &CellResult, check: &str) -> bool {
    let checks = cell.report.iter().flat_map(|report| &report.checks);
    checks.filter(|known| known.name == check).any(|check| check.result == CheckResult::Fail)
}

fn details(cell: &CellResult, results: &Results) -> Markup {
    html! {
        details id=(cell.name) open[cell.result() != Some(Outcome::Pass)] {
            summary {
                b { (cell.name) }
                span class={ "result " (class(cell.result())) } { (mark(cell.result())) " " (cell.verdict()) }
                " "
                span .muted {
                    @for (index, (axis, value)) in cell.on(&results.axes).enumerate() {
                        @if index > 0 { " · " } (axis.name) " " (value)
                    }
                }
            }
            div .inside {
                @match &cell.report {
                    Some(report) => { (report_of(cell, report)) }
                    None => { p .muted { "It was interrupted before this cell." } }
                }
            }
        }
    }
}

fn report_of(cell: &CellResult, report: &Report) -> Markup {
    html! {
        p .muted {
            @if let Some(kernel) = &report.kernel { "Linux " (kernel.version) }
            @if let Some(qemu) = &report.qemu { " · QEMU " (qemu.version) }
            @for (vm, qemu) in &report.qemus { " · " (vm) ": QEMU " (qemu.version) }
        }
        p {
            a href={ (cell.name) "/" } { "run directory" } " · "
            a href={ (cell.name) "/report.json" } { "report.json" } " · "
            a href={ (cell.name) "/scenario.json" } { "scenario.json" }
            span .muted { " (runs by itself: cargo xtask e2e --scenario-file)" }
        }
        @if let Some(error) = &report.error { pre .fail { (error) } }
        dl .checks {
            @for check in &report.checks {
                @let outcome = match check.result {
                    CheckResult::Pass => Some(Outcome::Pass),
                    CheckResult::Fail => Some(Outcome::Fail),
                    CheckResult::Skip => None,
                };
                dt class=(class(outcome)) { (mark(outcome)) " " (check.name) }
                dd {
                    @match check.result {
                        CheckResult::Skip => { span .muted { "not reached" } }
                        CheckResult::Pass => { pre { (check.evidence.trim()) } }
                        CheckResult::Fail => { pre .fail { (check.evidence.trim()) } }
                    }
                }
            }
        }
    }
}

fn class(outcome: Option<Outcome>) -> &'static str {
    match outcome {
        Some(Outcome::Pass) => "pass",
        Some(Outcome::Fail | Outcome::Error) => "fail",
        Some(Outcome::Interrupted) => "odd",
        None => "muted",
    }
}

fn mark(outcome: Option<Outcome>) -> &'static str {
    match outcome {
        Some(Outcome::Pass) => "✓",
        Some(Outcome::Fail | Outcome::Error) => "✗",
        Some(Outcome::Interrupted) => "◼",
        None => "·",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::results::tests::sample;
    use super::*;

    #[test]
    fn evidence_cannot_leave_its_place() {
        let hostile = "</pre><script>alert(1)</script><img src=x onerror='x'>\" & &lt; \u{1b}[31m";
        let mut results = sample(hostile);
        results.cells[1].name = "\"><b>".into();
        results.cells[1].values[0] = "<i>".into();
        let page = document(&results);
        for evil in ["<script", "<img", "<b>alert", "\"><b>", "<i>"] {
            assert!(!page.contains(evil), "{evil}");
        }
        assert!(page.contains("&lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;"), "{page}");
        assert!(page.contains("&amp; &amp;lt;"), "{page}");
    }

    #[test]
    fn the_page_is_complete_in_itself_and_tells_what_happened() {
        let page = document(&sample("no disk"));
        for outside in ["http:", "https:", "<script", "<link", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        for want in [
            "1 of 3 cells passed",
            "no disk",
            "✗ FAILED",
            "not run",
            "of &lt;that&gt;",
            "block-02/report.json",
        ] {
            assert!(page.contains(want), "{want}");
        }
        // The failed cell is open, the passed one is not.
        assert!(
            page.contains(r#"<details id="block-02" open>"#) && page.contains(r#"<details id="block-01">"#)
        );
        assert!(page.contains("left:42.86%;width:57.14%"), "the second stage's bar");
    }

    #[test]
    fn the_time_axis_has_a_few_marks() {
        assert_eq!(marks(3.5), [0, 1, 2, 3]);
        assert_eq!(marks(41.0), [0, 10, 20, 30, 40]);
    }

    #[test]
    fn stages_have_colours_of_their_own() {
        let names: Vec<String> = (0..20).map(|number| number.to_string()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let colours: BTreeSet<_> = names.iter().map(|name| colour(&names, name)).collect();
        assert_eq!(colours.len(), names.len());
    }
}
