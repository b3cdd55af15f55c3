//! Manifests, which list the files of an entry so that damage is noticed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::key::sha256_file;
use super::tree::list;

/// The manifest's name in an entry.
pub(super) const MANIFEST: &str = "manifest.json";
/// The name of the directory beside it that holds the entry's files.
pub(super) const FILES: &str = "files";
/// Well above the granularity of file times.
const CLOCK_STEP: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Content {
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

/// The identity and times of a file. While they stay the same, so does the content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
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

pub(super) type Manifest = BTreeMap<PathBuf, Content>;

/// Every file and symbolic link below `root`, hashed.
pub(super) fn scan(root: &Path) -> Result<Manifest> {
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

pub(super) fn write_manifest(entry: &Path, manifest: &Manifest) -> Result<()> {
    let path = entry.join(MANIFEST);
    let temp = entry.join("manifest.new");
    let bytes = serde_json::to_vec(manifest).context("cannot encode the manifest")?;
    fs::write(&temp, bytes).with_context(|| format!("cannot write {}", temp.display()))?;
    fs::rename(&temp, &path).with_context(|| format!("cannot write {}", path.display()))
}

/// Compares an entry with its manifest. Only files touched since the last time are hashed again.
pub(super) fn verify(entry: &Path) -> Result<()> {
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
        // The manifest's time is the time of the last use of the entry.
        let file = File::options().append(true).open(&path).context("cannot open its manifest")?;
        file.set_modified(SystemTime::now()).context("cannot touch its manifest")?;
    }
    Ok(())
}
