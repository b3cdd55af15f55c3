//! Content-keyed directories under `$XDG_CACHE_HOME/vvu`, safe to share between runs.
//!
//! An entry lives at `<kind>/<key>/` as `files/` (what its users see) and `manifest.json`. It is built in
//! `<kind>/<key>.tmp` and renamed into place, under the lock `<kind>/<key>.lock`; so a `.tmp` whose lock is free
//! belongs to a run that died. Lock files are never removed: another run may be waiting on one.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::progress::Progress;

const MANIFEST: &str = "manifest.json";
const FILES: &str = "files";
/// Well above the granularity of file times.
const CLOCK_STEP: Duration = Duration::from_millis(100);
/// Entries nobody used for so long are removed.
const UNUSED_FOR: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// What an entry is made from: SHA-256 over labelled parts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Key(Sha256);

impl Key {
    /// A key with no parts.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a part. Labels and lengths are hashed too, so that bytes cannot move from one part to the next.
    #[must_use]
    pub(crate) fn part(mut self, label: &str, bytes: impl AsRef<[u8]>) -> Self {
        for piece in [label.as_bytes(), bytes.as_ref()] {
            self.0.update((piece.len() as u64).to_le_bytes());
            self.0.update(piece);
        }
        self
    }

    /// The key's name on disk: the first 128 bits in hexadecimal.
    pub(crate) fn name(&self) -> String {
        hex(&self.0.clone().finalize()[..16])
    }

    /// The whole SHA-256 in hexadecimal.
    pub(crate) fn digest(&self) -> String {
        hex(&self.0.clone().finalize())
    }
}

/// SHA-256 of a file in hexadecimal.
///
/// # Errors
///
/// The file cannot be read.
pub(crate) fn sha256_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 17];
    loop {
        let count = file.read(&mut buffer).with_context(|| format!("cannot read {}", path.display()))?;
        if count == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..count]);
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The cache directory.
#[derive(Clone)]
pub(crate) struct Cache {
    root: PathBuf,
    progress: Progress,
}

/// A verified directory in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Where its files are. Read only: a change makes the next run rebuild the entry.
    pub(crate) path: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Content {
    /// `stamp` is absent for a file that changed too shortly before it was hashed, see [`Stamp::of`].
    File {
        size: u64,
        mode: u32,
        sha256: String,
        stamp: Option<Stamp>,
    },
    Symlink {
        target: PathBuf,
    },
}

