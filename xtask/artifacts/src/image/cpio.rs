//! Writes the archives that the kernel unpacks as initramfs: "newc" cpio, as
//! Documentation/driver-api/early-userspace/buffer-format.rst of Linux describes it.
//!
//! Equal content gives equal bytes: entries are sorted, owned by root and dated 1970.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::disk::DiskImage;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Archives end on this boundary, so that the next one can follow.
const BLOCK: u64 = 512;

/// An archive: nodes by path without the leading slash. Adding a path again replaces its node.
#[derive(Debug, Default)]
pub(super) struct Archive {
    nodes: BTreeMap<String, Node>,
}

#[derive(Debug)]
enum Node {
    Directory { mode: u32 },
    File { mode: u32, content: Content },
    Symlink { target: String },
    Device { mode: u32, major: u32, minor: u32 },
}

/// The source of a file's bytes when the archive is written.
#[derive(Debug)]
pub(super) enum Content {
    /// From memory.
    Bytes(Vec<u8>),
    /// From a file, which must not change in size meanwhile.
    Copy(PathBuf),
    /// A disk image, which is made while it is written.
    Disk(DiskImage),
}

/// Facts about an archive that was written.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Length of the archive in bytes, a multiple of 512.
    pub bytes: u64,
    /// SHA-256 of each disk image in hexadecimal, by its path in the guest.
    pub disks: BTreeMap<String, String>,
}

impl Archive {
    /// Adds a directory, and those above it.
    pub(super) fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        self.insert(path, Node::Directory { mode: mode & 0o7777 })
    }

    /// Adds a file, and the directories above it.
    pub(super) fn file(&mut self, path: &str, mode: u32, content: Content) -> Result<()> {
        self.insert(path, Node::File { mode: mode & 0o7777, content })
    }

    /// Adds a symbolic link, and the directories above it.
    pub(super) fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.insert(path, Node::Symlink { target: target.to_owned() })
    }

    /// Adds a character device, and the directories above it.
    pub(super) fn device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<()> {
        self.insert(path, Node::Device { mode: mode & 0o7777, major, minor })
    }

    /// Adds everything below a directory of the host below `place` in the guest, `""` being the root: files,
    /// directories and symbolic links as such, with their permissions.
    pub(super) fn tree(&mut self, from: &Path, place: &str) -> Result<()> {
        let metadata = fs::metadata(from).with_context(|| format!("cannot read {}", from.display()))?;
        ensure!(metadata.is_dir(), "{} is not a directory", from.display());
        let below = if place.is_empty() { String::new() } else { format!("{place}/") };
        self.tree_at(from, &below)
    }

    fn tree_at(&mut self, from: &Path, below: &str) -> Result<()> {
        let unreadable = || format!("cannot read {}", from.display());
        for entry in fs::read_dir(from).with_context(unreadable)? {
            let entry = entry.with_context(unreadable)?;
            let path = entry.path();
            let unreadable = || format!("cannot read {}", path.display());
            let name = entry.file_name();
            let Some(name) = name.to_str() else { bail!("the name of {} is not UTF-8", path.display()) };
            let name = format!("{below}{name}");
            let kind = entry.file_type().with_context(unreadable)?;
            let mode = entry.metadata().with_context(unreadable)?.permissions().mode();
            if kind.is_dir() {
                self.directory(&name, mode)?;
                self.tree_at(&path, &format!("{name}/"))?;
            } else if kind.is_file() {
                self.file(&name, mode, Content::Copy(path))?;
            } else if kind.is_symlink() {
                let target = fs::read_link(&path).with_context(unreadable)?;
                let Some(target) = target.to_str() else {
                    bail!("the target of {} is not UTF-8", path.display())
                };
                self.symlink(&name, target)?;
            } else {
                bail!("{} is neither a file, a directory nor a symbolic link", path.display());
            }
        }
        Ok(())
    }

    fn insert(&mut self, path: &str, node: Node) -> Result<()> {
        let path = path.strip_prefix('/').unwrap_or(path);
        let proper = |name: &str| !matches!(name, "" | "." | "..") && !name.contains('\0');
        ensure!(path.split('/').all(proper), "{path:?} is no plain path in the guest");
        // Linux, PATH_MAX: the kernel skips what has a longer name.
        ensure!(path.len() < 4096, "{path:?} is longer than 4095 bytes");
        let above = path.match_indices('/').map(|(end, _)| &path[..end]);
        for parent in above {
            match self.nodes.get(parent) {
                None => {
                    self.nodes.insert(parent.to_owned(), Node::Directory { mode: 0o755 });
                }
                Some(Node::Directory { .. }) => {}
                Some(_) => bail!("{path:?} lies below {parent:?}, which is no directory"),
            }
        }
        self.nodes.insert(path.to_owned(), node);
        Ok(())
    }

    /// Writes the archive.
    pub(super) fn write(&self, out: impl Write) -> Result<Written> {
        let mut out = Counted { out, bytes: 0 };
        let mut disks = BTreeMap::new();
        for (inode, (path, node)) in (1..).zip(&self.nodes) {
            let header = Header::of(inode, node).with_context(|| format!("cannot archive /{path}"))?;
            out.header(&header, path)?;
            match node {
                Node::File { content, .. } => {
                    let digest = content.write(u64::from(header.size), &mut out);
                    if let Some(digest) = digest.with_context(|| format!("cannot archive /{path}"))? {
                        disks.insert(format!("/{path}"), digest);
                    }
                }
                Node::Symlink { target } => out.write_all(target.as_bytes())?,
                Node::Directory { .. } | Node::Device { .. } => {}
            }
            out.pad(4)?;
        }
        out.header(&Header { links: 1, ..Header::default() }, "TRAILER!!!")?;
        out.pad(BLOCK)?;
        out.flush()?;
        Ok(Written { bytes: out.bytes, disks })
    }
}

