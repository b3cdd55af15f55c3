//! The format of matrix files, `scenarios/matrix/NAME.json`, and the variants of the scenario that they describe.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::cover::Coverage;
use crate::format::{Scenario, Step, is_old};

/// Most combinations of values that a matrix may have. The time to choose cells grows with their number.
const MAX_COMBINATIONS: usize = 10_000;
/// Longest name of an axis or a value, in bytes.
const MAX_NAME: usize = 32;

/// A matrix file: in what ways a scenario is varied.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Matrix {
    /// The JSON Schema of this file, for editors; a run does not read it.
    #[serde(default, rename = "$schema", skip_serializing_if = "Option::is_none")]
    schema: Option<String>,
    /// Name of the scenario; the matrix file has the same name.
    scenario: String,
    /// Combinations of values that are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) impossible: Vec<Impossible>,
    /// What varies. A cell, which is one run, has one value of each axis.
    #[schemars(length(min = 1))]
    pub(super) axes: Vec<Axis>,
}

/// A combination of values that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Impossible {
    /// One value each of some axes, by the axis' name.
    pub(super) values: BTreeMap<String, String>,
    /// The reason, which the reports repeat.
    pub(super) because: String,
}

/// A property that varies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Axis {
    /// Name of the property, such as `kernel`.
    pub(super) name: String,
    /// Its values; the first is the default.
    #[schemars(length(min = 1))]
    pub(super) values: Vec<Choice>,
}

/// A value of an axis.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Choice {
    /// Name of the value, such as `6.1`.
    pub(super) name: String,
    /// JSON merge patch (RFC 7396) that gives the scenario this value.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    patch: Map<String, Value>,
    /// Steps that are carried out before the scenario's, for example to check that the guest sees the value.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    steps: Vec<Step>,
    /// Steps that are carried out after the scenario's, before the VMs are shut down.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    after: Vec<Step>,
}

/// A variant of the scenario.
pub struct Cell {
    /// The index of the cell's value on each axis.
    pub(super) values: Vec<usize>,
    /// The text of the variant's scenario file.
    pub(super) text: String,
    /// The scenario that the text describes, checked.
    pub scenario: Scenario,
}

impl Matrix {
    /// Reads the matrix of the scenario `name` in the folder `dir`, and makes and checks the cells that `coverage` asks
    /// for.
    ///
    /// # Errors
    ///
    /// There is no such scenario, it has no matrix, or a file or a cell is not valid. The message names the file or the
    /// cell, and the place in it as a JSON path.
    pub fn load(dir: &Path, name: &str, coverage: Coverage) -> Result<(Self, Vec<Cell>)> {
        // If there is no such scenario, this error lists those there are.
        crate::format::find(dir, name)?;
        let path = dir.join("matrix").join(format!("{name}.json"));
        let text = fs::read_to_string(&path)
            .with_context(|| format!("{name} has no matrix: cannot read {}", path.display()))?;
        let scenario = dir.join(format!("{name}.json"));
        let base = fs::read_to_string(&scenario)
            .with_context(|| format!("cannot read the scenario {}", scenario.display()))?;
        let matrix =
            Self::parse(&text, name).with_context(|| format!("{} is not a valid matrix", path.display()))?;
        let cells = matrix.cells(&base, dir, coverage)?;
        Ok((matrix, cells))
    }

    fn parse(text: &str, name: &str) -> Result<Self> {
        let old: Value = serde_json::from_str(text)?;
        ensure!(!is_old(&old), "it is in the old format: `cargo xtask scenario upgrade` rewrites it");
        let mut json = serde_json::Deserializer::from_str(text);
        let matrix: Matrix = serde_path_to_error::deserialize(&mut json)
            .map_err(|error| anyhow!("at {}: {}", error.path(), error.inner()))?;
        json.end().context("after the matrix")?;
        ensure!(
            matrix.scenario == name,
            "at scenario: {:?}: want {name:?}, as its file is called",
            matrix.scenario
        );
        check_names(matrix.axes.iter().map(|axis| &axis.name)).context("at axes")?;
        for (index, axis) in matrix.axes.iter().enumerate() {
            ensure!(!axis.values.is_empty(), "at axes[{index}].values: want at least one");
            check_names(axis.values.iter().map(|value| &value.name))
                .with_context(|| format!("at axes[{index}].values"))?;
        }
        for (index, impossible) in matrix.impossible.iter().enumerate() {
            matrix
                .check_impossible(&impossible.values)
                .with_context(|| format!("at impossible[{index}].values"))?;
        }
        let combinations = matrix.sizes().iter().fold(1_usize, |product, size| product.saturating_mul(*size));
        ensure!(
            combinations <= MAX_COMBINATIONS,
            "at axes: {combinations} combinations: want at most {MAX_COMBINATIONS}"
        );
        Ok(matrix)
    }

