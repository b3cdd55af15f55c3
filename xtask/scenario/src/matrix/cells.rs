//! Makes the variants of a scenario that a matrix file describes.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use super::cover::Coverage;
use crate::format::{Matrix, Scenario};

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
    /// for. `change` is applied to the scenario first.
    ///
    /// # Errors
    ///
    /// There is no such scenario, it has no matrix, or a file or a cell is not valid. The message names the file or the
    /// cell, and the place in it as a JSON path.
    pub fn load(
        dir: &Path,
        name: &str,
        coverage: Coverage,
        change: impl FnOnce(&mut Scenario) -> Result<()>,
    ) -> Result<(Self, Vec<Cell>)> {
        // If there is no such scenario, this error lists those there are.
        let mut scenario = crate::format::find(dir, name)?;
        change(&mut scenario)?;
        let path = dir.join("matrix").join(format!("{name}.json"));
        let text = fs::read_to_string(&path)
            .with_context(|| format!("{name} has no matrix: cannot read {}", path.display()))?;
        let base = serde_json::to_value(&scenario).context("cannot write the scenario")?;
        let matrix =
            Self::parse(&text, name).with_context(|| format!("{} is not a valid matrix", path.display()))?;
        let cells = matrix.cells(&base, dir, coverage)?;
        Ok((matrix, cells))
    }

    /// Makes the cells of the scenario `base`.
    fn cells(&self, base: &Value, dir: &Path, coverage: Coverage) -> Result<Vec<Cell>> {
        let possible =
            |cell: &[usize]| !self.impossible.iter().any(|impossible| self.all_in(&impossible.values, cell));
        let cells = coverage.cells(&self.sizes(), possible).into_iter().enumerate();
        cells.map(|(index, values)| self.cell(base, dir, index + 1, values)).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Step;
    use vvu_artifacts::workspace;

    const BASE: &str = r#"{"name": "s", "description": "", "vms": {"one": {"memory_mib": 128, "cpus": 2}},
        "steps": [{"run": {"check": "work", "vm": "one", "command": "true"}}, {"power_off": {"vm": "one"}}]}"#;
    const MATRIX: &str = r#"{"scenario": "s", "axes": [
        {"name": "memory", "values": [{"name": "small"},
            {"name": "large", "patch": {"vms": {"one": {"memory_mib": 256, "cpus": null}}}}]},
        {"name": "look", "values": [{"name": "no"},
            {"name": "yes", "steps": [{"run": {"check": "looked", "vm": "one", "command": "true"}}],
                "after": [{"run": {"check": "looked-again", "vm": "one", "command": "true"}}]}]}]}"#;

    fn base() -> Value {
        serde_json::from_str(BASE).expect("JSON")
    }

    #[test]
    fn patches_are_merged_and_steps_come_first_and_before_the_shutdown() {
        let matrix = Matrix::parse(MATRIX, "s").expect("valid");
        let cells = matrix.cells(&base(), Path::new("."), Coverage::All).expect("valid");
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
        assert_eq!(matrix.cells(&base(), Path::new("."), Coverage::All).expect("valid").len(), 3);
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
        let error = matrix.cells(&base(), Path::new("."), Coverage::Pairs).err().expect("no scenario");
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
            let (_, cells) = Matrix::load(&dir, &name, Coverage::All, |_| Ok(())).expect("valid");
            assert!(!cells.is_empty());
            seen += 1;
        }
        assert!(seen > 0);
        let error = Matrix::load(&dir, "console", Coverage::Pairs, |_| Ok(())).err().expect("it has none");
        assert!(format!("{error:#}").contains("console has no matrix"), "{error:#}");
    }
}
