//! Debian packages without root: apt with a state of its own in the cache.
//!
//! Mirror, proxy, credentials and keys are the machine's own, read from its apt configuration each time; signatures
//! are checked by apt as always.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::machine::Machine;
use vvu_process::logged;
use vvu_process::progress::Stage;

mod indexes;

/// The part of the archive to look in.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Suites<'a> {
    /// The suites that this machine itself uses, with their security updates.
    Machine,
    /// The same, with source packages.
    MachineSources,
    /// These suites of the machine's mirror, whatever the machine itself uses; the last is preferred.
    Named(&'a [&'a str]),
}

/// The lines of sources.list whose package lists this process has fetched.
static FETCHED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// An apt whose state and downloads live in a directory of their own, used by one run at a time. All share the package
/// lists, of which each is fetched once in the life of a process.
///
/// Dropping it removes the directory. Unpack or move away what is to stay before.
pub(crate) struct Apt<'a> {
    dir: PathBuf,
    log: PathBuf,
    stage: &'a Stage,
    _lock: File,
}

impl Drop for Apt<'_> {
    fn drop(&mut self) {
        // The next run uses, and removes, what is left.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl<'a> Apt<'a> {
    /// Prepares the state and fetches the package lists.
    ///
    /// # Errors
    ///
    /// The machine has no apt or no Debian mirror, the mirror cannot be reached, or a signature does not fit.
    pub(crate) fn open(cache: &Cache, stage: &'a Stage, suites: Suites<'_>) -> Result<Self> {
        let name = match suites {
            Suites::Machine => "machine".to_owned(),
            Suites::MachineSources => "machine-sources".to_owned(),
            Suites::Named(names) => names.join("+"),
        };
        let dir = cache.dir("apt")?.join(&name);
        let lock = cache.lock(&format!("apt/{name}"))?;
        let lists = cache.dir("apt/lists")?;
        cache.dir(&format!("apt/{name}"))?;
        stage.update("reading the machine's apt configuration");
        let sources = indexes::sources(suites, &indexes::find(suites)?)?;
        // The status file says what is installed: nothing, so that dependencies come along.
        for (name, text) in
            [("sources.list", &*sources), ("apt.conf", &config(&dir, &lists, suites)?), ("status", "")]
        {
            let path = dir.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        let apt = Self { dir, log: cache.dir("logs")?.join(format!("apt-{name}.log")), stage, _lock: lock };
        apt.update(cache, &sources)?;
        Ok(apt)
    }

    /// Fetches the package lists of `sources` that this process has not fetched yet. apt itself asks of the others whether
    /// they have changed.
    fn update(&self, cache: &Cache, sources: &str) -> Result<()> {
        self.stage.update("waiting for package lists");
        let mut fetched = FETCHED.lock().unwrap_or_else(PoisonError::into_inner);
        if sources.lines().all(|line| fetched.contains(line)) {
            return Ok(());
        }
        let _lock = cache.lock("apt/lists")?;
        self.get("fetching package lists", &self.dir, &["update"]).map_err(|error| explain(&error))?;
        fetched.extend(sources.lines().map(str::to_owned));
        Ok(())
    }

    /// The names of the packages that start with `prefix`.
    ///
    /// # Errors
    ///
    /// apt fails.
    pub(crate) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let text = capture(self.command("apt-cache").args(["pkgnames", prefix]))?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// A package and those that it depends on, directly or not, whose names start with one of `prefixes`.
    ///
    /// # Errors
    ///
    /// The package does not exist, or apt fails.
    pub(crate) fn depends(&self, package: &str, prefixes: &[&str]) -> Result<Vec<String>> {
        let mut found = vec![package.to_owned()];
        let mut next = 0;
        while let Some(name) = found.get(next).cloned() {
            let text = capture(self.command("apt-cache").args(["depends", "--important", &name]))?;
            let names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
            for name in names.filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix))) {
                if !found.iter().any(|known| known == name) {
                    found.push(name.to_owned());
                }
            }
            next += 1;
        }
        Ok(found)
    }

    /// Downloads packages and everything they depend on.
    ///
    /// # Errors
    ///
    /// A package does not exist, or the download fails.
    pub(crate) fn download_with_dependencies(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        self.fetch(&["install", "--download-only", "--no-install-recommends"], packages)
    }

    /// Downloads packages without what they depend on.
    ///
    /// # Errors
    ///
    /// A package does not exist, or the download fails.
    pub(crate) fn download(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        self.fetch(&["download"], packages)
    }

    /// Downloads the files of a source package, packed. It needs [`Suites::MachineSources`].
    ///
    /// # Errors
    ///
    /// The package does not exist, or the download fails.
    pub(crate) fn source(&self, package: &str) -> Result<Vec<PathBuf>> {
        self.fetch(&["source", "--download-only"], &[package])
    }

    /// Downloads into a directory of its own and returns the files that are there afterwards.
    fn fetch(&self, action: &[&str], packages: &[&str]) -> Result<Vec<PathBuf>> {
        let dir = self.dir.join(format!("files-{}", packages.join("+")));
        fs::create_dir_all(dir.join("partial")).with_context(|| format!("cannot make {}", dir.display()))?;
        self.get("downloading", &dir, &[action, packages].concat())?;
        let paths = fs::read_dir(&dir).and_then(|entries| {
            entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>()
        });
        let mut paths = paths.with_context(|| format!("cannot list {}", dir.display()))?;
        paths.retain(|path| path.is_file() && !path.ends_with("lock"));
        paths.sort();
        if paths.is_empty() {
            bail!("apt downloaded nothing for {}", packages.join(" "));
        }
        Ok(paths)
    }

    fn get(&self, what: &str, dir: &Path, args: &[&str]) -> Result<()> {
        self.stage.update(what);
        let mut command = self.command("apt-get");
        // `download` and `source` write into the current directory, `install` into the archive directory.
        let archives = format!("Dir::Cache::archives={}", dir.display());
        command.current_dir(dir).args(["-q", "-y", "-o", "APT::Status-Fd=1", "-o", &archives]).args(args);
        logged::run_filtered(command, &self.log, |line| {
            let percent = download_percent(line);
            if let Some(percent) = percent {
                self.stage.update(format!("{what} {percent:>3} %"));
            }
            percent.is_none()
        })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.dir.join("apt.conf")).env("LC_ALL", "C");
        command
    }
}

