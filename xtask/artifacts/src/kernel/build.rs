//! Configuring and compiling a kernel out of tree.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use xshell::{Cmd, Shell, cmd};

use super::config::{self, Config, Requests};
use crate::machine::{KernelFormat, Machine};
use vvu_process::logged;
use vvu_process::progress::{Progress, Stage};

const BAR_WIDTH: usize = 24;
/// Variables that a build takes from the caller's environment: what finds programs and places for temporary files.
const KEPT_VARIABLES: [&str; 4] = ["PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR"];

/// A kernel build: from `tree`, in `dir`.
pub(super) struct Build<'a> {
    /// The machine that runs the kernel.
    pub(super) machine: &'a Machine,
    /// The top of the source tree.
    pub(super) tree: &'a Path,
    /// The directory for objects.
    pub(super) dir: &'a Path,
    /// The log of make.
    pub(super) log: &'a Path,
}

impl Build<'_> {
    /// Writes a `.config` that has what `requests` asks for and as little else as possible.
    ///
    /// # Errors
    ///
    /// make fails, or the tree does not take a request that is not optional: the message says which and why.
    pub(super) fn configure(&self, progress: &Progress, requests: &Requests) -> Result<Config> {
        let stage = progress.stage("kernel config");
        fs::create_dir_all(self.dir).with_context(|| format!("cannot make {}", self.dir.display()))?;
        let fragment = self.dir.join("fragment.config");
        fs::write(&fragment, requests.text())
            .with_context(|| format!("cannot write {}", fragment.display()))?;
        // Not merge_config with olddefconfig: options that become visible on the way would take their defaults.
        let shell = Shell::new().context("the working directory is gone")?;
        let make = self.make(&shell).arg("allnoconfig").env("KCONFIG_ALLCONFIG", &fragment);
        logged::run(make.into(), self.log, |_| ()).context("cannot configure the kernel")?;
        let path = self.dir.join(".config");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let resolved = config::parse(&text);

        let unmet = requests.unmet(&resolved);
        let mut refused = Vec::new();
        for (unmet, reason) in
            unmet.iter().zip(config::reasons(self.tree, self.machine.kernel.folder, &unmet, &resolved)?)
        {
            if unmet.optional {
                progress.note(format!("kernel config: {unmet} (optional): {reason}"));
            } else {
                refused.push(format!("\n  {unmet}: {reason}"));
            }
        }
        if !refused.is_empty() {
            bail!(
                "the kernel's configuration did not take what guest-images/kernel asks for:{}",
                refused.concat()
            );
        }
        let seed = config::SEED.join(", ");
        stage.done(format!(
            "{} of {} requests met, with {seed}",
            requests.len() - unmet.len(),
            requests.len()
        ));
        Ok(resolved)
    }

    /// Compiles the kernel and returns how many objects that took.
    ///
    /// # Errors
    ///
    /// make fails: the message has the end of its output.
    pub(super) fn compile(&self, stage: &Stage, expected: usize) -> Result<usize> {
        let jobs = std::thread::available_parallelism().map_or(1, usize::from).to_string();
        let shell = Shell::new().context("the working directory is gone")?;
        let make = self.make(&shell).args(["-j", &jobs, self.machine.kernel.make_target]);
        let mut objects = 0;
        let started = Instant::now();
        stage.update("host tools");
        logged::run(make.into(), self.log, |line| {
            if is_object(line) {
                objects += 1;
                stage.update(bar(objects, expected, started.elapsed()));
            } else if line.starts_with("  LD      vmlinux") {
                stage.update("linking");
            }
        })
        .context("cannot build the kernel")?;
        Ok(objects)
    }

    /// Copies the compiled kernel to `target`, without its symbol table if it has one.
    ///
    /// # Errors
    ///
    /// The kernel is not there, or strip fails.
    pub(super) fn copy_kernel(&self, target: &Path) -> Result<()> {
        let kernel: PathBuf = self.dir.join(self.machine.kernel.output);
        match self.machine.kernel.format {
            KernelFormat::Pvh => {
                let shell = Shell::new().context("the working directory is gone")?;
                let strip = cmd!(shell, "strip -o {target} {kernel}").quiet().ignore_stdout();
                strip.run().context("cannot strip the kernel")
            }
            KernelFormat::Arm64Image => fs::copy(&kernel, target)
                .map(drop)
                .with_context(|| format!("cannot copy {}", kernel.display())),
        }
    }

    /// make for this build, with nothing of the caller's environment that could change the kernel: options such as
    /// `KCFLAGS`, `LLVM` and `KBUILD_OUTPUT` would not be part of the kernel's cache key.
    fn make<'s>(&self, shell: &'s Shell) -> Cmd<'s> {
        let (tree, dir) = (self.tree, self.dir);
        let kept = KEPT_VARIABLES.iter().filter_map(|name| Some((name, env::var_os(name)?)));
        // With these the same source gives the same kernel on every machine and day.
        cmd!(shell, "nice -n 10 make -C {tree} O={dir}")
            .env_clear()
            .envs(kept)
            .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01")
            .env("KBUILD_BUILD_USER", "vvu")
            .env("KBUILD_BUILD_HOST", "vvu")
            .env("KBUILD_BUILD_VERSION", "1")
            .env("LC_ALL", "C")
    }
}

