//! The types of a matrix file, `scenarios/matrix/NAME.json`, and what they must fulfil beyond their format.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, anyhow, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::step::Step;
use super::version::is_old;

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
    pub schema: Option<String>,
    /// Name of the scenario; the matrix file has the same name.
    pub scenario: String,
    /// Combinations of values that are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub impossible: Vec<Impossible>,
    /// What varies. A cell, which is one run, has one value of each axis.
    #[schemars(length(min = 1))]
    pub axes: Vec<Axis>,
}

/// A combination of values that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Impossible {
    /// One value each of some axes, by the axis' name.
    pub values: BTreeMap<String, String>,
    /// The reason, which the reports repeat.
    pub because: String,
}

/// A property that varies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Axis {
    /// Name of the property, such as `kernel`.
    pub name: String,
    /// Its values; the first is the default.
    #[schemars(length(min = 1))]
    pub values: Vec<Choice>,
}

/// A value of an axis.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// Name of the value, such as `6.1`.
    pub name: String,
    /// JSON merge patch (RFC 7396) that gives the scenario this value.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub patch: Map<String, Value>,
    /// Steps that are carried out before the scenario's, for example to check that the guest sees the value.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
    /// Steps that are carried out after the scenario's, before the VMs are shut down.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<Step>,
}

impl Matrix {
    /// Reads and checks the text of the matrix file of the scenario `name`.
    ///
    /// # Errors
    ///
    /// The text is no valid matrix. The message names the place in it as a JSON path.
    pub fn parse(text: &str, name: &str) -> Result<Self> {
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

    /// Returns true if the cell has all of `values`, whose keys are names of axes.
    pub(crate) fn all_in(&self, values: &BTreeMap<String, String>, cell: &[usize]) -> bool {
        let named = self.axes.iter().zip(self.choices(cell));
        named.filter(|(axis, choice)| values.get(&axis.name) == Some(&choice.name)).count() == values.len()
    }

    /// How many values each axis has.
    pub(crate) fn sizes(&self) -> Vec<usize> {
        self.axes.iter().map(|axis| axis.values.len()).collect()
    }

    /// The values of a cell, given as one index for each axis.
    pub(crate) fn choices(&self, values: &[usize]) -> impl Iterator<Item = &Choice> {
        self.axes.iter().zip(values).filter_map(|(axis, value)| axis.values.get(*value))
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