/// What changes when a file is touched: as long as it does not, the content is as last hashed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    inode: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// The stamp of a file about to be hashed.
    ///
    /// The kernel's file times advance in steps of some milliseconds; a second change within the step of the first
    /// would go unseen, so a file that changed just now gets none and is hashed again the next time.
    fn of(meta: &fs::Metadata) -> Option<Self> {
        let changed =
            Duration::new(u64::try_from(meta.ctime()).ok()?, u32::try_from(meta.ctime_nsec()).ok()?);
        let age = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + changed).ok()?;
        (age > CLOCK_STEP).then_some(Self {
            inode: meta.ino(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

type Manifest = BTreeMap<PathBuf, Content>;

impl Cache {
    /// Opens `$XDG_CACHE_HOME/vvu` (or `~/.cache/vvu`), removing what dead runs and old keys left.
    ///
    /// # Errors
    ///
    /// No home directory is known, or the directory cannot be made.
    pub(crate) fn open(progress: &Progress) -> Result<Self> {
        Self::open_at(place()?, progress)
    }

    /// Opens a cache at `root`.
    ///
    /// # Errors
    ///
    /// The directory cannot be made.
    pub(crate) fn open_at(root: PathBuf, progress: &Progress) -> Result<Self> {
        make_dir(&root)?;
        let cache = Self { root, progress: progress.clone() };
        cache.sweep()?;
        Ok(cache)
    }

    /// A directory for what is not an entry (downloads); its users see to their own locking with [`Cache::lock`].
    ///
    /// # Errors
    ///
    /// The directory cannot be made.
    pub(crate) fn dir(&self, name: &str) -> Result<PathBuf> {
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
        let path = self.root.join(format!("{name}.lock"));
        let file = File::options()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .with_context(|| format!("cannot open the lock {}", path.display()))?;
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
        // The wait is as long as the other run works; Ctrl-C ends it.
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        stage.done(format!("for another run's {what}"));
        Ok(file)
    }

    /// The entry `key` of `kind`: verified if it is there, else filled by `build`, which gets an empty directory.
    ///
    /// # Errors
    ///
    /// What `build` says, or the cache cannot be written.
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
                Ok(()) => return Ok(entry),
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
            let stage = self.progress.stage("tidy");
            stage.update(format!("removing the unfinished {kind}"));
            // The build's error is what matters; the next run removes what this could not.
            let _ = remove(&temp);
            stage.done(format!("the unfinished {kind} is removed"));
            return Err(error);
        }
        remove(&place)?;
        fs::rename(&temp, &place).with_context(|| format!("cannot rename into {}", place.display()))?;
        Ok(entry)
    }

    /// Removes a large tree without making the caller wait.
    ///
    /// What is not yet removed when this process ends is left to the next one.
    ///
    /// # Errors
    ///
    /// `tree` is not on the cache's file system, or the cache cannot be written.
    pub(crate) fn discard(&self, tree: &Path) -> Result<()> {
        let trash = self.dir("trash")?;
        let name = Key::new().part("path", tree.as_os_str().as_encoded_bytes()).name();
        let lock = self.lock(&format!("trash/{name}"))?;
        let place = trash.join(format!("{name}.tmp"));
        remove(&place)?;
        fs::rename(tree, &place).with_context(|| format!("cannot move {}", tree.display()))?;
        std::thread::spawn(move || {
            // What cannot be removed is found again by the next run's sweep.
            let _ = remove(&place);
            drop(lock);
        });
        Ok(())
    }

    /// Removes everything that no other run is making at the moment; returns the bytes freed.
    ///
    /// # Errors
    ///
    /// Something cannot be removed.
    pub(crate) fn clean(&self) -> Result<u64> {
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
                let lock = if path.is_dir() { try_lock_for(&path)? } else { None };
                if lock.is_some() || path.is_file() {
                    freed += size(&path)?;
                    remove(&path)?;
                } else {
                    self.progress
                        .note(format!("cache: {} is being made by another run; kept", path.display()));
                }
            }
        }
        Ok(freed)
    }

    /// Removes the temporary directories of dead runs and the entries nobody used for a month.
    fn sweep(&self) -> Result<()> {
        for kind in list(&self.root)?.into_iter().filter(|path| path.is_dir()) {
            for path in list(&kind)? {
                let stale = path.extension() == Some(OsStr::new("tmp")) || is_unused(&path);
                if stale && let Some(_lock) = try_lock_for(&path)? {
                    let stage = self.progress.stage("tidy");
                    let kind = kind.file_name().unwrap_or_default().to_string_lossy();
                    stage.update(format!("removing an old {kind}"));
                    remove(&path)?;
                    stage.done(format!("an old {kind} is removed"));
                }
            }
        }
        Ok(())
    }
}

/// Where the cache is, or is going to be: `$XDG_CACHE_HOME/vvu` or `~/.cache/vvu`.
///
/// # Errors
///
/// No home directory is known.
pub(crate) fn place() -> Result<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .context("no place for the cache: set HOME or XDG_CACHE_HOME to an absolute path")?;
    Ok(base.join("vvu"))
}

/// An entry as [`survey`] finds it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Surveyed {
    /// Its kind, such as `kernel`.
    pub(crate) kind: String,
    /// Where its files are.
    pub(crate) files: PathBuf,
    /// What is wrong with it.
    pub(crate) damage: Option<String>,
}

/// Looks at every entry of the cache at `root`, and changes nothing but what the entries remember of their files'
/// times.
///
/// # Errors
///
/// The cache cannot be read; that it is absent is no error.
pub(crate) fn survey(root: &Path) -> Result<Vec<Surveyed>> {
    let mut found = Vec::new();
    if !root.exists() {
        return Ok(found);
    }
    for kind in list(root)?.into_iter().filter(|path| path.is_dir()) {
        for place in list(&kind)?.into_iter().filter(|path| path.join(FILES).is_dir()) {
            // One that is being made is none yet.
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

/// The lock of an entry or of its temporary directory, if no run holds it.
fn try_lock_for(path: &Path) -> Result<Option<File>> {
    let lock = path.with_extension("lock");
    let file = File::options().create(true).write(true).truncate(false).open(&lock);
    let file = file.with_context(|| format!("cannot open the lock {}", lock.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", lock.display()))
        }
    }
}

fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make the directory {}", path.display()))
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).and_then(|entries| {
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()
    });
    let mut paths = entries.with_context(|| format!("cannot list {}", dir.display()))?;
    paths.sort();
    Ok(paths)
}

fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.with_context(|| format!("cannot remove {}", path.display())),
    }
}

fn size(path: &Path) -> Result<u64> {
    let meta = fs::symlink_metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    if !meta.is_dir() {
        return Ok(meta.len());
    }
    list(path)?.iter().map(|path| size(path)).sum()
}

