//! A writer for the archives the kernel unpacks as initramfs: "newc" cpio, as
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

/// What an archive holds, by path without the leading slash. Adding a path again replaces it.
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

/// Where a file's bytes come from when the archive is written.
#[derive(Debug)]
pub(super) enum Content {
    /// From memory.
    Bytes(Vec<u8>),
    /// From a file, which must not change in size meanwhile.
    Copy(PathBuf),
    /// A disk image, which is made while it is written.
    Disk(DiskImage),
}

/// What writing an archive has shown.
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

/// Counts what has been written, as padding depends on it.
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
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn bytes(archive: &Archive) -> Vec<u8> {
        let mut out = Vec::new();
        let written = archive.write(&mut out).expect("write");
        assert_eq!(written.bytes, out.len() as u64);
        out
    }

    /// Path, mode with type, and content of each entry, as the kernel would read them.
    fn read(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let whole = archive.len();
        let mut entries = Vec::new();
        loop {
            let (header, rest) = archive.split_at(110);
            assert_eq!(&header[..6], b"070701");
            let field = |index: usize| {
                let digits = std::str::from_utf8(&header[6 + 8 * index..14 + 8 * index]).expect("digits");
                u32::from_str_radix(digits, 16).expect("hexadecimal")
            };
            let (name_length, size) = (field(11) as usize, field(6) as usize);
            let name = std::str::from_utf8(&rest[..name_length - 1]).expect("name").to_owned();
            assert_eq!(rest[name_length - 1], 0);
            let after = |consumed: usize| (whole - rest.len() + consumed).next_multiple_of(4);
            let content = after(name_length) - (whole - rest.len());
            let next = after(content + size) - (whole - rest.len());
            if name == "TRAILER!!!" {
                assert!(rest[content..].iter().all(|&byte| byte == 0) && whole.is_multiple_of(512));
                return entries;
            }
            entries.push((name, field(1), rest[content..content + size].to_vec()));
            archive = &rest[next..];
        }
    }

    #[test]
    fn a_small_archive_has_these_very_bytes() {
        let mut archive = Archive::default();
        archive.file("etc/hi", 0o644, Content::Bytes(b"hello".to_vec())).expect("file");
        archive.device("console", 0o600, 5, 1).expect("device");
        let zero = "00000000";
        let golden = [
            // inode, mode, uid, gid, links, mtime, size, dev, rdev, name length, checksum
            &format!("0707010000000100002180{zero}{zero}00000001{zero}{zero}{zero}{zero}0000000500000001"),
            &format!("00000008{zero}console\0\0\0"),
            &format!("07070100000002000041ED{zero}{zero}00000002{zero}{zero}{zero}{zero}{zero}{zero}"),
            &format!("00000004{zero}etc\0\0\0"),
            &format!("07070100000003000081A4{zero}{zero}00000001{zero}00000005{zero}{zero}{zero}{zero}"),
            &format!("00000007{zero}etc/hi\0\0\0\0hello\0\0\0"),
            &format!("070701{zero}{zero}{zero}{zero}00000001{zero}{zero}{zero}{zero}{zero}{zero}"),
            &format!("0000000B{zero}TRAILER!!!\0\0\0\0"),
        ]
        .map(String::as_str)
        .concat();
        let mut golden = golden.into_bytes();
        golden.resize(golden.len().next_multiple_of(512), 0);
        assert_eq!(String::from_utf8(bytes(&archive)), String::from_utf8(golden));
    }

    #[test]
    fn order_of_adding_does_not_show() {
        let add = |names: [&str; 3]| {
            let mut archive = Archive::default();
            for name in names {
                archive.file(name, 0o600, Content::Bytes(name.as_bytes().to_vec())).expect("file");
            }
            bytes(&archive)
        };
        assert_eq!(add(["b/c", "a", "b-"]), add(["a", "b-", "b/c"]));
    }

    #[test]
    fn trees_keep_permissions_links_and_content_but_no_owner_or_time() {
        let make = || {
            let dir = tempfile::tempdir().expect("directory");
            let path = |name: &str| dir.path().join(name);
            fs::create_dir_all(path("bin")).expect("mkdir");
            fs::write(path("bin/tool"), "#!").expect("write");
            fs::set_permissions(path("bin/tool"), fs::Permissions::from_mode(0o4751)).expect("chmod");
            fs::set_permissions(path("bin"), fs::Permissions::from_mode(0o700)).expect("chmod");
            symlink("nowhere/at/all", path("dangling")).expect("symlink");
            symlink("bin", path("sbin")).expect("symlink");
            let mut archive = Archive::default();
            archive.tree(dir.path(), "").expect("tree");
            bytes(&archive)
        };
        let archive = make();
        assert_eq!(archive, make());
        let entries = read(&archive);
        let expected = [
            ("bin", 0o040_700, "".as_bytes()),
            ("bin/tool", 0o104_751, b"#!"),
            ("dangling", 0o120_777, b"nowhere/at/all"),
            ("sbin", 0o120_777, b"bin"),
        ];
        assert_eq!(entries, expected.map(|(name, mode, content)| (name.into(), mode, content.into())));
    }

    #[test]
    fn sockets_and_such_are_refused_by_name() {
        let dir = tempfile::tempdir().expect("directory");
        let _listener = UnixListener::bind(dir.path().join("socket")).expect("socket");
        let error = Archive::default().tree(dir.path(), "").expect_err("a socket");
        assert!(error.to_string().contains("socket is neither"), "{error}");
        let error = Archive::default().tree(&dir.path().join("socket"), "").expect_err("a socket");
        assert!(error.to_string().contains("not a directory"), "{error}");
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        let mut archive = Archive::default();
        for path in ["", "/", "a//b", "../x", "a/../b", "./a", "a/", "a\0b"] {
            archive.directory(path, 0o755).expect_err(path);
        }
        archive.file("a", 0o600, Content::Bytes(Vec::new())).expect("file");
        assert!(archive.directory("a/b", 0o755).is_err());
        archive.file("big", 0o600, Content::Disk(DiskImage::zero(1 << 32))).expect("file");
        let error = archive.write(io::sink()).expect_err("too big");
        assert!(format!("{error:#}").contains("/big: 4294967296 bytes"), "{error:#}");
    }
}