/// Unpacks a `.deb` into `dir`.
///
/// # Errors
///
/// dpkg-deb is missing or fails.
pub(crate) fn unpack(deb: &Path, dir: &Path) -> Result<()> {
    capture(Command::new("dpkg-deb").arg("-x").arg(deb).arg(dir)).map(drop)
}

fn capture(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .env("LC_ALL", "C")
        .output()
        .with_context(|| format!("cannot run {name}; Debian's package tools are needed for this"))?;
    if !output.status.success() {
        let (said, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        bail!("{name} failed ({}): {}\n{}", output.status, errors.trim(), said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The private configuration: how the machine reaches its mirror, and none of its hooks.
fn config(dir: &Path, lists: &Path, suites: Suites<'_>) -> Result<String> {
    let machine = capture(Command::new("apt-config").arg("dump"))?;
    let mut text = String::new();
    for line in
        machine.lines().filter(|line| line.starts_with("Acquire::") && !line.contains("::IndexTargets"))
    {
        text.push_str(line);
        text.push('\n');
    }
    let text_of = |path: &Path| {
        path.to_str().map(str::to_owned).context("the cache's path is not UTF-8, which apt.conf needs")
    };
    let (dir, lists) = (&*text_of(dir)?, &*text_of(lists)?);
    let architecture = Machine::host()?.debian.architecture;
    let user = if rustix::process::geteuid().is_root() { "root" } else { "_apt" };
    let own = [
        ("Dir::Etc::parts", "/dev/null"),
        ("Dir::Etc::main", "/dev/null"),
        ("Dir::Etc::preferences", "/dev/null"),
        ("Dir::Etc::preferencesparts", "/dev/null"),
        ("Dir::Etc::sourcelist", &format!("{dir}/sources.list")),
        ("Dir::Etc::sourceparts", "/dev/null"),
        ("Dir::State", dir),
        ("Dir::State::lists", lists),
        ("Dir::State::status", &format!("{dir}/status")),
        ("Dir::Cache", dir),
        ("Dir::Log", dir),
        ("APT::Architecture", architecture),
        ("APT::Architectures", architecture),
        ("APT::Install-Recommends", "false"),
        // The cache is private to the user, so apt's own unprivileged user could not write to it.
        ("APT::Sandbox::User", user),
        // Without this a mirror that cannot be reached is but a warning.
        ("APT::Update::Error-Mode", "any"),
        ("Acquire::Languages", "none"),
        ("Acquire::GzipIndexes", "true"),
        // The lists of other suites are there as well.
        ("APT::Get::List-Cleanup", "false"),
        ("Acquire::Retries", "3"),
        ("Acquire::http::Timeout", "30"),
        ("Acquire::https::Timeout", "30"),
    ];
    for (name, value) in own {
        let _ = writeln!(text, "{name} \"{value}\";");
    }
    // Backports are otherwise taken only where named one by one.
    if let Suites::Named([.., preferred]) = suites {
        let _ = writeln!(text, "APT::Default-Release \"{preferred}\";");
    }
    Ok(text)
}

/// The percentage in a line of apt's status output about a download: `dlstatus:ITEM:PERCENT:TEXT`.
fn download_percent(line: &str) -> Option<&str> {
    line.strip_prefix("dlstatus:")?.split(':').nth(1)?.split('.').next()
}

fn explain(error: &anyhow::Error) -> anyhow::Error {
    let text = format!("{error:#}");
    let remedy = if text.contains("NO_PUBKEY") {
        "the key of that release is not known here; run: apt-get install --only-upgrade debian-archive-keyring"
    } else {
        "is this machine's Debian mirror reachable? (`apt-get update` must work)"
    };
    anyhow::anyhow!("cannot fetch Debian's package lists: {remedy}\n{text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_lines_tell_percent() {
        let line = "dlstatus:1:41.7391:Retrieving file 3 of 92 (12s remaining)";
        assert_eq!(download_percent(line), Some("41"));
        assert_eq!(download_percent("Get:1 x"), None);
    }
}
