//! Finds QEMU: the one that the user names, the system's, or Debian's packages, unpacked into the cache.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::apt::{self, Apt, Suites};
use crate::cache::{Cache, Key};
use crate::machine::Machine;
use crate::packages;
use crate::versions::{QemuSource, Versions};
use vvu_process::progress::{Progress, Stage};

/// QEMU's vfio-user client, which a VM needs for a vvu device. QEMU has it since 10.1.
pub const NEEDED_DEVICE: &str = "vfio-user-pci";

/// QEMU's express device. QEMU has it since 2.6, unless it is built without.
pub const EXPRESS_DEVICE: &str = "ivshmem-doorbell";

/// A QEMU that can be started.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// The program.
    pub path: PathBuf,
    /// The source of the program.
    pub origin: Origin,
    /// The version, such as `11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)`.
    pub version: String,
    /// The machine that it emulates.
    pub machine: &'static Machine,
    /// It has [`NEEDED_DEVICE`].
    pub vfio_user: bool,
    /// It has [`EXPRESS_DEVICE`].
    pub express: bool,
    env: Vec<(&'static str, OsString)>,
    argv: Vec<OsString>,
}

/// The source of a QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Named with `--qemu`.
    Option,
    /// Found in `PATH`.
    System,
    /// Debian's packages in the cache.
    Unpacked,
}

impl Qemu {
    /// Finds a QEMU that has vfio-user-pci: `wanted`, or the system's, or one downloaded into the cache.
    ///
    /// # Errors
    ///
    /// `wanted` does not have the device, or nothing else does and Debian's packages cannot be downloaded.
    pub fn locate(progress: &Progress, cache: &Cache, wanted: Option<&Path>) -> Result<Self> {
        let stage = progress.stage("qemu");
        let qemu = Self::find(progress, cache, &stage, wanted)?;
        let origin = match qemu.origin {
            Origin::Option => "as named",
            Origin::System => "the system's",
            Origin::Unpacked => "unpacked Debian packages",
        };
        stage.done(format!("{}, {origin}", qemu.version));
        Ok(qemu)
    }