/// Every file and symbolic link below `root`, hashed.
fn scan(root: &Path) -> Result<Manifest> {
    let mut manifest = Manifest::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for path in list(&dir)? {
            let meta =
                fs::symlink_metadata(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let relative = path.strip_prefix(root).context("listed below its root")?.to_owned();
            if meta.is_dir() {
                dirs.push(path);
            } else if meta.is_symlink() {
                let target =
                    fs::read_link(&path).with_context(|| format!("cannot read {}", path.display()))?;
                manifest.insert(relative, Content::Symlink { target });
            } else if meta.is_file() {
                let content = Content::File {
                    size: meta.len(),
                    mode: meta.mode(),
                    sha256: sha256_file(&path)?,
                    stamp: Stamp::of(&meta),
                };
                manifest.insert(relative, content);
            } else {
                bail!("{} is neither a file nor a symbolic link", path.display());
            }
        }
    }
    Ok(manifest)
}

fn write_manifest(entry: &Path, manifest: &Manifest) -> Result<()> {
    let path = entry.join(MANIFEST);
    let temp = entry.join("manifest.new");
    let bytes = serde_json::to_vec(manifest).context("cannot encode the manifest")?;
    fs::write(&temp, bytes).with_context(|| format!("cannot write {}", temp.display()))?;
    fs::rename(&temp, &path).with_context(|| format!("cannot write {}", path.display()))
}

