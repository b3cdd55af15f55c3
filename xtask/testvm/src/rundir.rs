//! The run directory: the files that a run leaves for a person to look at.

use std::fs::{self, File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use serde::Deserialize;
use tempfile::TempDir;

use crate::facts::Outcome;

/// How many passed runs of a scenario are kept.
const KEPT: usize = 10;
/// How many of these, the newest, keep their images, which are large and which `replay.sh` needs.
const KEPT_WITH_IMAGES: usize = 2;
/// Longest path of a unix socket in bytes: `sun_path` holds 108 with the terminating zero.
pub const MAX_SOCKET_PATH: usize = 107;
/// Longest file name that a run puts into its socket directory.
const MAX_SOCKET_NAME: usize = 40;

/// The directory of one run, `<scenario>-<UTC time>`. It is locked as long as this value exists.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    id: String,
    /// Holds the lock. A part of another run has none of its own.
    _lock: Option<File>,
    /// It lies within another run directory, which is kept or removed as a whole.
    part: bool,
}

impl RunDir {
    /// Makes a directory under `parent` and points the link `parent/latest` to it.
    ///
    /// # Errors
    ///
    /// Fails if the directory or the link cannot be made.
    pub fn create(parent: &Path, scenario: &str) -> Result<Self> {
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        let parent = parent.canonicalize().with_context(|| format!("cannot resolve {}", parent.display()))?;
        let stem = format!("{scenario}-{}", utc(SystemTime::now()));
        let mut path = parent.join(&stem);
        // Runs that begin in the same second get numbers.
        let mut number = 2;
        while let Err(error) = fs::create_dir(&path) {
            ensure!(
                error.kind() == io::ErrorKind::AlreadyExists && number < 1000,
                "cannot make {}: {error}",
                path.display()
            );
            path = parent.join(format!("{stem}-{number}"));
            number += 1;
        }
        let locked = File::open(&path).and_then(|dir| dir.lock().map(|()| dir));
        let lock = locked.with_context(|| format!("cannot lock {}", path.display()))?;
        point_latest(&parent, &path)?;
        let id = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { path, id, _lock: Some(lock), part: false })
    }

    /// Makes a directory within this one, for a run that is part of this run.
    ///
    /// # Errors
    ///
    /// Fails if the directory cannot be made.
    pub fn part(&self, name: &str) -> Result<Self> {
        let path = self.path.join(name);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path, id: format!("{}-{name}", self.id), _lock: None, part: true })
    }

    /// The absolute path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The name, which no other run has.
    #[must_use]
    pub fn id(&self) -> String {
        self.id.clone()
    }

    /// The path of a file in it.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes a file in it.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be written.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> Result<()> {
        let path = self.file(name);
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Writes an executable file in it.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be written.
    pub fn write_script(&self, name: &str, text: &str) -> Result<()> {
        self.write(name, text)?;
        let path = self.file(name);
        fs::set_permissions(&path, Permissions::from_mode(0o755))
            .with_context(|| format!("cannot make {} executable", path.display()))
    }

    /// Removes old passed runs of `scenario`, which are those whose report, in `file`, says so. Failed runs stay until
    /// `cargo xtask clean`. A part of another run loses only its images.
    pub fn prune(&self, scenario: &str, file: &str) {
        if self.part {
            return remove_images(&self.path);
        }
        let Some(parent) = self.path.parent() else { return };
        let mut passed: Vec<PathBuf> = fs::read_dir(parent)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| *path != self.path && !path.is_symlink() && has_passed(&path.join(file), scenario))
            .collect();
        // The time in the name orders them.
        passed.sort();
        // The directory of this run is the newest, whatever the clock says.
        let others = usize::from(has_passed(&self.path.join(file), scenario));
        let aged = (others..).zip(passed.iter().rev()).filter(|(_, path)| !is_locked(path));
        // Another run may be removing the same directories; what stays is removed next time.
        for (age, path) in aged {
            if age >= KEPT {
                let _ = fs::remove_dir_all(path);
            } else if age >= KEPT_WITH_IMAGES {
                remove_images(path);
            }
        }
    }
}

