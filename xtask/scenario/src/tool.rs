//! `cargo xtask scenario`: what can be done with scenario files beside running them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;
use vvu_artifacts::workspace;

use crate::format::{SCHEMAS, Scenario, is_old, upgraded};

/// Subcommands of `cargo xtask scenario`.
#[derive(Debug, clap::Subcommand)]
pub enum Task {
    /// Check scenario files without running them
    Check {
        /// Scenario files
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Rewrite scenario and matrix files of the old format in the current one
    Upgrade {
        /// Scenario or matrix files; those in the current format stay as they are
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Print the result instead of writing the files
        #[arg(long)]
        stdout: bool,
    },
    /// Write the JSON Schemas in scenarios/schema from the types in the harness
    Schema,
}

/// Runs `cargo xtask scenario`.
///
/// # Errors
///
/// A file cannot be read or written, or is not valid; the message names the file and the place in it.
pub fn main(task: &Task) -> Result<()> {
    match task {
        Task::Check { files } => {
            for file in files {
                let scenario = Scenario::load(file)?;
                println!("{}: {} steps, valid", file.display(), scenario.unrolled(u32::MAX).len());
            }
        }
        Task::Upgrade { files, stdout } => {
            for file in files {
                upgrade(file, *stdout).with_context(|| format!("cannot upgrade {}", file.display()))?;
            }
        }
        Task::Schema => {
            for schema in &SCHEMAS {
                let path = workspace().join("scenarios").join(schema.path);
                write(&path, &schema.text()?)?;
                println!("{}", path.display());
            }
        }
    }
    Ok(())
}

fn upgrade(file: &Path, stdout: bool) -> Result<()> {
    let text = fs::read_to_string(file)?;
    let json: Value = serde_json::from_str(&text)?;
    if !is_old(&json) {
        eprintln!("{} is in the current format already", file.display());
        return Ok(());
    }
    let text = upgraded(&text)?;
    if stdout {
        print!("{text}");
        return Ok(());
    }
    write(file, &text)?;
    println!("{}", file.display());
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
