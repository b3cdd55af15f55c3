//! Content-keyed directories under `$XDG_CACHE_HOME/vvu`, safe to share between runs.
//!
//! An entry lives at `<kind>/<key>/` as `files/` (what its users see) and `manifest.json`. It is built in
//! `<kind>/<key>.tmp` and renamed into place, under the lock `<kind>/<key>.lock`; so a `.tmp` whose lock is free
//! belongs to a run that died. A process that uses an entry holds `<kind>/<key>.used.lock` shared until it exits, so
//! that no other process removes the entry meanwhile. Lock files are never removed: another run may be waiting on one.

mod key;
mod manifest;
mod tree;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};

pub(crate) use self::key::{Key, hex, sha256_file};
use self::manifest::{FILES, MANIFEST, scan, verify, write_manifest};
use self::tree::{list, remove, size};
use vvu_process::interrupt;
use vvu_process::progress::Progress;

/// Time that a failed build waits for the removal of its unfinished files.
const PATIENCE: Duration = Duration::from_secs(3);
/// Entries that no run has used for this long are removed.
const UNUSED_FOR: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Time between two attempts to take a lock.
const LOCK_PERIOD: Duration = Duration::from_millis(100);

/// The cache directory.
#[derive(Clone)]
pub struct Cache {
    root: PathBuf,
    progress: Progress,
    uses: Uses,
}

/// Locks of the entries in use, by their paths.
type Uses = Arc<Mutex<BTreeMap<PathBuf, File>>>;

/// The uses of the cache that [`Cache::open`] opens. Whoever gets an entry keeps paths into it, at the latest in the
/// command line of a VM, and nothing tells when the last one is gone; so the kernel drops these locks at exit.
static USES: LazyLock<Uses> = LazyLock::new(Uses::default);

/// A verified directory in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The directory of its files. Do not change them: the next run would build the entry again.
    pub(crate) path: PathBuf,
}

impl Cache {
    /// Opens `$XDG_CACHE_HOME/vvu` or `~/.cache/vvu`, and removes what runs that died and old keys have left.
    ///
    /// # Errors
    ///
    /// No home directory is known, or the directory cannot be made.
    pub fn open(progress: &Progress) -> Result<Self> {
        Self::open_with(place()?, progress, Arc::clone(&USES))
    }

    /// Opens a cache at `root`.
    ///
    /// # Errors
    ///
    /// The directory cannot be made.
    pub fn open_at(root: PathBuf, progress: &Progress) -> Result<Self> {
        Self::open_with(root, progress, Uses::default())
    }

    fn open_with(root: PathBuf, progress: &Progress, uses: Uses) -> Result<Self> {
        // A colon ends a name in the loader's list of library folders, a quotation mark one in apt's configuration.
        let usable = root.to_str().is_some_and(|path| !path.contains([':', '"', '\n']));
        ensure!(
            usable,
            "the cache cannot be in {}: want a path in UTF-8 without colon, quotation mark and line break; \
             XDG_CACHE_HOME names another place",
            root.display()
        );
        make_dir(&root)?;
        let cache = Self { root, progress: progress.clone(), uses };
        cache.sweep()?;
        Ok(cache)
    }