    fn find(progress: &Progress, cache: &Cache, stage: &Stage, wanted: Option<&Path>) -> Result<Self> {
        if let Some(path) = wanted {
            let path = std::path::absolute(path).context("the working directory is gone")?;
            if !path.is_file() {
                bail!("--qemu {}: no such file", path.display());
            }
            let qemu = Self::plain(path, Origin::Option)?;
            if !qemu.vfio_user {
                bail!(
                    "--qemu {}: QEMU {} has no {NEEDED_DEVICE}; name a QEMU >= 10.1 that is built with it, or leave \
                     --qemu out to use the system's or Debian's",
                    qemu.path.display(),
                    qemu.version
                );
            }
            return Ok(qemu);
        }
        stage.update("looking for a system QEMU");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let program = Machine::host()?.qemu.program;
        let system = std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.is_file());
        if let Some(Ok(qemu)) = system.map(|path| Self::plain(path, Origin::System))
            && qemu.vfio_user
        {
            return Ok(qemu);
        }
        Self::unpacked(progress, cache, stage).context(
            "no system QEMU has vfio-user-pci and Debian's could not be had; --qemu PATH names another",
        )
    }

    /// The QEMU at `path`.
    ///
    /// # Errors
    ///
    /// It does not answer as QEMU.
    pub fn plain(path: PathBuf, origin: Origin) -> Result<Self> {
        let argv = vec![path.clone().into()];
        let machine = Machine::host()?;
        let (version, env) = (String::new(), Vec::new());
        let qemu = Self { path, origin, version, machine, vfio_user: false, express: false, env, argv };
        let qemu = qemu.with_version()?;
        let [vfio_user, express] = [NEEDED_DEVICE, EXPRESS_DEVICE].map(|device| qemu.probe_device(device));
        Ok(Self { vfio_user, express, ..qemu })
    }

    /// The root of a QEMU from Debian's packages with all that it needs, for use elsewhere with [`Qemu::from_root`].
    ///
    /// # Errors
    ///
    /// Debian's packages cannot be downloaded.
    pub fn portable(progress: &Progress, cache: &Cache) -> Result<PathBuf> {
        let stage = progress.stage("portable qemu");
        let root = Self::unpacked_root(progress, cache, &stage, Versions::read()?.default_qemu()?)?;
        stage.done("unpacked Debian packages");
        Ok(root)
    }

    /// The QEMU that `guest-images/versions.json` has by this name, unpacked into the cache.
    ///
    /// # Errors
    ///
    /// There is none of that name, or Debian's packages cannot be downloaded.
    pub fn named(progress: &Progress, cache: &Cache, name: &str) -> Result<Self> {
        let versions = Versions::read()?;
        let stage = progress.stage(format!("qemu {name}"));
        let source = versions.qemu(name)?;
        let root = Self::unpacked_root(progress, cache, &stage, source)
            .with_context(|| format!("the QEMU {name:?} cannot be had"))?;
        let qemu = Self::in_root(&root, source.vfio_user)?;
        stage.done(format!("{}, unpacked Debian packages", qemu.version));
        Ok(qemu)
    }

    fn unpacked(progress: &Progress, cache: &Cache, stage: &Stage) -> Result<Self> {
        Self::from_root(&Self::unpacked_root(progress, cache, stage, Versions::read()?.default_qemu()?)?)
    }

    fn unpacked_root(
        progress: &Progress,
        cache: &Cache,
        stage: &Stage,
        source: &QemuSource<'_>,
    ) -> Result<PathBuf> {
        let machine = Machine::host()?;
        packages::ensure(progress, cache, &[packages::program("dpkg", "dpkg-deb")])?;
        let suites = &source.suites;
        let (package, kept) = (machine.debian.qemu_package, kept(machine));
        let key =
            Key::new().part("suites", suites.join(" ")).part("package", package).part("kept", kept.join(" "));
        let entry = cache.entry("qemu", &key, |root| {
            let apt = Apt::open(cache, stage, Suites::Named(suites))?;
            let debs = apt.download_with_dependencies(&[package])?;
            for (done, deb) in debs.iter().enumerate() {
                stage.update(format!("unpacking {} of {} packages", done + 1, debs.len()));
                apt::unpack(deb, root)?;
            }
            trim(root, &kept)?;
            stage.update("checking the unpacked QEMU");
            let qemu = Self::in_root(root, source.vfio_user)?;
            if qemu.probe_device(NEEDED_DEVICE) != source.vfio_user {
                let has = if source.vfio_user { "no" } else { "a" };
                bail!(
                    "Debian's QEMU {} of {} has {has} {NEEDED_DEVICE}: correct `vfio_user` in \
                     guest-images/versions.json",
                    qemu.version,
                    suites.join(" ")
                );
            }
            Ok(())
        })?;
        Ok(entry.path)
    }

    /// The QEMU in `root`, which [`Qemu::portable`] or a copy of it has.
    ///
    /// # Errors
    ///
    /// There is none, or it does not run.
    pub fn from_root(root: &Path) -> Result<Self> {
        // The list of versions is tested to have it in the default one.
        Self::in_root(root, true)
    }

    /// The QEMU unpacked in `root`: with its own loader and libraries, since the machine's may be older.
    fn in_root(root: &Path, vfio_user: bool) -> Result<Self> {
        let machine = Machine::host()?;
        let path = root.join("usr/bin").join(machine.qemu.program);
        let [libraries, old_libraries] = libraries(machine).map(|folder| root.join(folder));
        let loader =
            loaders(machine).map(|loader| root.join(loader)).into_iter().find(|loader| loader.is_file());
        let loader = loader.with_context(|| format!("{} holds no loader of programs", root.display()))?;
        let mut library_path = libraries.clone().into_os_string();
        library_path.push(":");
        library_path.push(old_libraries);
        let mut argv = vec![loader.into(), "--library-path".into(), library_path, path.clone().into()];
        for folder in ["qemu"].iter().chain(machine.qemu.firmware) {
            argv.extend(["-L".into(), root.join("usr/share").join(folder).into()]);
        }
        // Another QEMU's modules on the default module path make this one abort.
        let env = vec![("QEMU_MODULE_DIR", libraries.join("qemu").into())];
        let (origin, version) = (Origin::Unpacked, String::new());
        // Every QEMU of Debian has it.
        let express = true;
        Self { path, origin, version, machine, vfio_user, express, env, argv }.with_version()
    }

    fn with_version(mut self) -> Result<Self> {
        let output = self
            .command()
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run {}", self.path.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let Some(version) = output.status.success().then(|| parse_version(&text)).flatten() else {
            let errors = String::from_utf8_lossy(&output.stderr);
            bail!(
                "{} --version ({}) does not answer as QEMU: {}",
                self.path.display(),
                output.status,
                errors.trim()
            );
        };
        self.version = version.to_owned();
        Ok(self)
    }

    /// A command that starts this QEMU; the VM's own arguments are to be added.
    pub fn command(&self) -> Command {
        let mut words = self.argv.iter();
        let mut command = Command::new(words.next().unwrap_or(&OsString::new()));
        command.args(words).envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    /// The words that a script writes before the VM's own arguments: `env NAME=VALUE` where needed, then the program.
    pub fn argv_prefix(&self) -> Vec<String> {
        let mut words = Vec::new();
        if !self.env.is_empty() {
            words.push("env".to_owned());
        }
        words.extend(self.env.iter().map(|(name, value)| format!("{name}={}", value.to_string_lossy())));
        words.extend(self.argv.iter().map(|word| word.to_string_lossy().into_owned()));
        words
    }

    /// Tells whether this QEMU has a device of that name.
    pub fn probe_device(&self, name: &str) -> bool {
        let mut command = self.command();
        command.args(["-device", &format!("{name},help")]);
        let output = command.stdin(Stdio::null()).output();
        // QEMU 7.2 exits with 0 for an unknown device too; it reports the error on standard error.
        output.is_ok_and(|output| output.status.success() && !output.stdout.is_empty())
    }
}

