//! A distribution's own kernel with its modules, unpacked from its package.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::modules::Modules;
use super::{Kernel, VMLINUX, digest, image};
use crate::apt::{self, Apt, Suites};
use crate::cache::{Cache, Key};
use crate::machine::{KernelFormat, Machine};
use crate::packages::{self, Package};
use crate::versions::Versions;
use vvu_process::progress::{Progress, Stage};

/// Packages that the host needs to take such a kernel apart.
const PACKAGES: [Package; 3] = [
    packages::program("dpkg", "dpkg-deb"),
    packages::program("xz-utils", "xz"),
    packages::program("zstd", "zstd"),
];
/// Packages with a kernel or modules, by the beginnings of their names. Whatever else a kernel depends on is for making
/// it boot on the host.
const KERNEL_PREFIXES: [&str; 4] = ["linux-image-", "linux-binary-", "linux-modules-", "linux-base-"];
/// Where packages have modules: since `/usr` was merged, and before.
const MODULE_PLACES: [&str; 2] = ["usr/lib/modules", "lib/modules"];
const MODULES: &str = "modules";
const FACTS: &str = "kernel.json";

/// A package, and the suites that it comes from.
#[derive(Debug, PartialEq, Eq)]
struct Choice {
    /// Empty for the machine's own.
    suites: Vec<String>,
    package: String,
}

impl Choice {
    /// What the user or a scenario means by `name`.
    fn of(name: &str, architecture: &str) -> Result<Self> {
        let versions = Versions::read()?;
        if !name.starts_with("linux-") {
            let kernel = versions.kernel_package(name).with_context(|| {
                format!(
                    "{name:?} is no package with a kernel either: want one such as linux-image-{architecture}"
                )
            })?;
            let flavour = kernel.flavour.map(|flavour| format!("{flavour}-")).unwrap_or_default();
            let suites = kernel.suites.iter().map(|&suite| suite.to_owned()).collect();
            return Ok(Self { suites, package: format!("linux-image-{flavour}{architecture}") });
        }
        let (package, suite) = name.split_once('/').map_or((name, None), |(name, suite)| (name, Some(suite)));
        let plain = |text: &str| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
            !text.is_empty() && text.bytes().all(allowed)
        };
        if !plain(package) || !suite.is_none_or(plain) {
            bail!("{name:?} is no package: want one such as linux-image-{architecture} or PACKAGE/SUITE");
        }
        Ok(Self { suites: suite.map(str::to_owned).into_iter().collect(), package: package.to_owned() })
    }
}

/// Facts that are stored beside an unpacked kernel.
#[derive(Serialize, Deserialize)]
struct Facts {
    version: String,
    config_digest: String,
}

/// Obtains the kernel that `name` stands for.
pub(super) fn obtain(progress: &Progress, cache: &Cache, name: &str) -> Result<Kernel> {
    let machine = Machine::host()?;
    let choice = Choice::of(name, machine.debian.architecture)?;
    packages::ensure(progress, cache, &PACKAGES)?;
    let mut key = Key::new().part("suites", choice.suites.join(" ")).part("package", &choice.package);
    if choice.suites.is_empty() {
        key = key.part("release", fs::read_to_string("/etc/os-release").unwrap_or_default());
    }
    let stage = progress.stage("kernel");
    let entry = cache.entry("kernel-package", &key, |dir| unpack(cache, &stage, &choice, machine, dir))?;
    let bytes = fs::read(entry.path.join(FACTS)).context("the kernel's facts are missing")?;
    let facts: Facts = serde_json::from_slice(&bytes).context("the kernel's facts are unreadable")?;
    let modules = Modules::open(&entry.path.join(MODULES))?;
    stage.done(format!("Linux {} of {}, {} modules", facts.version, choice.package, modules.len()));
    Ok(Kernel {
        vmlinux: entry.path.join(VMLINUX),
        version: facts.version,
        config_digest: facts.config_digest,
        modules: Some(modules),
    })
}

/// Downloads the packages and keeps of them in `dir` what guests need.
fn unpack(cache: &Cache, stage: &Stage, choice: &Choice, machine: &Machine, dir: &Path) -> Result<()> {
    let suites: Vec<&str> = choice.suites.iter().map(String::as_str).collect();
    let suites = if suites.is_empty() { Suites::Machine } else { Suites::Named(&suites) };
    let apt = Apt::open(cache, stage, suites)?;
    let names = apt.depends(&choice.package, &KERNEL_PREFIXES)?;
    let debs = apt.download(&names.iter().map(String::as_str).collect::<Vec<_>>())?;
    let root = dir.join("root");
    for deb in &debs {
        stage.update("unpacking the kernel");
        apt::unpack(deb, &root)?;
    }
    drop(apt);
    let whose = names.join(" ");
    let modules = MODULE_PLACES.iter().filter_map(|place| only_directory(&root.join(place))).next();
    let modules =
        modules.with_context(|| format!("{whose}: want modules of one kernel in {}", MODULE_PLACES[0]))?;
    let version = modules.file_name().unwrap_or_default().to_string_lossy();
    let files = [root.join(format!("boot/vmlinuz-{version}")), modules.join("vmlinuz")];
    let file = files.iter().find(|file| file.is_file());
    let file = file.with_context(|| format!("{whose}: want the kernel to be boot/vmlinuz-{version}"))?;
    let inspected = image::inspect(file, machine.kernel.format)?;
    keep_image(file, machine.kernel.format, &dir.join(VMLINUX))?;
    fs::rename(&modules, dir.join(MODULES)).context("cannot move the kernel's modules")?;
    let config_digest = inspected.config.as_ref().map(digest).unwrap_or_default();
    let facts = Facts { version: inspected.version, config_digest };
    let bytes = serde_json::to_vec_pretty(&facts).context("cannot encode the kernel's facts")?;
    fs::write(dir.join(FACTS), bytes).context("cannot write to the cache")?;
    fs::remove_dir_all(&root).context("cannot tidy the cache")
}

/// Keeps the kernel as the VMM starts it soonest: the file in a bzImage rather than the bzImage.
fn keep_image(file: &Path, format: KernelFormat, target: &Path) -> Result<()> {
    let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let payload = match format {
        KernelFormat::Pvh => image::pvh_payload(&bytes),
        KernelFormat::Arm64Image => None,
    };
    fs::write(target, payload.unwrap_or(bytes)).with_context(|| format!("cannot write {}", target.display()))
}

/// The one directory in a directory.
fn only_directory(dir: &Path) -> Option<PathBuf> {
    let mut directories =
        fs::read_dir(dir).ok()?.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_dir());
    directories.next().filter(|_| directories.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stands_for_a_package_and_its_suites() {
        let choice = |name: &str| Choice::of(name, "amd64").expect("known");
        let want = |suites: &[&str], package: &str| Choice {
            suites: suites.iter().map(|&suite| suite.to_owned()).collect(),
            package: package.to_owned(),
        };
        assert_eq!(choice("distribution"), want(&["trixie"], "linux-image-cloud-amd64"));
        assert_eq!(choice("debian-12"), want(&["bookworm"], "linux-image-amd64"));
        assert_eq!(choice("linux-image-rt-amd64"), want(&[], "linux-image-rt-amd64"));
        assert_eq!(choice("linux-image-amd64/sid"), want(&["sid"], "linux-image-amd64"));
        for (name, said) in
            [("debian-1", "known are"), ("linux-image /x", "is no package"), ("linux-x/", "is no")]
        {
            let error = format!("{:#}", Choice::of(name, "amd64").expect_err("refused"));
            assert!(error.contains(said), "{error}");
        }
    }
}
