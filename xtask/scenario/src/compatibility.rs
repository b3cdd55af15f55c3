//! `cargo xtask compatibility`: writes the table of back-ends in `docs/compatibility.md` from the traces of the last
//! run of each scenario.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::format::{self, Scenario};
use vvu_artifacts::image::GuestPrograms;
use vvu_artifacts::workspace;
use vvu_testvm::runs;

const BEGIN: &str = "<!-- begin: cargo xtask compatibility -->\n";
const END: &str = "<!-- end -->";
/// A row of the table: the last run of a scenario.
struct Row {
    scenario: String,
    backends: String,
    traced: Traced,
    result: String,
}

/// Summary of the traces of a run.
#[derive(Default)]
struct Traced {
    /// Requests, with a note on those of the back-end and on refused ones.
    requests: BTreeSet<String>,
    /// Protocol features that a device cleared.
    masked: BTreeSet<String>,
}

/// Rewrites the table.
///
/// # Errors
///
/// The scenarios, their last runs or the document cannot be read or written.
pub fn main() -> Result<()> {
    let programs = GuestPrograms::read()?;
    let mut rows = Vec::new();
    for scenario in format::list(&workspace().join("scenarios"))?.values() {
        let Some(run) = last_run(&scenario.name)? else { continue };
        rows.push(Row {
            scenario: scenario.name.clone(),
            backends: backends(scenario, &programs),
            traced: traced(&run)?,
            result: result(&run)?,
        });
    }
    let path = workspace().join("docs/compatibility.md");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let text = replaced(&text, &render(&rows))
        .with_context(|| format!("{} has no place for the table", path.display()))?;
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The messages that most scenarios send, and a table of how each scenario differs from that.
fn render(rows: &[Row]) -> String {
    let mut counts = BTreeMap::<_, usize>::new();
    for row in rows {
        *counts.entry(&row.traced.requests).or_default() += 1;
    }
    let none = BTreeSet::new();
    let (base, count) = counts.into_iter().max_by_key(|(_, count)| *count).unwrap_or((&none, 0));
    let list = |set: BTreeSet<&String>| set.into_iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    let mut text = format!(
        "The base set is what the front-ends of {count} of {} scenarios send: {}.\n\n\
         | scenario | back-ends in the device VM | sent besides | not sent | protocol features masked | last run |\n\
         |---|---|---|---|---|---|\n",
        rows.len(),
        list(base.iter().collect())
    );
    for Row { scenario, backends, traced: Traced { requests, masked }, result } in rows {
        let besides = list(requests.difference(base).collect());
        let not_sent = list(base.difference(requests).collect());
        let masked = list(masked.iter().collect());
        text.push_str(&format!(
            "| {scenario} | {backends} | {besides} | {not_sent} | {masked} | {result} |\n"
        ));
    }
    text
}

/// `text` with `table` between the marks.
fn replaced(text: &str, table: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}{table}{END}{after}"))
}

/// The back-ends that the scenario names, with their versions where they are other people's programs.
fn backends(scenario: &Scenario, programs: &GuestPrograms) -> String {
    let mut backends = Vec::new();
    for name in scenario.vvu.values().filter_map(|vvu| vvu.backend.as_ref()) {
        let backend = match programs.version(name) {
            Some(version) => format!("{name} {version}"),
            None => name.clone(),
        };
        if !backends.contains(&backend) {
            backends.push(backend);
        }
    }
    backends.join(", ")
}

/// The newest run of a scenario that has a report.
fn last_run(name: &str) -> Result<Option<PathBuf>> {
    let Ok(entries) = fs::read_dir(runs()) else { return Ok(None) };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.context("cannot list the runs")?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let time = file.strip_prefix(name).and_then(|rest| rest.strip_prefix('-'));
        if time.is_some_and(|time| time.starts_with(|c: char| c.is_ascii_digit()))
            && path.join("report.json").is_file()
        {
            found.push(path);
        }
    }
    Ok(found.into_iter().max())
}

fn result(run: &Path) -> Result<String> {
    let text = fs::read_to_string(run.join("report.json")).context("cannot read a report")?;
    let report: Value = serde_json::from_str(&text).context("a report is malformed")?;
    Ok(report["result"].as_str().unwrap_or("unknown").to_owned())
}

fn traced(run: &Path) -> Result<Traced> {
    let mut traced = Traced::default();
    let entries = fs::read_dir(run).context("cannot list a run")?;
    for path in entries.filter_map(|entry| entry.ok().map(|entry| entry.path())) {
        if path.extension().is_none_or(|extension| extension != "jsonl") {
            continue;
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        for line in text.lines() {
            let message: Value = serde_json::from_str(line).context("a trace is malformed")?;
            traced.note(&message);
        }
    }
    Ok(traced)
}

impl Traced {
    /// Adds one message of a trace.
    fn note(&mut self, message: &Value) {
        let request = message["request"].as_str().unwrap_or_default();
        if message["kind"] == "request" {
            let channel = if message.get("channel").is_some() { " (of the back-end)" } else { "" };
            let refused = if message["did"] == "refused" { " (refused)" } else { "" };
            self.requests.insert(format!("{request}{channel}{refused}"));
        }
        let names = |fields: &Value| -> BTreeSet<String> {
            let names = fields["names"].as_array().into_iter().flatten();
            names.filter_map(|name| name.as_str().map(str::to_owned)).collect()
        };
        if message["did"] == "masked" {
            self.masked.extend(names(&message["fields"]).difference(&names(&message["passed"])).cloned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_table_goes_between_the_marks() {
        let text = format!("a\n{BEGIN}old\n{END}\nb");
        assert_eq!(replaced(&text, "new\n"), Some(format!("a\n{BEGIN}new\n{END}\nb")));
        assert_eq!(replaced("no marks", "new"), None);
    }

    #[test]
    fn messages_and_masked_features_are_collected() {
        let mut traced = Traced::default();
        let reply = json!({"kind": "reply", "request": "GET_PROTOCOL_FEATURES", "did": "masked",
            "fields": {"names": ["MQ", "DEVICE_STATE"]}, "passed": {"names": ["MQ"]}});
        let refused = json!({"kind": "request", "request": "SET_LOG_BASE", "did": "refused"});
        for message in [reply, refused] {
            traced.note(&message);
        }
        assert_eq!(traced.requests.into_iter().collect::<Vec<_>>(), ["SET_LOG_BASE (refused)"]);
        assert_eq!(traced.masked.into_iter().collect::<Vec<_>>(), ["DEVICE_STATE"]);
    }

    #[test]
    fn scenarios_are_shown_as_differences_from_the_most_common_set() {
        let row = |scenario: &str, requests: &[&str], masked: &[&str]| Row {
            scenario: scenario.to_owned(),
            backends: "b".to_owned(),
            traced: Traced {
                requests: requests.iter().map(|name| (*name).to_owned()).collect(),
                masked: masked.iter().map(|name| (*name).to_owned()).collect(),
            },
            result: "pass".to_owned(),
        };
        let text =
            render(&[row("x", &["A", "C"], &["M"]), row("y", &["A", "B"], &[]), row("z", &["B", "A"], &[])]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "The base set is what the front-ends of 2 of 3 scenarios send: A, B.");
        assert_eq!(
            lines[4..],
            ["| x | b | C | B | M | pass |", "| y | b |  |  |  | pass |", "| z | b |  |  |  | pass |"]
        );
        assert!(render(&[]).starts_with("The base set is what the front-ends of 0 of 0 scenarios send: ."));
    }
}
