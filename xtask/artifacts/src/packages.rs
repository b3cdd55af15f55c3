//! Packages of the host: apt installs missing ones if that needs no password, else the message names the command.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::host_system::HostSystem;
use vvu_process::logged;
use vvu_process::progress::Progress;

/// A Debian package, and how to see that it, or a replacement, is installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Package {
    /// The name of the package for apt.
    pub name: &'static str,
    /// Something that the package installs.
    pub brings: Brings,
}

/// Something whose presence shows, on any distribution, that a package is installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Brings {
    /// A program in `PATH` or in the system's directories.
    Program(&'static str),
    /// A file, by absolute path.
    File(&'static str),
}

/// A package that brings a program.
pub(crate) const fn program(name: &'static str, program: &'static str) -> Package {
    Package { name, brings: Brings::Program(program) }
}

/// A package that brings a file.
pub(crate) const fn file(name: &'static str, path: &'static str) -> Package {
    Package { name, brings: Brings::File(path) }
}

/// Installs the packages that are missing.
///
/// # Errors
///
/// Something is missing and cannot be installed without a password (the message has the command), or apt fails.
pub fn ensure(progress: &Progress, cache: &Cache, packages: &[Package]) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> =
        std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from)).collect();
    let missing = || -> Vec<&'static str> {
        packages
            .iter()
            .filter(|package| !is_there(package.brings, &dirs))
            .map(|package| package.name)
            .collect()
    };
    if missing().is_empty() {
        return Ok(());
    }
    let command = |names: &[&str]| format!("apt-get install --no-install-recommends {}", names.join(" "));
    let Some(prefix) = privilege() else {
        let names = missing();
        if is_there(Brings::Program("apt-get"), &dirs) {
            bail!("packages are missing; run: sudo {}", command(&names));
        }
        match HostSystem::this() {
            Some(system) => bail!("packages are missing; run: {}", system.install_command(&names)),
            None => bail!("install these, by the names your distribution has for them: {}", names.join(" ")),
        }
    };

    // Another run may be installing the same.
    let _lock = cache.lock("packages")?;
    let names = missing();
    if names.is_empty() {
        return Ok(());
    }
    progress.note(format!("installing missing packages: {}", command(&names)));
    let stage = progress.stage("packages");
    let log = cache.dir("logs")?.join("packages.log");
    let apt = |args: &[&str]| {
        let mut words =
            prefix.iter().chain(["env", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "apt-get"].iter());
        let mut command = Command::new(words.next().copied().unwrap_or("env"));
        command.args(words).args(["-q", "-y", "-o", "DPkg::Lock::Timeout=600"]).args(args);
        stage.update(args.join(" "));
        logged::run_undisturbed(command, &log)
    };
    let mut install = vec!["install", "--no-install-recommends"];
    install.extend(&names);
    // Package lists that are absent or old are no reason to refresh good ones first.
    if apt(&install).is_err() {
        apt(&["update"])?;
        apt(&install).with_context(|| format!("cannot install packages; try: {}", command(&names)))?;
    }
    let left = missing();
    if !left.is_empty() {
        bail!("apt installed {} but what they should bring is not there", left.join(" "));
    }
    stage.done(names.join(" "));
    Ok(())
}

/// The words that run a command as root without a password: none for root, `sudo -n`; `None` if there is no way.
pub fn privilege() -> Option<&'static [&'static str]> {
    let apt = Command::new("apt-get").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !apt.is_ok_and(|status| status.success()) {
        return None;
    }
    if rustix::process::geteuid().is_root() {
        return Some(&[]);
    }
    let sudo = Command::new("sudo")
        .args(["-n", "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    sudo.is_ok_and(|status| status.success()).then_some(&["sudo", "-n"])
}

fn is_there(brings: Brings, dirs: &[PathBuf]) -> bool {
    match brings {
        Brings::Program(name) => dirs.iter().any(|dir| dir.join(name).is_file()),
        Brings::File(path) => Path::new(path).exists(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_up_and_files_checked() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(dir.path().join("cc"), "").expect("written");
        std::fs::create_dir(dir.path().join("ld")).expect("made");
        let dirs = [dir.path().to_owned()];
        assert!(is_there(Brings::Program("cc"), &dirs));
        assert!(!is_there(Brings::Program("ld"), &dirs), "a directory is no program");
        assert!(!is_there(Brings::Program("as"), &dirs));
        assert!(is_there(Brings::File("/proc/self/stat"), &[]));
        assert!(!is_there(Brings::File("/proc/self/absent"), &[]));
    }

    #[test]
    fn nothing_missing_is_silent_and_touches_nothing() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let progress = Progress::new(true);
        let cache = Cache::open_at(dir.path().join("vvu"), &progress).expect("opens");
        ensure(&progress, &cache, &[program("dash", "sh"), file("base-files", "/proc/self/stat")])
            .expect("all there");
        assert!(!dir.path().join("vvu/packages.lock").exists());
    }
}