/// Tells whether Kbuild can build in a directory. Kbuild ends names at spaces and colons.
pub(super) fn is_buildable(path: &Path) -> bool {
    let path = path.as_os_str().as_encoded_bytes();
    !path.iter().any(|byte| byte.is_ascii_whitespace() || *byte == b':')
}

/// Tells whether a line of make's output announces an object of the kernel.
fn is_object(line: &str) -> bool {
    line.starts_with("  CC  ") || line.starts_with("  AS  ")
}

fn bar(done: usize, expected: usize, elapsed: Duration) -> String {
    let expected = expected.max(done).max(1);
    let filled = done * BAR_WIDTH / expected;
    let left = elapsed.as_secs_f64() / done.max(1) as f64 * (expected - done) as f64;
    format!(
        "[{:#<filled$}{:.<empty$}] {done} of {expected} objects, about {left:.0} s left",
        "",
        "",
        empty = BAR_WIDTH - filled
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::X86_64;

    #[test]
    fn the_callers_environment_does_not_reach_the_build() {
        let tree = tempfile::tempdir().expect("a directory");
        fs::write(tree.path().join("Makefile"), "all:\n\tenv > $(O)/environment\n").expect("written");
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("log");
        let build = Build { machine: &X86_64, tree: tree.path(), dir: dir.path(), log: &log };
        let shell = Shell::new().expect("a working directory");
        build.make(&shell).quiet().ignore_stdout().run().expect("made");
        let environment = fs::read_to_string(dir.path().join("environment")).expect("there");
        let has = |name: &str| environment.lines().any(|line| line.starts_with(&format!("{name}=")));
        assert!(has("PATH") && has("KBUILD_BUILD_USER"), "{environment}");
        // Cargo sets it for tests.
        assert!(env::var_os("CARGO_MANIFEST_DIR").is_some() && !has("CARGO_MANIFEST_DIR"), "{environment}");
    }

    #[test]
    fn kbuild_takes_no_spaces_and_colons() {
        assert!(is_buildable(Path::new("/home/j\u{fc}rgen/.cache")));
        for path in ["/my cache", "/a:b", "/a\tb"] {
            assert!(!is_buildable(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn objects_are_counted_and_nothing_else() {
        for line in ["  CC      mm/slub.o", "  AS      arch/x86/lib/memcpy_64.o"] {
            assert!(is_object(line), "{line}");
        }
        for line in
            ["  HOSTCC  scripts/basic/fixdep", "  AR      mm/built-in.a", "CC x.o", "  LD      vmlinux"]
        {
            assert!(!is_object(line), "{line}");
        }
    }

    #[test]
    fn the_bar_never_overflows() {
        let bar = |done, expected| bar(done, expected, Duration::from_secs(10));
        assert_eq!(bar(0, 4), "[........................] 0 of 4 objects, about 40 s left");
        assert_eq!(bar(2, 4), "[############............] 2 of 4 objects, about 10 s left");
        assert_eq!(bar(9, 4), "[########################] 9 of 9 objects, about 0 s left");
        assert!(bar(0, 0).contains("0 of 1"));
    }
}
