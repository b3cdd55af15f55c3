//! The kernel's source: Debian's linux-source package, a tarball, or a tree.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use xshell::{Shell, cmd};

use crate::apt::{self, Apt, Suites};
use crate::cache::{Cache, Key, sha256_file};
use crate::machine::Machine;
use crate::versions::KernelSource;
use vvu_process::logged;
use vvu_process::progress::Progress;

/// The series the guests are made for; taken when the machine's suites have it.
const PREFERRED: &str = "linux-source-6.12";
const PREFIX: &str = "linux-source-";
const NAME_FILE: &str = "name";
const DIGEST_FILE: &str = "sha256";
const DEB_FILE: &str = "linux-source.deb";
/// Files that a build for a guest never reads. With those of other architectures they are two thirds of all files.
const EXCLUDED: [&str; 6] = [
    "*.dts*",
    "*/Documentation/*/*",
    "*/tools/testing/*",
    "*/tools/perf/*",
    "*/samples/*.c",
    "*/sound/*.[ch]",
];
/// The same for drivers of real hardware, by directory under `drivers`. Their Kconfig files are read all the same. A
/// fragment that asks for one of them needs an unpacked tree (`--kernel-source DIR`).
const EXCLUDED_DRIVERS: [&str; 26] = [
    "accel",
    "clk",
    "crypto",
    "gpu",
    "hwmon",
    "i2c",
    "iio",
    "infiniband",
    "input",
    "leds",
    "media",
    "mfd",
    "mmc",
    "mtd",
    "net/ethernet",
    "net/wireless",
    "nvme",
    "phy",
    "pinctrl",
    "power",
    "regulator",
    "scsi",
    "soc",
    "spi",
    "staging",
    "usb",
];

/// A kernel source that is not unpacked yet, or a tree as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// Something to unpack.
    Archive {
        /// A Debian package or a tarball.
        path: PathBuf,
        /// The file's SHA-256.
        digest: String,
        /// The name that messages give it.
        name: String,
    },
    /// A tree that stays where it is.
    Tree(PathBuf),
}

impl Source {
    /// The source at the path that the user gave, or Debian's: `named`, or that of the machine's suites.
    pub(super) fn obtain(
        progress: &Progress,
        cache: &Cache,
        wanted: Option<&Path>,
        named: Option<&KernelSource<'_>>,
    ) -> Result<Self> {
        let Some(path) = wanted else { return package(progress, cache, named) };
        let path = std::path::absolute(path).context("the working directory is gone")?;
        let meta = fs::metadata(&path).with_context(|| format!("--kernel-source {}", path.display()))?;
        if !meta.is_dir() {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Ok(Self::Archive { digest: sha256_file(&path)?, path, name });
        }
        if !path.join("Kconfig").is_file() || !path.join("scripts/kconfig").is_dir() {
            bail!("--kernel-source {} is not the top of a kernel tree (it has no Kconfig)", path.display());
        }
        Ok(Self::Tree(path))
    }
}

/// A linux-source package of Debian's, kept in the cache so that a rebuild needs no network: `named`, or the most
/// suitable of the machine's suites.
fn package(progress: &Progress, cache: &Cache, named: Option<&KernelSource<'_>>) -> Result<Source> {
    let key = match named {
        None => {
            let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
            Key::new().part("release", release).part("preferred", PREFERRED)
        }
        Some(KernelSource { suites, package, .. }) => {
            Key::new().part("suites", suites.join(" ")).part("package", package.unwrap_or("newest"))
        }
    };
    let entry = cache.entry("linux-source", &key, |dir| {
        let stage = progress.stage("kernel source");
        let suites = named.map_or(Suites::Machine, |source| Suites::Named(&source.suites));
        let apt = Apt::open(cache, &stage, suites)?;
        let names = apt.names(PREFIX)?;
        let name = match named {
            None => choose(&names).context(
                "this machine's Debian suites have no linux-source package; give --kernel-source DIR or TARBALL, or \
                 --kernel FILE",
            )?,
            Some(source) => source.package.or_else(|| newest(&names)).with_context(|| {
                format!("the Debian suites {} have no linux-source package", source.suites.join(", "))
            })?,
        };
        let debs = apt.download(&[name])?;
        let [deb] = &debs[..] else { bail!("apt downloaded {} files for {name}", debs.len()) };
        let file = deb.file_name().unwrap_or_default().to_string_lossy();
        let version = file.split('_').nth(1).unwrap_or("of unknown version");
        fs::write(dir.join(NAME_FILE), format!("{name} {version}")).context("cannot write to the cache")?;
        fs::write(dir.join(DIGEST_FILE), sha256_file(deb)?).context("cannot write to the cache")?;
        fs::rename(deb, dir.join(DEB_FILE)).context("cannot move the package")?;
        drop(apt);
        stage.done(format!("{name} {version}"));
        Ok(())
    })?;
    let read =
        |name: &str| fs::read_to_string(entry.path.join(name)).with_context(|| format!("cannot read {name}"));
    Ok(Source::Archive {
        path: entry.path.join(DEB_FILE),
        digest: read(DIGEST_FILE)?,
        name: read(NAME_FILE)?,
    })
}