/// Compares an entry with its manifest. Only files touched since the last time are hashed again.
fn verify(entry: &Path) -> Result<()> {
    let path = entry.join(MANIFEST);
    let bytes = fs::read(&path).context("its manifest is missing")?;
    let mut manifest: Manifest = serde_json::from_slice(&bytes).context("its manifest is unreadable")?;
    let root = entry.join(FILES);
    let mut touched = false;
    for (relative, content) in &mut manifest {
        let path = root.join(relative);
        let meta =
            fs::symlink_metadata(&path).with_context(|| format!("{} is missing", relative.display()))?;
        match content {
            Content::Symlink { target } => {
                if !fs::read_link(&path).is_ok_and(|found| found == *target) {
                    bail!("{} is not the link it was", relative.display());
                }
            }
            Content::File { size, mode, sha256, stamp } => {
                if !meta.is_file() || meta.len() != *size {
                    bail!("{} has {} bytes, want {size}", relative.display(), meta.len());
                }
                if meta.mode() != *mode {
                    bail!("{} has mode {:o}, want {mode:o}", relative.display(), meta.mode());
                }
                let now = Stamp::of(&meta);
                if now.is_none() || now != *stamp {
                    if sha256_file(&path)? != *sha256 {
                        bail!("{} has other content", relative.display());
                    }
                    *stamp = now;
                    touched = true;
                }
            }
        }
    }
    if touched {
        write_manifest(entry, &manifest)?;
    } else {
        // Its time says when the entry was last used.
        let file = File::options().append(true).open(&path).context("cannot open its manifest")?;
        file.set_modified(SystemTime::now()).context("cannot touch its manifest")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let cache = Cache::open_at(dir.path().join("vvu"), &Progress::new(true)).expect("opens");
        (dir, cache)
    }

    fn fill(dir: &Path) -> Result<()> {
        fs::create_dir(dir.join("sub"))?;
        fs::write(dir.join("sub/file"), "hello")?;
        std::os::unix::fs::symlink("sub/file", dir.join("link"))?;
        Ok(())
    }

    #[test]
    fn key_depends_on_labels_and_borders() {
        let name = |parts: &[(&str, &str)]| {
            parts.iter().fold(Key::new(), |key, (label, bytes)| key.part(label, bytes)).name()
        };
        assert_eq!(name(&[("a", "b")]), name(&[("a", "b")]));
        assert_eq!(
            name(&[("a", "b")]),
            "cf6ab613e3942391f88ed698557e1680",
            "keys must not change by themselves"
        );
        let keys =
            [name(&[("a", "bc")]), name(&[("ab", "c")]), name(&[("a", "b"), ("c", "")]), name(&[("a", "")])];
        for (at, key) in keys.iter().enumerate() {
            assert!(!keys[at + 1..].contains(key), "{keys:?}");
        }
    }

    #[test]
    fn the_cache_is_private() {
        let (_dir, cache) = cache();
        assert_eq!(fs::metadata(&cache.root).expect("made").mode() & 0o777, 0o700);
    }

    #[test]
    fn an_entry_is_built_once() {
        let (_dir, cache) = cache();
        let key = Key::new().part("x", "1");
        let first = cache.entry("kind", &key, fill).expect("built");
        let again = cache.entry("kind", &key, |_| bail!("built twice")).expect("found");
        assert_eq!(first, again);
        assert_eq!(fs::read(first.path.join("link")).expect("there"), b"hello");
    }

    #[test]
    fn damage_is_found_and_only_that_entry_is_rebuilt() {
        type Harm = fn(&Path) -> io::Result<()>;
        let harms: [(&str, Harm); 7] = [
            ("truncated", |files| File::options().write(true).open(files.join("sub/file"))?.set_len(2)),
            ("flipped", |files| fs::write(files.join("sub/file"), "hellp")),
            ("deleted", |files| fs::remove_file(files.join("sub/file"))),
            ("tree gone", |files| fs::remove_dir_all(files)),
            ("link", |files| fs::remove_file(files.join("link"))),
            ("no manifest", |files| fs::remove_file(files.join("../manifest.json"))),
            ("cut manifest", |files| fs::write(files.join("../manifest.json"), "{")),
        ];
        let (_dir, cache) = cache();
        let other = cache.entry("kind", &Key::new().part("x", "other"), fill).expect("built");
        for (name, harm) in harms {
            let key = Key::new().part("x", "1");
            let entry = cache.entry("kind", &key, fill).expect("built");
            harm(&entry.path).expect("harmed");
            let mut rebuilt = false;
            let entry = cache
                .entry("kind", &key, |dir| {
                    rebuilt = true;
                    fill(dir)
                })
                .expect("rebuilt");
            assert!(rebuilt, "{name} went unseen");
            assert_eq!(fs::read(entry.path.join("sub/file")).expect("there"), b"hello");
        }
        cache.entry("kind", &Key::new().part("x", "other"), |_| bail!("lost")).expect("untouched");
        assert!(other.path.exists());
    }

    #[test]
    fn a_touched_file_with_the_same_content_is_fine() {
        let (_dir, cache) = cache();
        let key = Key::new().part("x", "1");
        let entry = cache.entry("kind", &key, fill).expect("built");
        fs::write(entry.path.join("sub/file"), "hello").expect("rewritten");
        cache.entry("kind", &key, |_| bail!("rebuilt for nothing")).expect("found");
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let (_dir, cache) = cache();
        let key = Key::new().part("x", "1");
        let result = cache.entry("kind", &key, |dir| {
            fill(dir)?;
            bail!("no luck")
        });
        assert_eq!(result.expect_err("failed").to_string(), "no luck");
        let left = list(&cache.root.join("kind")).expect("listed");
        assert!(left.iter().all(|path| path.extension() == Some(OsStr::new("lock"))), "{left:?}");
    }

    #[test]
    fn discarded_trees_vanish() {
        let (_dir, cache) = cache();
        let tree = cache.dir("kind").expect("made").join("tree");
        for _ in 0..2 {
            make_dir(&tree.join("sub")).expect("made");
            cache.discard(&tree).expect("moved");
            assert!(!tree.exists());
        }
        // The remover holds the lock until it is done.
        let name = Key::new().part("path", tree.as_os_str().as_encoded_bytes()).name();
        let _lock = cache.lock(&format!("trash/{name}")).expect("locked");
        assert!(!cache.root.join(format!("trash/{name}.tmp")).exists());
    }

    #[test]
    fn runs_at_once_build_once() {
        let (_dir, cache) = cache();
        let builds = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let entry = cache.entry("kind", &Key::new().part("x", "1"), |dir| {
                        builds.fetch_add(1, Ordering::Relaxed);
                        fill(dir)
                    });
                    assert!(entry.expect("one builds, the others find").path.join("sub/file").exists());
                });
            }
        });
        assert_eq!(builds.into_inner(), 1);
    }

    #[test]
    fn what_dead_runs_left_is_swept_but_not_what_is_being_built() {
        let (_dir, cache) = cache();
        let (dead, alive) = (cache.root.join("kind/dead.tmp"), cache.root.join("kind/alive.tmp"));
        make_dir(&dead.join(FILES)).expect("made");
        make_dir(&alive.join(FILES)).expect("made");
        let lock = cache.lock("kind/alive").expect("locked");
        Cache::open_at(cache.root.clone(), &cache.progress).expect("opens");
        assert!(!dead.exists() && alive.exists());
        cache.clean().expect("cleaned");
        assert!(alive.exists());
        drop(lock);
        cache.clean().expect("cleaned");
        assert!(!alive.exists());
    }

    #[test]
    fn entries_unused_for_long_are_swept() {
        let (_dir, cache) = cache();
        let entry = cache.entry("kind", &Key::new().part("x", "1"), fill).expect("built");
        let manifest = File::options().append(true).open(entry.path.join("../manifest.json")).expect("there");
        manifest.set_modified(SystemTime::now() - 2 * UNUSED_FOR).expect("aged");
        Cache::open_at(cache.root.clone(), &cache.progress).expect("opens");
        assert!(!entry.path.exists());
    }
}