impl Content {
    /// Length in bytes.
    fn size(&self) -> Result<u64> {
        Ok(match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Copy(path) => {
                fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len()
            }
            Self::Disk(disk) => disk.size,
        })
    }

    /// Writes `size` bytes; a disk image yields its SHA-256.
    fn write(&self, size: u64, out: &mut impl Write) -> Result<Option<String>> {
        match self {
            Self::Bytes(bytes) => out.write_all(bytes)?,
            Self::Copy(path) => {
                let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
                let copied = io::copy(&mut file.take(size), out)?;
                ensure!(copied == size, "{} became shorter while it was read", path.display());
            }
            Self::Disk(disk) => return disk.write(out).map(Some),
        }
        Ok(None)
    }
}

/// The fields that differ; the others are zero.
#[derive(Default)]
struct Header {
    inode: u32,
    mode: u32,
    links: u32,
    size: u32,
    major: u32,
    minor: u32,
}

impl Header {
    fn of(inode: u32, node: &Node) -> Result<Self> {
        let header = Self { inode, links: 1, ..Self::default() };
        Ok(match node {
            Node::Directory { mode } => Self { mode: DIRECTORY | mode, links: 2, ..header },
            Node::File { mode, content } => {
                let size = content.size()?;
                let Ok(size) = u32::try_from(size) else {
                    bail!("{size} bytes do not fit into an initramfs, whose files are smaller than 4 GiB");
                };
                Self { mode: REGULAR | mode, size, ..header }
            }
            Node::Symlink { target } => {
                let size = u32::try_from(target.len()).context("overlong target")?;
                Self { mode: SYMLINK | 0o777, size, ..header }
            }
            Node::Device { mode, major, minor } => {
                Self { mode: CHARACTER_DEVICE | mode, major: *major, minor: *minor, ..header }
            }
        })
    }
}

/// Counts the bytes that have been written, since padding depends on their number.
struct Counted<W> {
    out: W,
    bytes: u64,
}

impl<W: Write> Counted<W> {
    fn header(&mut self, header: &Header, name: &str) -> Result<()> {
        let length = u32::try_from(name.len() + 1).context("overlong name")?;
        let Header { inode, mode, links, size, major, minor } = *header;
        // Magic, inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name length, checksum.
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, length, 0];
        self.write_all(b"070701")?;
        for field in fields {
            write!(self, "{field:08X}")?;
        }
        self.write_all(name.as_bytes())?;
        self.write_all(b"\0")?;
        self.pad(4)
    }

    fn pad(&mut self, boundary: u64) -> Result<()> {
        while !self.bytes.is_multiple_of(boundary) {
            self.write_all(b"\0")?;
        }
        Ok(())
    }
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.out.write(bytes)?;
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
#[path = "cpio_test.rs"]
mod tests;
