//! Reading scenario files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use super::scenario::Scenario;
use super::upgrade::upgraded;
use super::version::is_old;

impl Scenario {
    /// Reads and checks a scenario file. A file of the old format is read as well, with a note on standard error.
    ///
    /// # Errors
    ///
    /// Names the file and the place in it, as a JSON path, and what is wrong there.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the scenario {}", path.display()))?;
        let dir = path.parent().unwrap_or(Path::new("."));
        let invalid = || format!("{} is not a valid scenario", path.display());
        let json: Value = serde_json::from_str(&text).with_context(invalid)?;
        if !is_old(&json) {
            return Self::parse(&text, dir).with_context(invalid);
        }
        eprintln!(
            "note: {0} is in the old format; `cargo xtask scenario upgrade {0}` rewrites it",
            path.display()
        );
        let text = upgraded(&text).with_context(invalid)?;
        Self::parse(&text, dir).with_context(|| {
            format!("{}, upgraded to the current format, is not a valid scenario", path.display())
        })
    }

    /// Reads and checks the text of a scenario file in `dir`.
    ///
    /// # Errors
    ///
    /// As [`Scenario::load`].
    pub fn parse(text: &str, dir: &Path) -> Result<Self> {
        let mut scenario = Self::read(text)?;
        for vm in scenario.vms.values_mut() {
            vm.overlay = vm.overlay.take().map(|overlay| dir.join(overlay));
        }
        for disk in scenario.disks.values_mut() {
            disk.file = disk.file.take().map(|file| dir.join(file));
        }
        scenario.check()?;
        Ok(scenario)
    }

    /// Reads the text of a scenario file without checking what it means.
    pub(super) fn read(text: &str) -> Result<Self> {
        // serde would report a step with two actions as a missing brace.
        let json: Value = serde_json::from_str(text)?;
        check_shape(&json["steps"], "steps")?;
        let mut json = serde_json::Deserializer::from_str(text);
        let scenario = serde_path_to_error::deserialize(&mut json)
            .map_err(|error| anyhow!("at {}: {}", error.path(), error.inner()))?;
        json.end().context("after the scenario")?;
        Ok(scenario)
    }
}

/// Checks that each step has one key, its action.
fn check_shape(steps: &Value, path: &str) -> Result<()> {
    for (index, step) in steps.as_array().into_iter().flatten().enumerate() {
        let place = format!("{path}[{index}]");
        let Some(actions) = step.as_object() else { continue };
        let keys: Vec<_> = actions.keys().map(|key| format!("`{key}`")).collect();
        ensure!(
            actions.len() == 1,
            "at {place}: {}: want exactly one key, the action, such as {{\"run\": {{\"vm\": ..., \"command\": ...}}}}",
            if keys.is_empty() { "an empty step".to_owned() } else { keys.join(", ") }
        );
        check_shape(&step["repeat"]["steps"], &format!("{place}.repeat.steps"))?;
    }
    Ok(())
}

/// The scenarios in `dir`, by name.
///
/// # Errors
///
/// The directory cannot be read, or holds a file that is no scenario or has another name than its scenario.
pub fn list(dir: &Path) -> Result<BTreeMap<String, Scenario>> {
    let mut scenarios = BTreeMap::new();
    for path in files(dir)? {
        let scenario = Scenario::load(&path)?;
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        ensure!(
            scenario.name == stem,
            "{} names itself {:?}: want {stem:?}, its file name",
            path.display(),
            scenario.name
        );
        scenarios.insert(scenario.name.clone(), scenario);
    }
    Ok(scenarios)
}

/// Finds the scenario `name` in `dir`.
///
/// # Errors
///
/// There is none of that name; the message lists those there are.
pub fn find(dir: &Path, name: &str) -> Result<Scenario> {
    let path = dir.join(format!("{name}.json"));
    let files = files(dir)?;
    if files.contains(&path) {
        return Scenario::load(&path);
    }
    let known: Vec<_> =
        files.iter().filter_map(|file| file.file_stem()).map(|stem| stem.to_string_lossy()).collect();
    bail!(
        "there is no scenario {name:?}: known are {}; use --scenario-file for one of your own",
        known.join(", ")
    )
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot list {}", dir.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
