//! The guests' initramfs: PID 1, `vvu`, busybox and lspci, and what a scenario adds.

mod binaries;
mod cpio;
mod disk;
mod own;
mod programs;
mod tools;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use vvu_init::modules::{DIRECTORY, ORDER};

use crate::cache::{Cache, Key, hex};
use crate::kernel::{Kernel, Module};

pub use binaries::{BuildProfile, GuestBinaries, build_xtask};
pub use cpio::Written;
use cpio::{Archive, Content};
pub use disk::{DiskImage, Pattern};
pub use own::add_own_program;
pub use programs::GuestPrograms;
pub use tools::GuestTools;

/// Directories of every guest. PID 1 mounts file systems on some of them.
const DIRECTORIES: [(&str, u32); 13] = [
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sbin", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("usr/bin", 0o755),
    ("usr/sbin", 0o755),
    ("var", 0o755),
];

const FILES: [(&str, &str); 3] = [
    ("etc/group", "root:x:0:\n"),
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
    ("etc/profile", "PS1='\\h:\\w\\$ '\n"),
];

/// The initramfs without what a scenario adds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseImage {
    /// The file, which is in the cache. Do not change it.
    pub path: PathBuf,
    /// The file's SHA-256 in hexadecimal.
    pub digest: String,
    /// The file's length in bytes.
    pub bytes: u64,
}

/// Something to add to the initramfs, or to replace in it.
#[derive(Debug)]
pub enum OverlayEntry {
    /// Everything below a directory of the host.
    Tree(PathBuf),
    /// Everything below a directory of the host, at another place.
    TreeAt {
        /// Absolute path in the guest.
        path: String,
        /// The directory.
        from: PathBuf,
    },
    /// A file of the host.
    File {
        /// Absolute path in the guest.
        path: String,
        /// Permissions in the guest.
        mode: u32,
        /// The file.
        from: PathBuf,
    },
    /// A file of these bytes.
    Bytes {
        /// Absolute path in the guest.
        path: String,
        /// Permissions in the guest.
        mode: u32,
        /// The content.
        bytes: Vec<u8>,
    },
    /// A disk image, as a file that the guest can write to.
    Disk {
        /// Absolute path in the guest.
        path: String,
        /// The image.
        image: DiskImage,
    },
}

/// Makes the initramfs that all scenarios share, or finds it in the cache.
///
/// # Errors
///
/// A file cannot be read, or the cache not be written.
pub fn build_base(cache: &Cache, binaries: &GuestBinaries, tools: &GuestTools) -> Result<BaseImage> {
    let mut bytes = Vec::new();
    base(binaries, tools)?.write(&mut bytes)?;
    let digest = hex(&Sha256::digest(&bytes));
    let entry = cache.entry("initramfs", &Key::new().part("archive", &digest), |dir| {
        let path = dir.join("base.cpio");
        fs::write(&path, &bytes).with_context(|| format!("cannot write {}", path.display()))
    })?;
    Ok(BaseImage { path: entry.path.join("base.cpio"), digest, bytes: bytes.len() as u64 })
}

fn base(binaries: &GuestBinaries, tools: &GuestTools) -> Result<Archive> {
    let mut archive = Archive::default();
    for (path, mode) in DIRECTORIES {
        archive.directory(path, mode)?;
    }
    for (path, text) in FILES {
        archive.file(path, 0o644, Content::Bytes(text.into()))?;
    }
    // The kernel opens the console for PID 1 before anything is mounted.
    archive.device("dev/console", 0o600, 5, 1)?;
    archive.device("dev/null", 0o666, 1, 3)?;
    archive.file("init", 0o755, Content::Copy(binaries.init.clone()))?;
    archive.file("bin/vvu", 0o755, Content::Copy(binaries.vvu.clone()))?;
    archive.file("bin/vvu-load", 0o755, Content::Copy(binaries.load.clone()))?;
    archive.file("bin/lspci", 0o755, Content::Copy(tools.lspci.clone()))?;
    archive.file("usr/share/misc/pci.ids", 0o644, Content::Copy(tools.pci_ids.clone()))?;
    archive.file("bin/busybox", 0o755, Content::Copy(tools.busybox.clone()))?;
    for applet in &tools.applets {
        archive.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    archive.symlink("usr/bin/env", "/bin/busybox")?;
    Ok(archive)
}

/// The modules of `kernel` that a guest has to load to have the modules `names`, and the list from which PID 1 knows
/// their order. There are none if the kernel has no modules.
///
/// # Errors
///
/// The kernel lacks one of them.
pub fn kernel_modules<'a>(
    kernel: &Kernel,
    names: impl IntoIterator<Item = &'a str>,
) -> Result<Vec<OverlayEntry>> {
    let Some(modules) = &kernel.modules else { return Ok(Vec::new()) };
    let modules =
        modules.load_order(names).with_context(|| format!("Linux {} cannot be used", kernel.version))?;
    let mut order = String::new();
    let mut entries = Vec::new();
    for Module { name, bytes } in modules {
        order.push_str(&format!("{name}\n"));
        entries.push(OverlayEntry::Bytes { path: format!("{DIRECTORY}/{name}.ko"), mode: 0o644, bytes });
    }
    entries.push(OverlayEntry::Bytes { path: ORDER.to_owned(), mode: 0o644, bytes: order.into() });
    Ok(entries)
}