    fn check_impossible(&self, values: &BTreeMap<String, String>) -> Result<()> {
        for (name, value) in values {
            let axis = self.axes.iter().find(|axis| axis.name == *name);
            let known = axis.is_some_and(|axis| axis.values.iter().any(|choice| choice.name == *value));
            ensure!(known, "no axis {name:?} has a value {value:?}");
        }
        let defaults = vec![0; self.axes.len()];
        ensure!(!self.all_in(values, &defaults), "the defaults must be possible");
        Ok(())
    }

    /// Whether the cell has all of `values`, which go by the name of their axis.
    fn all_in(&self, values: &BTreeMap<String, String>, cell: &[usize]) -> bool {
        let named = self.axes.iter().zip(self.choices(cell));
        named.filter(|(axis, choice)| values.get(&axis.name) == Some(&choice.name)).count() == values.len()
    }

    fn sizes(&self) -> Vec<usize> {
        self.axes.iter().map(|axis| axis.values.len()).collect()
    }

    /// Makes the cells of the scenario whose text is `base`.
    fn cells(&self, base: &str, dir: &Path, coverage: Coverage) -> Result<Vec<Cell>> {
        let base: Value = serde_json::from_str(base).context("the scenario is no JSON")?;
        let possible =
            |cell: &[usize]| !self.impossible.iter().any(|impossible| self.all_in(&impossible.values, cell));
        let cells = coverage.cells(&self.sizes(), possible).into_iter().enumerate();
        cells.map(|(index, values)| self.cell(&base, dir, index + 1, values)).collect()
    }

    fn cell(&self, base: &Value, dir: &Path, number: usize, values: Vec<usize>) -> Result<Cell> {
        let mut json = base.clone();
        let (mut steps, mut after) = (Vec::new(), Vec::new());
        for choice in self.choices(&values) {
            json_patch::merge(&mut json, &Value::Object(choice.patch.clone()));
            for (steps, of_choice) in [(&mut steps, &choice.steps), (&mut after, &choice.after)] {
                for step in of_choice {
                    steps.push(serde_json::to_value(step).context("cannot write a step")?);
                }
            }
        }
        if let Some(own) = json["steps"].as_array() {
            let is_work = |step: &Value| step.get("power_off").is_none();
            let (work, shutdown) = own.split_at(own.iter().rposition(is_work).map_or(0, |last| last + 1));
            steps.extend(work.iter().cloned().chain(after).chain(shutdown.iter().cloned()));
        }
        let description = self.describe(&values);
        // The cell's file is in another folder than the scenario's, from where the schema's path leads nowhere.
        json.as_object_mut().map(|json| json.remove("$schema"));
        json["name"] = format!("{}-{number:02}", self.scenario).into();
        json["description"] = description.as_str().into();
        json["steps"] = steps.into();
        let text = serde_json::to_string_pretty(&json).context("cannot write a cell's scenario")?;
        let scenario = Scenario::parse(&text, dir)
            .with_context(|| format!("cell {number} ({description}) is not a valid scenario"))?;
        Ok(Cell { values, text, scenario })
    }

    fn choices(&self, values: &[usize]) -> impl Iterator<Item = &Choice> {
        self.axes.iter().zip(values).filter_map(|(axis, value)| axis.values.get(*value))
    }

    /// A cell's axes and values in one line.
    fn describe(&self, values: &[usize]) -> String {
        let named = self.axes.iter().zip(self.choices(values));
        named.map(|(axis, choice)| format!("{} {}", axis.name, choice.name)).collect::<Vec<_>>().join(", ")
    }

    /// The names of a cell's values, in the order of the axes.
    pub(super) fn names(&self, values: &[usize]) -> Vec<String> {
        self.choices(values).map(|choice| choice.name.clone()).collect()
    }
}

