//! Back-ends for device VMs, other projects' and our examples, by the names and versions in
//! `guest-images/programs.json`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::binaries::build_example;
use crate::apt::{self, Apt, Suites};
use crate::cache::{Cache, Key, sha256_file};
use crate::cargo::cargo;
use crate::machine::Machine;
use crate::packages;
use crate::versions::Versions;
use vvu_process::logged;
use vvu_process::progress::{Progress, Stage};

/// In the list, what stands for the machine's library folder.
const LIBRARIES: &str = "{libraries}";

/// The source of a program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Source {
    /// Files of a Debian package; the libraries that they need come along.
    Package {
        package: String,
        /// When the archive has it no longer, the version that it has instead is taken, and said.
        version: String,
        files: Vec<String>,
    },
    /// The programs of a crate from the Rust registry, built static into `usr/bin`.
    Crate {
        #[serde(rename = "crate")]
        name: String,
        version: String,
    },
    /// An example of `vvu`, built static into `usr/bin`.
    Example {
        #[serde(rename = "example")]
        name: String,
    },
}

/// Part of this program, which runs without the source too: in the outer VM of `e2e --nested`.
const LIST: &str = include_str!("../../../../guest-images/programs.json");

/// The programs there are, by name.
#[derive(Debug, Clone)]
pub struct GuestPrograms(BTreeMap<String, Source>);

impl GuestPrograms {
    /// Reads the list.
    ///
    /// # Errors
    ///
    /// The list is malformed.
    pub fn read() -> Result<Self> {
        let list = LIST.replace(LIBRARIES, &Machine::host()?.libraries());
        let programs = serde_json::from_str(&list).context("guest-images/programs.json is malformed")?;
        Ok(Self(programs))
    }

    /// Fails unless there is a program `name`.
    ///
    /// # Errors
    ///
    /// There is none; the message lists those there are.
    pub fn check(&self, name: &str) -> Result<()> {
        self.source(name).map(drop)
    }

    /// The version of the program `name`; an example has none.
    pub fn version(&self, name: &str) -> Option<&str> {
        match self.0.get(name)? {
            Source::Package { version, .. } | Source::Crate { version, .. } => Some(version),
            Source::Example { .. } => None,
        }
    }

    fn source(&self, name: &str) -> Result<&Source> {
        let known = || self.0.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        self.0.get(name).with_context(|| {
            format!("no program {name:?} in guest-images/programs.json: known are {}", known())
        })
    }

    /// A tree to lay over a guest's root, with the program `name` and all that it needs.
    ///
    /// # Errors
    ///
    /// There is no such program, or it cannot be downloaded or built.
    pub fn obtain(&self, name: &str, progress: &Progress, cache: &Cache) -> Result<PathBuf> {
        let source = self.source(name)?;
        let stage = progress.stage(name);
        let mut key =
            Key::new().part("source", serde_json::to_vec(source).context("cannot encode a program")?);
        let mut built = PathBuf::new();
        if let Source::Example { name } = source {
            // Cargo decides whether it has to be built again.
            built = build_example(&stage, name)?;
            key = key.part("program", sha256_file(&built)?);
        }
        let entry = cache.entry("programs", &key, |dir| match source {
            Source::Package { package, version, files } => {
                from_package(progress, cache, &stage, package, version, files, dir)
            }
            Source::Crate { name, version } => from_crate(cache, &stage, name, version, dir),
            Source::Example { name } => copy(&built, &dir.join("usr/bin").join(name)),
        })?;
        stage.done(match source {
            Source::Package { package, version, .. } => format!("Debian's {package} {version}"),
            Source::Crate { name, version } => format!("crate {name} {version}"),
            Source::Example { name } => format!("example {name}"),
        });
        Ok(entry.path)
    }
}