/// Writes the base image and an archive of `overlay` behind it to `out`: the kernel unpacks one after the other.
///
/// # Errors
///
/// Something of the overlay cannot be read or is neither file, directory nor symbolic link, or `out` cannot be
/// written.
pub fn with_overlay(base: &BaseImage, overlay: &[OverlayEntry], out: &Path) -> Result<Written> {
    let mut archive = Archive::default();
    for entry in overlay {
        match entry {
            OverlayEntry::Tree(from) => archive.tree(from, "")?,
            OverlayEntry::TreeAt { path, from } => archive.tree(from, path)?,
            OverlayEntry::File { path, mode, from } => {
                archive.file(path, *mode, Content::Copy(from.clone()))?;
            }
            OverlayEntry::Bytes { path, mode, bytes } => {
                archive.file(path, *mode, Content::Bytes(bytes.clone()))?;
            }
            OverlayEntry::Disk { path, image } => archive.file(path, 0o600, Content::Disk(image.clone()))?,
        }
    }
    let unwritable = || format!("cannot write {}", out.display());
    let mut image = File::create(out).with_context(unwritable)?;
    let mut from = File::open(&base.path).with_context(|| format!("cannot open {}", base.path.display()))?;
    let copied = io::copy(&mut from, &mut image).with_context(unwritable)?;
    let mut image = BufWriter::with_capacity(1 << 16, image);
    let mut written = archive.write(&mut image).with_context(unwritable)?;
    image.flush().with_context(unwritable)?;
    written.bytes += copied;
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vvu_process::progress::Progress;

    fn inputs(dir: &Path) -> (GuestBinaries, GuestTools) {
        let file = |name: &str| {
            let path = dir.join(name);
            fs::write(&path, name).expect("write");
            path
        };
        let binaries = GuestBinaries { init: file("init"), vvu: file("vvu"), load: file("load") };
        let applets = vec!["ls".into(), "sh".into()];
        let tools =
            GuestTools { busybox: file("busybox"), applets, lspci: file("lspci"), pci_ids: file("pci.ids") };
        (binaries, tools)
    }

    #[test]
    fn equal_inputs_give_the_same_image_and_other_inputs_another() {
        let dir = tempfile::tempdir().expect("directory");
        let cache = Cache::open_at(dir.path().join("cache"), &Progress::new(true)).expect("cache");
        let (binaries, tools) = inputs(dir.path());
        let first = build_base(&cache, &binaries, &tools).expect("image");
        assert_eq!(build_base(&cache, &binaries, &tools).expect("image"), first);
        let bytes = fs::read(&first.path).expect("read");
        assert_eq!((bytes.len() as u64, hex(&Sha256::digest(&bytes))), (first.bytes, first.digest.clone()));
        fs::write(&binaries.vvu, "other").expect("write");
        assert_ne!(build_base(&cache, &binaries, &tools).expect("image").digest, first.digest);
    }

    #[test]
    fn an_overlay_follows_the_base_and_disks_report_their_digest() {
        let dir = tempfile::tempdir().expect("directory");
        let cache = Cache::open_at(dir.path().join("cache"), &Progress::new(true)).expect("cache");
        let (binaries, tools) = inputs(dir.path());
        let base = build_base(&cache, &binaries, &tools).expect("image");
        let out = dir.path().join("device.cpio");
        let image = DiskImage::seeded(1000, 3);
        let overlay = [OverlayEntry::Disk { path: "/disk.img".into(), image: image.clone() }];
        let written = with_overlay(&base, &overlay, &out).expect("overlay");
        let bytes = fs::read(&out).expect("read");
        assert_eq!(bytes.len() as u64, written.bytes);
        let (head, tail) = bytes.split_at(usize::try_from(base.bytes).expect("small"));
        assert!(head == fs::read(&base.path).expect("read") && tail.starts_with(b"070701"));
        let digest = image.write(&mut io::sink()).expect("digest");
        assert_eq!(written.disks.into_iter().collect::<Vec<_>>(), [("/disk.img".to_owned(), digest)]);
    }

    #[test]
    fn an_overlay_that_is_missing_is_named() {
        let dir = tempfile::tempdir().expect("directory");
        let missing = dir.path().join("missing");
        let base = BaseImage { path: missing.clone(), digest: String::new(), bytes: 0 };
        let error = with_overlay(&base, &[OverlayEntry::Tree(missing.clone())], &dir.path().join("out"))
            .expect_err("missing");
        assert!(error.to_string().contains(&missing.display().to_string()), "{error}");
    }
}