fn check_names<'a>(names: impl Iterator<Item = &'a String>) -> Result<()> {
    let mut seen = BTreeSet::new();
    for name in names {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte);
        ensure!(
            (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(plain),
            "{name:?} is not a name: want lower-case letters, digits, -, _ and ., at most {MAX_NAME}"
        );
        ensure!(seen.insert(name), "{name:?} is there twice");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vvu_artifacts::workspace;

    const BASE: &str = r#"{"name": "s", "description": "", "vms": {"one": {"memory_mib": 128, "cpus": 2}},
        "steps": [{"run": {"check": "work", "vm": "one", "command": "true"}}, {"power_off": {"vm": "one"}}]}"#;
    const MATRIX: &str = r#"{"scenario": "s", "axes": [
        {"name": "memory", "values": [{"name": "small"},
            {"name": "large", "patch": {"vms": {"one": {"memory_mib": 256, "cpus": null}}}}]},
        {"name": "look", "values": [{"name": "no"},
            {"name": "yes", "steps": [{"run": {"check": "looked", "vm": "one", "command": "true"}}],
                "after": [{"run": {"check": "looked-again", "vm": "one", "command": "true"}}]}]}]}"#;

    #[test]
    fn patches_are_merged_and_steps_come_first_and_before_the_shutdown() {
        let matrix = Matrix::parse(MATRIX, "s").expect("valid");
        let cells = matrix.cells(BASE, Path::new("."), Coverage::All).expect("valid");
        let shape: Vec<_> = cells
            .iter()
            .map(|cell| {
                let vm = &cell.scenario.vms["one"];
                (cell.scenario.name.as_str(), vm.memory_mib, vm.cpus, cell.scenario.steps.len())
            })
            .collect();
        assert_eq!(
            shape,
            [("s-01", 128, 2, 2), ("s-02", 128, 2, 4), ("s-03", 256, 1, 2), ("s-04", 256, 1, 4)]
        );
        assert_eq!(cells[3].scenario.description, "memory large, look yes");
        let checks: Vec<_> = cells[3].scenario.steps.iter().map(Step::check).collect();
        assert_eq!(checks, [Some("looked"), Some("work"), Some("looked-again"), None]);
        assert_eq!(matrix.names(&cells[1].values), ["small", "yes"]);
        Scenario::parse(&cells[3].text, Path::new(".")).expect("its text is a scenario file");
    }

    #[test]
    fn what_is_impossible_is_left_out() {
        let impossible = |values: &str| {
            let text = format!(r#""impossible": [{{"values": {values}, "because": "x"}}], "axes""#);
            Matrix::parse(&MATRIX.replace(r#""axes""#, &text), "s")
        };
        let matrix = impossible(r#"{"memory": "large", "look": "yes"}"#).expect("valid");
        assert_eq!(matrix.cells(BASE, Path::new("."), Coverage::All).expect("valid").len(), 3);
        for (values, want) in
            [(r#"{"memory": "huge"}"#, "huge"), ("{}", "defaults"), (r#"{"look": "no"}"#, "defaults")]
        {
            let error = format!("{:#}", impossible(values).expect_err(values));
            assert!(error.contains("at impossible[0].values") && error.contains(want), "{error}");
        }
    }

    #[test]
    fn errors_name_the_place() {
        for (from, to, want) in [
            (r#""scenario": "s""#, r#""scenario": "t""#, "at scenario"),
            (r#""name": "look""#, r#""name": "memory""#, "\"memory\" is there twice"),
            (r#""name": "yes""#, r#""name": "<b>""#, "at axes[1].values: \"<b>\""),
            (r#""name": "yes", "steps""#, r#""name": "yes", "step""#, "axes[1].values[1]"),
            (r#""name": "small""#, r#""name": "small", "patch": []"#, "axes[0].values[0].patch"),
        ] {
            assert!(MATRIX.contains(from), "{from}");
            let error = format!("{:#}", Matrix::parse(&MATRIX.replace(from, to), "s").expect_err(to));
            assert!(error.contains(want), "{to}: {error}");
        }
        let matrix = Matrix::parse(&MATRIX.replace("256", "1"), "s").expect("a matrix");
        let error = matrix.cells(BASE, Path::new("."), Coverage::Pairs).err().expect("no scenario");
        let error = format!("{error:#}");
        assert!(error.contains("cell 2 (memory large, look yes)") && error.contains("vms.one"), "{error}");
        let axis = |number: usize| {
            let values =
                (0..8).map(|value| format!(r#"{{"name": "{value}"}}"#)).collect::<Vec<_>>().join(",");
            format!(r#"{{"name": "{number}", "values": [{values}]}}"#)
        };
        let axes = (0..5).map(axis).collect::<Vec<_>>().join(",");
        let error =
            Matrix::parse(&format!(r#"{{"scenario": "s", "axes": [{axes}]}}"#), "s").expect_err("large");
        assert!(format!("{error:#}").contains("32768 combinations"), "{error:#}");
    }

    #[test]
    fn every_cell_of_every_matrix_is_a_valid_scenario() {
        let dir = workspace().join("scenarios");
        let mut seen = 0;
        for entry in fs::read_dir(dir.join("matrix")).expect("there") {
            let path = entry.expect("readable").path();
            let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
            let (_, cells) = Matrix::load(&dir, &name, Coverage::All).expect("valid");
            assert!(!cells.is_empty());
            seen += 1;
        }
        assert!(seen > 0);
        let error = Matrix::load(&dir, "console", Coverage::Pairs).err().expect("it has none");
        assert!(format!("{error:#}").contains("console has no matrix"), "{error:#}");
    }
}
