//! The cargo that builds the guests' programs, and where it puts them.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde::Deserialize;

/// The root directory of the workspace.
#[must_use]
pub fn workspace() -> &'static Path {
    let artifacts = Path::new(env!("CARGO_MANIFEST_DIR"));
    artifacts.ancestors().nth(2).unwrap_or(artifacts)
}

/// Cargo's target directory for the workspace: what `CARGO_TARGET_DIR` or cargo's configuration names, else `target`.
#[must_use]
pub fn target_directory() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| find_target(workspace(), env::var_os("CARGO_TARGET_DIR")))
}

/// A command that runs cargo: the one that runs this program, if it was cargo.
pub(crate) fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

fn find_target(workspace: &Path, variable: Option<OsString>) -> PathBuf {
    #[derive(Deserialize)]
    struct Metadata {
        target_directory: PathBuf,
    }
    if let Some(directory) = variable {
        return workspace.join(directory);
    }
    let mut command = cargo();
    command.args(["metadata", "--no-deps", "--offline", "--format-version", "1"]).current_dir(workspace);
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output();
    let metadata = output.ok().and_then(|output| serde_json::from_slice::<Metadata>(&output.stdout).ok());
    // A machine without cargo, such as the outer VM of a nested run, has no configuration of cargo either.
    metadata.map_or_else(|| workspace.join("target"), |metadata| metadata.target_directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_target_directory_is_the_one_that_cargo_uses() {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().expect("has one")).expect("made");
            fs::write(path, text).expect("written");
        };
        write("Cargo.toml", "[package]\nname = \"x\"\nversion = \"0.1.0\"\nedition = \"2024\"\n");
        write("src/lib.rs", "");
        write(".cargo/config.toml", "[build]\ntarget-dir = \"elsewhere\"\n");
        assert_eq!(find_target(dir.path(), None), dir.path().join("elsewhere"));
        assert_eq!(find_target(dir.path(), Some("/t".into())), Path::new("/t"));
        let none = tempfile::tempdir().expect("a directory");
        assert_eq!(find_target(none.path(), None), none.path().join("target"));
    }
}
