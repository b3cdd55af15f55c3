//! `cargo xtask clean`: removes the cache and the run directories.

use std::fs;

use anyhow::{Context, Result};
use vvu_artifacts::cache::Cache;
use vvu_process::progress::Progress;

use crate::rundir::runs;

/// Removes the cache and the run directories and returns a sentence that tells what was removed.
///
/// # Errors
///
/// Fails if something cannot be removed.
pub fn all() -> Result<String> {
    let freed = Cache::open(&Progress::new(true))?.clean()?;
    let runs = runs();
    if runs.exists() {
        fs::remove_dir_all(&runs).with_context(|| format!("cannot remove {}", runs.display()))?;
    }
    Ok(format!("{} MiB of cache and {} removed", freed >> 20, runs.display()))
}
