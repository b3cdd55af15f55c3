//! Mounts the file system of a window and opens its file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, StatxAttributes, StatxFlags, openat, statx};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

use super::ext4::{FILE, Geometry};

/// Longest message of the kernel about a mount that is reported.
const MESSAGE: usize = 256;

/// There is no file system in a window.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The metadata cannot be written.
    #[error("cannot write to {path:?}: {source}")]
    Write {
        /// The persistent memory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The kernel does not mount it.
    #[error("cannot mount it{said}: {source}; check that the kernel has CONFIG_EXT4_FS and CONFIG_FS_DAX")]
    Mount {
        /// What the kernel says, after a comma.
        said: String,
        /// The cause.
        source: Errno,
    },
    /// Its file is not what was written, or not mapped directly.
    #[error("its file has {size} bytes{}: want {want} bytes, mapped directly", if *.direct { "" } else { ", in the page cache" })]
    File {
        /// Bytes of the file.
        size: u64,
        /// Bytes of the device.
        want: u64,
        /// The file is mapped without the page cache.
        direct: bool,
    },
}

/// Opens the file that is the memory at `path`, in the file system that is mounted there already, or in a new one.
pub(super) fn open(path: &Path, geometry: &Geometry) -> Result<File, MountError> {
    write(path, geometry).map_err(|source| MountError::Write { path: path.to_owned(), source })?;
    let mount = mount(path)?;
    let failed = |source| MountError::Mount { said: String::new(), source };
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = openat(&mount, FILE, flags, Mode::empty()).map_err(failed)?;
    let found = statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS).map_err(failed)?;
    let direct = found.stx_attributes.contains(StatxAttributes::DAX);
    let (size, want) = (found.stx_size, geometry.size());
    if size != want || !direct {
        return Err(MountError::File { size, want, direct });
    }
    Ok(file.into())
}

/// Writes the metadata, unless the file system is mounted. Then another process has written the same.
fn write(path: &Path, geometry: &Geometry) -> io::Result<()> {
    let exclusive = OpenOptions::new().write(true).custom_flags(libc::O_EXCL).open(path);
    match exclusive {
        Ok(memory) => {
            memory.write_all_at(&geometry.metadata(), 0)?;
            memory.sync_all()
        }
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Mounts it where no path leads to. The mount ends with the last file that is open in it.
fn mount(path: &Path) -> Result<OwnedFd, MountError> {
    let context = fsopen("ext4", FsOpenFlags::FSOPEN_CLOEXEC);
    let context = context.map_err(|source| MountError::Mount { said: String::new(), source })?;
    let made = (|| {
        fsconfig_set_string(&context, "source", path)?;
        fsconfig_set_string(&context, "dax", "always")?;
        // What the superblock says about errors may not be what was written.
        fsconfig_set_string(&context, "errors", "remount-ro")?;
        fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOATIME
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    })();
    made.map_err(|source| MountError::Mount { said: message(&context), source })
}

/// What the kernel says about a mount that failed, after a comma.
fn message(context: &OwnedFd) -> String {
    let mut bytes = [0; MESSAGE];
    let length = rustix::io::read(context, &mut bytes).unwrap_or(0);
    let text = String::from_utf8_lossy(&bytes[..length]);
    if text.is_empty() { String::new() } else { format!(", {}", text.trim()) }
}