fn from_crate(cache: &Cache, stage: &Stage, name: &str, version: &str, dir: &Path) -> Result<()> {
    // Goes away with the entry's temporary directory if this run dies.
    let work = dir.join("work");
    let mut command = cargo();
    command
        .args(["install", "--locked", "--target", Machine::host()?.rust_target])
        .args(["--config", "profile.release.strip=true"])
        .arg("--root")
        .arg(work.join("root"))
        .arg("--target-dir")
        .arg(work.join("target"))
        .arg(format!("{name}@{version}"))
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static")
        .env("CARGO_TERM_COLOR", "never")
        .current_dir("/");
    let log = cache.dir("logs")?.join(format!("crate-{name}.log"));
    logged::run(command, &log, |line| stage.update(line.trim()))?;
    let programs = dir.join("usr");
    fs::create_dir(&programs).with_context(|| format!("cannot create {}", programs.display()))?;
    fs::rename(work.join("root/bin"), programs.join("bin")).context("the crate brought no program")?;
    // Another thread removes it.
    cache.discard(&work).map(drop)
}

fn from_package(
    progress: &Progress,
    cache: &Cache,
    stage: &Stage,
    package: &str,
    version: &str,
    files: &[String],
    dir: &Path,
) -> Result<()> {
    packages::ensure(progress, cache, &[packages::program("dpkg", "dpkg-deb")])?;
    // The same suites as QEMU's, so that both run with the same libraries.
    let versions = Versions::read()?;
    let machine = Machine::host()?;
    let folder = machine.libraries();
    let loader = format!("{}/{}", machine.debian.loader_folder, machine.debian.loader);
    let temporary = tempfile::tempdir().context("cannot create a temporary directory")?;
    let root = temporary.path();
    {
        let apt = Apt::open(cache, stage, Suites::Named(&versions.default_qemu()?.suites))?;
        let debs = match apt.download_with_dependencies(&[&format!("{package}={version}")]) {
            Ok(debs) => debs,
            Err(error) => {
                let debs = apt.download_with_dependencies(&[package]).map_err(|_| error)?;
                progress.note(format!(
                    "Debian no longer has {package} {version}, which guest-images/programs.json names: taking what it has"
                ));
                debs
            }
        };
        for deb in debs {
            apt::unpack(&deb, root)?;
        }
    }
    let (loader_in_guest, loader) = (dir.join(&loader), root.join("usr").join(&loader));
    copy(&loader, &loader_in_guest)?;
    for file in files {
        let program = root.join(file);
        copy(&program, &dir.join(file))?;
        let output = Command::new(&loader)
            .arg("--library-path")
            .arg(root.join(&folder))
            .arg("--list")
            .arg(&program)
            .output()
            .with_context(|| format!("cannot run {}", loader.display()))?;
        ensure!(output.status.success(), "{file}: {}", String::from_utf8_lossy(&output.stderr).trim());
        for (name, path) in libraries(&String::from_utf8_lossy(&output.stdout))? {
            copy(Path::new(path), &dir.join(&folder).join(name))?;
        }
    }
    Ok(())
}

/// Name and path of each library in what the loader lists for a program.
pub(super) fn libraries(list: &str) -> Result<Vec<(&str, &str)>> {
    let mut found = Vec::new();
    // The kernel's own library and the loader have no arrow, or no plain name before it.
    for (name, target) in list.lines().filter_map(|line| line.trim().split_once(" => ")) {
        if name.contains('/') {
            continue;
        }
        let Some((path, _)) = target.split_once(" (") else {
            bail!("library {name}: {target}");
        };
        found.push((name, path));
    }
    Ok(found)
}

/// Copies a file, or what a symbolic link leads to, with the directories above it.
pub(super) fn copy(from: &Path, to: &Path) -> Result<()> {
    create_parent(to)?;
    fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {}", from.display()))
}

/// Creates the directories above `path`.
pub(super) fn create_parent(path: &Path) -> Result<()> {
    let parent = path.parent().context("a file is in a directory")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_well_formed_and_an_unknown_program_is_answered_with_those_there_are() {
        let programs = GuestPrograms::read().expect("well formed");
        programs.check("virtiofsd").expect("known");
        let error = programs.check("nonesuch").expect_err("unknown").to_string();
        assert!(error.contains("nonesuch") && error.contains("virtiofsd"), "{error}");
    }

    #[test]
    fn the_loaders_list_is_understood() {
        let list = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /r/usr/lib/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 => /r/usr/lib64/ld.so (0x00007f)\n";
        assert_eq!(libraries(list).expect("complete"), [("libc.so.6", "/r/usr/lib/libc.so.6")]);
        let error = libraries("\tlibx.so.1 => not found\n").expect_err("missing").to_string();
        assert!(error.contains("libx.so.1"), "{error}");
    }
}
