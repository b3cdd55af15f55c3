//! The JSON Schemas of scenario and matrix files, derived from their types.

use anyhow::Result;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema};

use super::layout::to_text;
use super::matrix::Matrix;
use super::scenario::Scenario;

/// A JSON Schema that is checked in.
pub struct SchemaFile {
    /// Path of the file, relative to `scenarios`.
    pub path: &'static str,
    schema: fn() -> Schema,
}

/// The schemas that are checked in.
pub const SCHEMAS: [SchemaFile; 2] = [
    SchemaFile { path: "schema/scenario.schema.json", schema: schema::<Scenario> },
    SchemaFile { path: "schema/matrix.schema.json", schema: schema::<Matrix> },
];

impl SchemaFile {
    /// The text of the file.
    ///
    /// # Errors
    ///
    /// None that a caller can cause.
    pub fn text(&self) -> Result<String> {
        to_text(&(self.schema)())
    }
}

fn schema<T: JsonSchema>() -> Schema {
    SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<T>()
}

#[cfg(test)]
#[path = "schema_test.rs"]
mod tests;