fn parse_version(text: &str) -> Option<&str> {
    text.lines().next()?.strip_prefix("QEMU emulator version ").map(str::trim)
}

/// Library folders of Debian 13 and 12, relative to the root.
fn libraries(machine: &Machine) -> [String; 2] {
    [machine.libraries(), format!("lib/{}", machine.debian.multiarch)]
}

/// Program loaders of Debian 13 and 12, relative to the root.
fn loaders(machine: &Machine) -> [String; 2] {
    let loader = format!("{}/{}", machine.debian.loader_folder, machine.debian.loader);
    [format!("usr/{loader}"), loader]
}

/// Paths of the unpacked packages that are kept. The rest is documentation, translations and other programs.
fn kept(machine: &Machine) -> Vec<String> {
    let mut kept = vec![format!("usr/bin/{}", machine.qemu.program)];
    kept.extend(["usr/lib", "usr/lib64", "usr/share/qemu"].map(str::to_owned));
    kept.extend(machine.qemu.firmware.iter().map(|folder| format!("usr/share/{folder}")));
    kept.extend(["lib", "lib64"].map(str::to_owned));
    kept
}

/// Removes from `root` everything that is neither named in `kept` nor below something named there.
fn trim(root: &Path, kept: &[String]) -> Result<()> {
    let kept: Vec<PathBuf> = kept.iter().map(PathBuf::from).collect();
    let mut dirs = vec![PathBuf::new()];
    while let Some(dir) = dirs.pop() {
        let entries =
            fs::read_dir(root.join(&dir)).with_context(|| format!("cannot list {}", root.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot list {}", root.display()))?;
            let relative = dir.join(entry.file_name());
            let is_dir =
                entry.file_type().with_context(|| format!("cannot read {}", relative.display()))?.is_dir();
            if kept.contains(&relative) {
                continue;
            }
            if kept.iter().any(|kept| kept.starts_with(&relative)) {
                dirs.push(relative);
                continue;
            }
            let path = entry.path();
            if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }
                .with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::X86_64;
    use std::os::unix::fs::PermissionsExt;

    /// A stand-in that knows its version and the devices named.
    fn fake(dir: &Path, devices: &str, otherwise: &str) -> PathBuf {
        let path = dir.join(X86_64.qemu.program);
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in --version) echo QEMU emulator version 9.9.9;; {devices}) echo options:;; *) {otherwise};; esac\n"
        );
        fs::write(&path, script).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("made executable");
        path
    }

    fn locate(path: &Path) -> Result<Qemu> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let progress = Progress::new(true);
        let cache = Cache::open_at(dir.path().join("vvu"), &progress).expect("opens");
        Qemu::locate(&progress, &cache, Some(path))
    }

    #[test]
    fn a_named_qemu_must_have_the_device() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        // QEMU 7.2 ends with exit code 0 all the same.
        for otherwise in ["exit 1", "echo not found >&2"] {
            let error = locate(&fake(dir.path(), "none", otherwise)).expect_err("lacks it").to_string();
            for want in ["9.9.9", "vfio-user-pci", ">= 10.1", "leave --qemu out"] {
                assert!(error.contains(want), "{error}");
            }
        }
        let qemu = locate(&fake(dir.path(), "'-device vfio-user-pci,help'", "exit 1")).expect("has it");
        assert_eq!((qemu.version.as_str(), qemu.origin), ("9.9.9", Origin::Option));
        assert!(!qemu.probe_device("other"));
    }

    #[test]
    fn what_is_not_qemu_is_refused() {
        for (path, want) in [("/bin/true", "does not answer as QEMU"), ("/nonexistent", "no such file")] {
            let error = locate(Path::new(path)).expect_err("refused").to_string();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn trim_keeps_what_runs() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for path in
            ["usr/bin/qemu-system-x86_64", "usr/bin/other", "usr/lib/x/libc.so", "usr/share/doc/x", "etc/x"]
        {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("has one")).expect("made");
            fs::write(path, "").expect("written");
        }
        trim(dir.path(), &kept(&X86_64)).expect("trimmed");
        assert!(dir.path().join("usr/bin/qemu-system-x86_64").exists());
        assert!(dir.path().join("usr/lib/x/libc.so").exists());
        for gone in ["usr/bin/other", "usr/share/doc", "etc"] {
            assert!(!dir.path().join(gone).exists(), "{gone}");
        }
    }
}