    /// A directory for files that are no entries, such as logs. A user locks it while it writes.
    ///
    /// # Errors
    ///
    /// The directory cannot be made.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join(name);
        make_dir(&path)?;
        Ok(path)
    }

    /// Waits for the named lock, saying so each second when another run holds it. Dropping the file releases it.
    ///
    /// # Errors
    ///
    /// The lock file cannot be made.
    pub(crate) fn lock(&self, name: &str) -> Result<File> {
        let (path, file) = open_lock(&self.root.join(name), "lock")?;
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        let what = Path::new(name).components().next().map(|part| part.as_os_str().to_string_lossy());
        let stage = self.progress.stage("waiting");
        let what = what.as_deref().unwrap_or(name);
        stage.update(format!("for another run that is making the same {what}"));
        // The wait is as long as the other run works. A blocking lock would not end at Ctrl-C, which is handled
        // in another thread.
        while let Err(error) = file.try_lock() {
            if let TryLockError::Error(error) = error {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
            interrupt::check()?;
            std::thread::sleep(LOCK_PERIOD);
        }
        stage.done(format!("for another run's {what}"));
        Ok(file)
    }

    /// The entry `key` of `kind`: verified if it is there, else filled by `build`, which gets an empty directory.
    ///
    /// # Errors
    ///
    /// `build` fails, or the cache cannot be written.
    pub(crate) fn entry(
        &self,
        kind: &str,
        key: &Key,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Entry> {
        let name = key.name();
        let dir = self.dir(kind)?;
        let _lock = self.lock(&format!("{kind}/{name}"))?;
        let place = dir.join(&name);
        let entry = Entry { path: place.join(FILES) };
        if place.exists() {
            match verify(&place) {
                Ok(()) => {
                    self.use_entry(&place)?;
                    return Ok(entry);
                }
                Err(damage) => {
                    self.progress.note(format!("cache: {kind} is damaged ({damage:#}); it is made again"));
                }
            }
        }

        let temp = dir.join(format!("{name}.tmp"));
        remove(&temp)?;
        let files = temp.join(FILES);
        make_dir(&files)?;
        let result = build(&files).and_then(|()| write_manifest(&temp, &scan(&files)?));
        if let Err(error) = result {
            // The build's error is what matters; what is not removed in time is left to the next run.
            if let Ok(removed) = self.discard(&temp) {
                let stage = self.progress.stage("tidy");
                stage.update(format!("removing the unfinished {kind}"));
                match removed.recv_timeout(PATIENCE) {
                    Err(RecvTimeoutError::Timeout) => {
                        stage.done(format!("the next run removes what is left of {kind}"))
                    }
                    _ => stage.done(format!("the unfinished {kind} is removed")),
                }
            }
            return Err(error);
        }
        remove(&place)?;
        fs::rename(&temp, &place).with_context(|| format!("cannot rename into {}", place.display()))?;
        self.use_entry(&place)?;
        Ok(entry)
    }

    /// Keeps other processes from removing the entry at `place`, whose lock the caller holds.
    fn use_entry(&self, place: &Path) -> Result<()> {
        let mut uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
        if !uses.contains_key(place) {
            let (path, file) = open_lock(place, "used.lock")?;
            // No other process holds it exclusively, except for a moment and with the lock that the caller holds.
            file.lock_shared().with_context(|| format!("cannot lock {}", path.display()))?;
            uses.insert(place.to_owned(), file);
        }
        Ok(())
    }

    /// Removes a large tree without making the caller wait.
    ///
    /// The channel closes when that is done. What is not yet removed when this process ends is left to the next one.
    ///
    /// # Errors
    ///
    /// `tree` is not on the cache's file system, or the cache cannot be written.
    pub(crate) fn discard(&self, tree: &Path) -> Result<Receiver<()>> {
        let trash = self.dir("trash")?;
        let name = Key::new().part("path", tree.as_os_str().as_encoded_bytes()).name();
        let lock = self.lock(&format!("trash/{name}"))?;
        let place = trash.join(format!("{name}.tmp"));
        remove(&place)?;
        fs::rename(tree, &place).with_context(|| format!("cannot move {}", tree.display()))?;
        Ok(remove_aside(place, lock))
    }

    /// Removes everything that no other run makes or uses at the moment; returns the bytes freed.
    ///
    /// # Errors
    ///
    /// Something cannot be removed.
    pub fn clean(&self) -> Result<u64> {
        let mut freed = 0;
        for kind in list(&self.root)? {
            if !kind.is_dir() {
                continue;
            }
            for path in list(&kind)? {
                if path.extension() == Some(OsStr::new("lock")) {
                    continue;
                }
                // Only directories are made under a lock.
                let lock = if path.is_dir() { try_lock_unused(&path)? } else { None };
                if lock.is_some() || path.is_file() {
                    freed += size(&path)?;
                    remove(&path)?;
                } else {
                    self.progress
                        .note(format!("cache: {} is made or used by another run; kept", path.display()));
                }
            }
        }
        Ok(freed)
    }

    /// Removes the temporary directories of runs that died, and entries that no run has used for a month.
    fn sweep(&self) -> Result<()> {
        for kind in list(&self.root)?.into_iter().filter(|path| path.is_dir()) {
            for path in list(&kind)? {
                let stale = path.extension() == Some(OsStr::new("tmp")) || is_unused(&path);
                if stale && let Some(lock) = try_lock_unused(&path)? {
                    remove_aside(path, lock);
                }
            }
        }
        Ok(())
    }
}

/// Removes a tree in a thread of its own, which holds `lock` meanwhile; the channel closes when it is done.
fn remove_aside(path: PathBuf, lock: File) -> Receiver<()> {
    let (done, closed) = mpsc::channel();
    std::thread::spawn(move || {
        // The next run removes what is left.
        let _ = remove(&path);
        drop(lock);
        drop(done);
    });
    closed
}

/// The directory of the cache, which may not exist: `$XDG_CACHE_HOME/vvu` or `~/.cache/vvu`.
///
/// # Errors
///
/// No home directory is known.
pub fn place() -> Result<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .context("no place for the cache: set HOME or XDG_CACHE_HOME to an absolute path")?;
    Ok(base.join("vvu"))
}

