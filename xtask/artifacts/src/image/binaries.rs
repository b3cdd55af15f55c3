//! Our own programs in the guests: PID 1, `vvu` and `vvu-load`, static.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cargo::{cargo, target_directory, workspace};
use crate::machine::Machine;
use vvu_process::logged;
use vvu_process::progress::{Progress, Stage};

/// Cargo's profile, and the directory below the target directory that has its builds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BuildProfile {
    /// Optimized.
    Guest,
    /// Built sooner and slower to run.
    Quick,
}

impl BuildProfile {
    fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Quick => "quick",
        }
    }
}

/// The paths of the built programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestBinaries {
    /// PID 1.
    pub init: PathBuf,
    /// The `vvu` program, which runs on the host as well: the proxy.
    pub vvu: PathBuf,
    /// I/O load for a guest's disk.
    pub load: PathBuf,
}

impl GuestBinaries {
    /// Builds them with the cargo that runs this program.
    ///
    /// # Errors
    ///
    /// Cargo fails.
    pub fn build(progress: &Progress, profile: BuildProfile) -> Result<Self> {
        let stage = progress.stage("guest build");
        let packages = ["vvu-init", "vvu", "vvu-load"].map(|package| ["--package", package]);
        let built = build(&stage, profile, &[packages.as_flattened(), &["--bins"]].concat())?;
        stage.done("static vvu-init, vvu and vvu-load");
        Ok(Self { init: built.join("vvu-init"), vvu: built.join("vvu"), load: built.join("vvu-load") })
    }
}

/// Builds this program for the guests and returns its path.
///
/// # Errors
///
/// Cargo fails.
pub fn build_xtask(progress: &Progress) -> Result<PathBuf> {
    let stage = progress.stage("xtask build");
    let built = build(&stage, BuildProfile::Guest, &["--package", "xtask", "--bins"])?;
    stage.done("static xtask");
    Ok(built.join("xtask"))
}

/// Builds an example of `vvu` for the guests and returns its path.
///
/// # Errors
///
/// Cargo fails.
pub(super) fn build_example(stage: &Stage, name: &str) -> Result<PathBuf> {
    let built = build(stage, BuildProfile::Guest, &["--package", "vvu", "--example", name])?;
    Ok(built.join("examples").join(name))
}

/// Builds what the arguments `wanted` of cargo name, and returns the directory with the programs.
fn build(stage: &Stage, profile: BuildProfile, wanted: &[&str]) -> Result<PathBuf> {
    let root = workspace();
    let triple = Machine::host()?.rust_target;
    // A directory of its own: other flags would throw the developer's build away.
    let target = target_directory().join(profile.name());
    fs::create_dir_all(&target).with_context(|| format!("cannot create {}", target.display()))?;
    let mut command = cargo();
    command
        .current_dir(root)
        .arg("build")
        .args(wanted)
        .args(["--profile", profile.name(), "--target", triple, "--target-dir"])
        .arg(&target)
        .env("CARGO_ENCODED_RUSTFLAGS", flags(root))
        .env("CARGO_TERM_COLOR", "never");
    logged::run(command, &target.join("build.log"), |line| stage.update(line.trim()))?;
    Ok(target.join(triple).join(profile.name()))
}

/// Flags for static programs without the path of the source in panic messages, so that every checkout gives the same
/// bytes.
fn flags(root: &Path) -> OsString {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    let mut flags = OsString::from("-Ctarget-feature=+crt-static");
    for (from, to) in [(Some(root.to_owned()), "/vvu"), (home, "/cargo")] {
        if let Some(from) = from {
            // CARGO_ENCODED_RUSTFLAGS separates by this character.
            flags.push("\u{1f}--remap-path-prefix=");
            flags.push(from);
            flags.push("=");
            flags.push(to);
        }
    }
    flags
}
