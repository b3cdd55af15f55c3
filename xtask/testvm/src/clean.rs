//! `cargo xtask clean`: removes the cache and the run directories.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use vvu_artifacts::cache::Cache;
use vvu_process::progress::Progress;

use crate::rundir::{is_locked, runs};

/// Removes the cache and the directories of runs that have ended, and returns a sentence that tells what was removed
/// and what was not.
///
/// # Errors
///
/// Fails if something cannot be removed.
pub fn all() -> Result<String> {
    let freed = Cache::open(&Progress::new(true))?.clean()?;
    let runs = runs();
    let live = remove_ended(&runs)?;
    let mut text = format!("{} MiB of cache and {} removed", freed >> 20, runs.display());
    if !live.is_empty() {
        let live: Vec<_> = live.iter().map(|path| path.display().to_string()).collect();
        text.push_str(&format!(", except for runs that are alive: {}", live.join(", ")));
    }
    Ok(text)
}

/// Removes what is in `runs` except the directories of live runs, which it returns; without one, `runs` as well.
fn remove_ended(runs: &Path) -> Result<Vec<PathBuf>> {
    let mut live = Vec::new();
    if !runs.exists() {
        return Ok(live);
    }
    let entries = fs::read_dir(runs).with_context(|| format!("cannot read {}", runs.display()))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let directory = path.is_dir() && !path.is_symlink();
        if directory && is_locked(&path) {
            live.push(path);
            continue;
        }
        let removed = if directory { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.with_context(|| format!("cannot remove {}", path.display()))?;
    }
    live.sort();
    if live.is_empty() {
        fs::remove_dir(runs).with_context(|| format!("cannot remove {}", runs.display()))?;
    }
    Ok(live)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rundir::RunDir;

    #[test]
    fn a_run_that_is_alive_stays_until_it_has_ended() {
        let parent = tempfile::tempdir().expect("a directory");
        let runs = parent.path().join("e2e");
        let ended = RunDir::create(&runs, "ended").expect("a run directory").path().to_owned();
        let live = RunDir::create(&runs, "live").expect("a run directory");
        live.write("device-console.log", "").expect("written");
        assert_eq!(remove_ended(&runs).expect("cleaned"), [live.path()]);
        assert!(!ended.exists() && live.file("device-console.log").exists());
        drop(live);
        assert_eq!(remove_ended(&runs).expect("cleaned"), Vec::<PathBuf>::new());
        assert!(!runs.exists());
        remove_ended(&runs).expect("nothing to do");
    }
}