/// An entry that [`survey`] has found.
#[derive(Debug, PartialEq, Eq)]
pub struct Surveyed {
    /// The kind of entry, such as `kernel`.
    pub kind: String,
    /// The directory of its files.
    pub files: PathBuf,
    /// The damage, if there is any.
    pub damage: Option<String>,
}

/// Checks every entry of the cache at `root`. It changes nothing but the file times that manifests record.
///
/// # Errors
///
/// The cache cannot be read; that it is absent is no error.
pub fn survey(root: &Path) -> Result<Vec<Surveyed>> {
    let mut found = Vec::new();
    if !root.exists() {
        return Ok(found);
    }
    for kind in list(root)?.into_iter().filter(|path| path.is_dir()) {
        for place in list(&kind)?.into_iter().filter(|path| path.join(FILES).is_dir()) {
            // An entry in the making does not count.
            if place.extension() == Some(OsStr::new("tmp")) {
                continue;
            }
            found.push(Surveyed {
                kind: kind.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                files: place.join(FILES),
                damage: verify(&place).err().map(|damage| format!("{damage:#}")),
            });
        }
    }
    Ok(found)
}

fn is_unused(entry: &Path) -> bool {
    let used = fs::metadata(entry.join(MANIFEST)).and_then(|meta| meta.modified());
    used.is_ok_and(|used| SystemTime::now().duration_since(used).is_ok_and(|age| age > UNUSED_FOR))
}

/// The lock of an entry or of its temporary directory, if no run holds it or uses the entry.
fn try_lock_unused(path: &Path) -> Result<Option<File>> {
    let lock = try_lock(path, "lock")?;
    // A process that begins to use the entry holds the first lock, so the second need not be kept.
    let unused = lock.is_some() && try_lock(path, "used.lock")?.is_some();
    Ok(lock.filter(|_| unused))
}

/// The lock of this kind beside an entry or its temporary directory, if no run holds it.
fn try_lock(path: &Path, kind: &str) -> Result<Option<File>> {
    let (lock, file) = open_lock(path, kind)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", lock.display()))
        }
    }
}

fn open_lock(path: &Path, kind: &str) -> Result<(PathBuf, File)> {
    let lock = path.with_extension(kind);
    let file = File::options().create(true).write(true).truncate(false).open(&lock);
    let file = file.with_context(|| format!("cannot open the lock {}", lock.display()))?;
    Ok((lock, file))
}

fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make the directory {}", path.display()))
}

#[cfg(test)]
#[path = "cache_test.rs"]
mod tests;
