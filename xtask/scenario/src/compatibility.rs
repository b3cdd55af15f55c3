//! `cargo xtask compatibility`: the table of back-ends in `docs/compatibility.md`, from what the last runs of the
//! scenarios recorded.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::format::{self, Scenario};
use vvu_artifacts::image::GuestPrograms;
use vvu_artifacts::workspace;
use vvu_testvm::rundir::runs;

const BEGIN: &str = "<!-- begin: cargo xtask compatibility -->\n";
const END: &str = "<!-- end -->";
/// Programs that test back-ends rather than being one.
const TOOLS: [&str; 1] = ["socat"];

/// Rewrites the table.
///
/// # Errors
///
/// The scenarios, their last runs or the document cannot be read or written.
pub fn main() -> Result<()> {
    let programs = GuestPrograms::read()?;
    let mut table = String::from(
        "| scenario | back-ends in the device VM | messages the front-end sent | protocol features taken away | last run |\n|---|---|---|---|---|\n",
    );
    for scenario in format::list(&workspace().join("scenarios"))?.values() {
        let Some(run) = last_run(&scenario.name)? else { continue };
        let (messages, masked) = traced(&run)?;
        let result = result(&run)?;
        let row = [scenario.name.clone(), backends(scenario, &programs), messages, masked, result];
        table.push_str(&format!("| {} |\n", row.join(" | ")));
    }
    let path = workspace().join("docs/compatibility.md");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let text =
        replaced(&text, &table).with_context(|| format!("{} has no place for the table", path.display()))?;
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// `text` with `table` between the marks.
fn replaced(text: &str, table: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}{table}{END}{after}"))
}

fn backends(scenario: &Scenario, programs: &GuestPrograms) -> String {
    let spawned: Vec<&str> = scenario.steps.iter().filter_map(|step| step.spawn.as_deref()).collect();
    let mut names = Vec::new();
    if spawned.iter().any(|command| command.contains("vvu device block")) {
        names.push("vvu device block".to_owned());
    }
    let others = scenario.vms.values().flat_map(|vm| &vm.programs).collect::<BTreeSet<_>>();
    for program in others.into_iter().filter(|program| !TOOLS.contains(&program.as_str())) {
        let version = programs.version(program).unwrap_or("of docs/library.md");
        names.push(format!("{program} {version}"));
    }
    names.join(", ")
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

/// The requests in the traces of a run, and the protocol features that were masked.
fn traced(run: &Path) -> Result<(String, String)> {
    let (mut requests, mut masked) = (BTreeSet::new(), BTreeSet::new());
    let entries = fs::read_dir(run).context("cannot list a run")?;
    for path in entries.filter_map(|entry| entry.ok().map(|entry| entry.path())) {
        if path.extension().is_none_or(|extension| extension != "jsonl") {
            continue;
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        for line in text.lines() {
            let message: Value = serde_json::from_str(line).context("a trace is malformed")?;
            note(&message, &mut requests, &mut masked);
        }
    }
    let list = |set: BTreeSet<String>| {
        if set.is_empty() { "none".to_owned() } else { set.into_iter().collect::<Vec<_>>().join(", ") }
    };
    Ok((list(requests), list(masked)))
}

fn note(message: &Value, requests: &mut BTreeSet<String>, masked: &mut BTreeSet<String>) {
    let request = message["request"].as_str().unwrap_or_default();
    if message["kind"] == "request" {
        let channel = if message.get("channel").is_some() { " (of the back-end)" } else { "" };
        let refused = if message["did"] == "refused" { " (refused)" } else { "" };
        requests.insert(format!("{request}{channel}{refused}"));
    }
    let names = |fields: &Value| -> BTreeSet<String> {
        let names = fields["names"].as_array().into_iter().flatten();
        names.filter_map(|name| name.as_str().map(str::to_owned)).collect()
    };
    if message["did"] == "masked" {
        masked.extend(names(&message["fields"]).difference(&names(&message["passed"])).cloned());
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
        let (mut requests, mut masked) = (BTreeSet::new(), BTreeSet::new());
        let reply = json!({"kind": "reply", "request": "GET_PROTOCOL_FEATURES", "did": "masked",
            "fields": {"names": ["MQ", "DEVICE_STATE"]}, "passed": {"names": ["MQ"]}});
        let refused = json!({"kind": "request", "request": "SET_LOG_BASE", "did": "refused"});
        for message in [reply, refused] {
            note(&message, &mut requests, &mut masked);
        }
        assert_eq!(requests.into_iter().collect::<Vec<_>>(), ["SET_LOG_BASE (refused)"]);
        assert_eq!(masked.into_iter().collect::<Vec<_>>(), ["DEVICE_STATE"]);
    }
}