fn remove_images(run: &Path) {
    for path in fs::read_dir(run).into_iter().flatten().flatten().map(|entry| entry.path()) {
        if path.extension().is_some_and(|extension| extension == "cpio") {
            let _ = fs::remove_file(path);
        }
    }
}

/// Returns true if a live run has locked the directory `run`.
pub(crate) fn is_locked(run: &Path) -> bool {
    File::open(run).is_ok_and(|dir| matches!(dir.try_lock(), Err(TryLockError::WouldBlock)))
}

/// The keys that every kind of report has.
#[derive(Deserialize)]
struct Verdict {
    scenario: String,
    result: Outcome,
}

fn has_passed(report: &Path, scenario: &str) -> bool {
    fs::read(report)
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Verdict>(&bytes).ok())
        .is_some_and(|report| report.scenario == scenario && report.result == Outcome::Pass)
}

/// The directory of the run directories: the one that the variable `VVU_RUNS` names, else `e2e` in cargo's target
/// directory.
#[must_use]
pub fn runs() -> PathBuf {
    match std::env::var_os("VVU_RUNS") {
        Some(named) => vvu_artifacts::workspace().join(named),
        None => vvu_artifacts::target_directory().join("e2e"),
    }
}

/// Points the link `latest` in `parent` to `path` by a rename, so that it exists at every moment.
fn point_latest(parent: &Path, path: &Path) -> Result<()> {
    let name = path.file_name().context("a run directory has a name")?;
    let link = parent.join("latest");
    let fresh = parent.join(format!(".latest-{}", name.to_string_lossy()));
    std::os::unix::fs::symlink(name, &fresh)
        .and_then(|()| fs::rename(&fresh, &link))
        .with_context(|| format!("cannot point {} to this run", link.display()))
}

/// The directory for the sockets of a run: the run directory if their paths fit, else a private one with a short path.
#[derive(Debug)]
pub struct SocketDir {
    path: PathBuf,
    /// Removes the private directory at the end.
    _short: Option<TempDir>,
}

impl SocketDir {
    /// Chooses or makes the directory for `run`.
    ///
    /// # Errors
    ///
    /// Fails if no directory with a path short enough can be made.
    pub fn for_run(run: &RunDir) -> Result<Self> {
        if fits(run.path()) {
            return Ok(Self { path: run.path().to_owned(), _short: None });
        }
        let candidates = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).into_iter();
        let mut private = tempfile::Builder::new();
        private.prefix("vvu-").permissions(Permissions::from_mode(0o700));
        for parent in candidates.chain([std::env::temp_dir(), PathBuf::from("/tmp")]) {
            if let Ok(dir) = private.tempdir_in(parent)
                && fits(dir.path())
            {
                return Ok(Self { path: dir.path().to_owned(), _short: Some(dir) });
            }
        }
        anyhow::bail!(
            "{} is too long a path for unix sockets, which may have {MAX_SOCKET_PATH} bytes, and no short directory \
             can be made instead: set XDG_RUNTIME_DIR or TMPDIR to one",
            run.path().display()
        )
    }

    /// Path of the directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of a socket in it.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

fn fits(dir: &Path) -> bool {
    dir.as_os_str().len() + 1 + MAX_SOCKET_NAME <= MAX_SOCKET_PATH
}