fn choose(names: &[String]) -> Option<&str> {
    if names.iter().any(|name| name == PREFERRED) {
        return Some(PREFERRED);
    }
    newest(names)
}

fn newest(names: &[String]) -> Option<&str> {
    let version = |name: &str| -> Option<(u32, u32)> {
        let (major, minor) = name.strip_prefix(PREFIX)?.split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    names.iter().filter_map(|name| Some((version(name)?, name))).max().map(|(_, name)| name.as_str())
}

/// Unpacks a package or tarball so that the tree's top is `tree`; `scratch` is an empty directory.
pub(super) fn unpack(
    progress: &Progress,
    archive: &Path,
    tree: &Path,
    scratch: &Path,
    log: &Path,
) -> Result<()> {
    let stage = progress.stage("kernel unpack");
    fs::create_dir_all(tree).with_context(|| format!("cannot make {}", tree.display()))?;
    let mut tarball = archive.to_owned();
    if archive.extension().is_some_and(|extension| extension == "deb") {
        stage.update("taking the tarball out of the package");
        apt::unpack(archive, scratch)?;
        let dir = scratch.join("usr/src");
        let mut entries =
            fs::read_dir(&dir).with_context(|| format!("the package has no {}", dir.display()))?;
        let found = entries.find_map(|entry| {
            entry.ok().map(|entry| entry.path()).filter(|path| path.to_string_lossy().contains(".tar."))
        });
        tarball = found.context("the package has no tarball")?;
    }
    let shell = Shell::new().context("the working directory is gone")?;
    // Debian's tarball has many blocks, which xz can unpack side by side; tar finds other formats by itself.
    let is_xz = tarball.extension().is_some_and(|extension| extension == "xz");
    let decompressor = if is_xz { "--use-compress-program=xz -T0" } else { "--auto-compress" };
    let drivers = EXCLUDED_DRIVERS.map(|driver| format!("*/drivers/{driver}/*.[ch]"));
    let foreign = format!("*/arch/{}/*.[chS]", Machine::host()?.kernel.foreign_folders);
    let patterns = EXCLUDED.iter().map(|&pattern| pattern.to_owned()).chain(drivers).chain([foreign]);
    let excluded = patterns.map(|pattern| format!("--exclude={pattern}"));
    let tar = cmd!(shell, "tar --extract --file={tarball} --directory={tree} --strip-components=1")
        .args([decompressor, "--no-same-owner", "--record-size=1M", "--checkpoint=20"])
        .args(["--checkpoint-action=echo=%u", "--wildcards"])
        .args(excluded)
        .env("LC_ALL", "C");
    logged::run_filtered(tar.into(), log, |line| {
        let megabytes = line.rsplit(' ').next().and_then(|word| word.parse::<u32>().ok());
        if let Some(megabytes) = megabytes {
            stage.update(format!("{megabytes} MiB"));
        }
        megabytes.is_none()
    })
    .context("cannot unpack the kernel's source")?;
    if !tree.join("Kconfig").is_file() {
        bail!("{} holds no kernel tree (no Kconfig in its first directory)", archive.display());
    }
    stage.done("");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preferred_series_wins_else_the_newest() {
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let all = names(&["linux-source-6.1", "linux-source-6.12", "linux-source-6.18", "linux-source"]);
        assert_eq!(choose(&all), Some("linux-source-6.12"));
        assert_eq!(newest(&all), Some("linux-source-6.18"));
        let some = names(&["linux-source-6.9", "linux-source-6.10", "linux-source-6.1-rt", "linux-source"]);
        assert_eq!(choose(&some), Some("linux-source-6.10"));
        assert_eq!(choose(&names(&["linux-source"])), None);
    }

    #[test]
    fn a_directory_must_be_a_kernel_tree() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let progress = Progress::new(true);
        let cache = Cache::open_at(dir.path().join("vvu"), &progress).expect("opens");
        let error =
            Source::obtain(&progress, &cache, Some(dir.path()), None).expect_err("refused").to_string();
        assert!(error.contains("not the top of a kernel tree"), "{error}");
        fs::create_dir_all(dir.path().join("scripts/kconfig")).expect("made");
        fs::write(dir.path().join("Kconfig"), "").expect("written");
        assert_eq!(
            Source::obtain(&progress, &cache, Some(dir.path()), None).expect("accepted"),
            Source::Tree(dir.path().to_owned())
        );
    }
}