/// `time` as `YYYYMMDD-HHMMSS` in UTC; the epoch if it is out of range.
fn utc(time: SystemTime) -> String {
    let time = Timestamp::try_from(time).unwrap_or_default();
    time.strftime("%Y%m%d-%H%M%S").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn at(seconds: u64) -> String {
        utc(UNIX_EPOCH + Duration::from_secs(seconds))
    }

    #[test]
    fn times_are_civil() {
        assert_eq!(at(0), "19700101-000000");
        assert_eq!(at(951_827_696), "20000229-123456");
        assert_eq!(at(1_735_689_599), "20241231-235959");
        assert_eq!(at(1_740_787_200), "20250301-000000");
    }

    #[test]
    fn runs_of_the_same_second_get_directories_of_their_own() {
        let parent = tempfile::tempdir().expect("a directory");
        let runs: Vec<_> =
            (0..3).map(|_| RunDir::create(parent.path(), "block").expect("a run directory")).collect();
        let mut ids: Vec<_> = runs.iter().map(RunDir::id).collect();
        ids.dedup();
        assert_eq!(ids.len(), 3);
        let latest = parent.path().join("latest").canonicalize().expect("a link");
        assert_eq!(latest, runs[2].path());
    }

    #[test]
    fn only_passed_runs_of_the_scenario_are_pruned() {
        let parent = tempfile::tempdir().expect("a directory");
        let run = |name: &str, scenario: &str, result| {
            let path = parent.path().join(name);
            fs::create_dir(&path).expect("made");
            let report = serde_json::json!({"scenario": scenario, "result": result, "checks": []});
            fs::write(path.join("report.json"), report.to_string()).expect("written");
            fs::write(path.join("device.cpio"), "").expect("written");
        };
        for number in 0..KEPT + 2 {
            run(&format!("block-2000010{number:02}"), "block", Outcome::Pass);
        }
        run("block-1999", "block", Outcome::Fail);
        run("block-large-1999", "block-large", Outcome::Pass);
        let now = RunDir::create(parent.path(), "block").expect("a run directory");
        now.prune("block", "report.json");
        let exists = |name: &str| parent.path().join(name).exists();
        assert!(!exists("block-200001000") && !exists("block-200001001") && exists("block-200001002"));
        assert!(!exists("block-200001009/device.cpio") && exists("block-200001010/device.cpio"));
        assert!(exists("block-1999/device.cpio") && exists("block-large-1999/device.cpio"));
    }

    #[test]
    fn neither_this_run_nor_a_live_one_is_pruned_when_the_clock_jumps_back() {
        let parent = tempfile::tempdir().expect("a directory");
        let report = serde_json::json!({"scenario": "block", "result": Outcome::Pass}).to_string();
        let now = RunDir::create(parent.path(), "block").expect("a run directory");
        let live = RunDir::create(parent.path(), "block").expect("a run directory");
        for run in [&now, &live] {
            run.write("report.json", &report).expect("written");
        }
        for number in 0..KEPT {
            let later = parent.path().join(format!("block-9000010{number:02}"));
            fs::create_dir(&later).expect("made");
            fs::write(later.join("report.json"), &report).expect("written");
        }
        now.prune("block", "report.json");
        assert!(now.path().exists() && live.path().exists());
        assert!(!parent.path().join("block-900001000").exists(), "the oldest of the others goes");
    }

    #[test]
    fn a_part_has_a_name_of_its_own_and_loses_its_images_only() {
        let parent = tempfile::tempdir().expect("a directory");
        let whole = RunDir::create(parent.path(), "matrix").expect("a run directory");
        let part = whole.part("01").expect("a run directory");
        assert_eq!(part.id(), format!("{}-01", whole.id()));
        for name in ["device.cpio", "report.json"] {
            part.write(name, "").expect("written");
        }
        part.prune("block", "report.json");
        assert!(!part.file("device.cpio").exists() && part.file("report.json").exists());
    }

    #[test]
    fn sockets_of_a_deep_run_directory_go_to_a_short_private_one() {
        let parent = tempfile::tempdir().expect("a directory");
        let shallow = RunDir::create(parent.path(), "x").expect("a run directory");
        let sockets = SocketDir::for_run(&shallow).expect("a directory");
        assert_eq!(sockets.socket("a"), shallow.file("a"));

        let deep = RunDir::create(&parent.path().join("d".repeat(90)), "x").expect("a run directory");
        let sockets = SocketDir::for_run(&deep).expect("a directory");
        let path = sockets.path.clone();
        assert!(fits(&path));
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o700);
        drop(sockets);
        assert!(!path.exists());
    }
}
