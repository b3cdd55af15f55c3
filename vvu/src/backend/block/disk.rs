//! The disk: a file or block device, read and written straight from and to guest memory.
#![expect(unsafe_code, reason = "preadv and pwritev take guest memory as raw pointers")]

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use super::faults::{Call, Faults};
use super::options::{BlockOptions, QUEUES_MAX, SEGMENTS_MAX, SERIAL_MAX};

/// Bytes of a sector, the unit of all addresses and lengths (virtio 1.2, 5.2.4).
pub(super) const SECTOR_SIZE: u16 = 512;

/// Most pieces of memory in one system call (`IOV_MAX`).
const PIECES_MAX: usize = 1024;

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A disk cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file does not exist.
    #[error("disk {path:?} does not exist: create one, for example with `truncate -s 1G {}`", path.display())]
    NotFound {
        /// The path.
        path: PathBuf,
    },
    /// The path is a directory.
    #[error("disk {path:?} is a directory: name a disk image or block device")]
    Directory {
        /// The path.
        path: PathBuf,
    },
    /// The path is a pipe, a socket or a character device.
    #[error("disk {path:?} is neither a regular file nor a block device")]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// This user may not open the disk.
    #[error("no permission to open disk {path:?} for {access}: change its mode or owner{}",
        if *.access == "writing" { ", or serve it read-only" } else { "" })]
    Permission {
        /// The path.
        path: PathBuf,
        /// "reading" or "writing".
        access: &'static str,
    },
    /// The disk has no bytes.
    #[error("disk {path:?} is empty: give it a size, for example with `truncate -s 1G {}`", path.display())]
    Empty {
        /// The path.
        path: PathBuf,
    },
    /// The size is not a multiple of 512 bytes.
    #[error(
        "disk {path:?} has {got} bytes, which is no multiple of {SECTOR_SIZE}: enlarge it with `truncate -s {} {}`",
        got.next_multiple_of(SECTOR_SIZE.into()), path.display()
    )]
    Size {
        /// The path.
        path: PathBuf,
        /// The size in bytes.
        got: u64,
    },
    /// Another process serves the disk.
    #[error("disk {path:?} is served by another process: stop that one, or serve it read-only in both")]
    Busy {
        /// The path.
        path: PathBuf,
    },
    /// The serial number is too long or not printable.
    #[error("serial number {got:?}: want 1 to {SERIAL_MAX} printable ASCII characters")]
    Serial {
        /// The serial number that was asked for.
        got: String,
    },
    /// Too few or too many queues.
    #[error("{got} queues: want 1 to {QUEUES_MAX}")]
    Queues {
        /// The number asked for.
        got: u16,
    },
    /// Too few or too many pieces of memory in a request.
    #[error("requests of {got} pieces of memory: want 1 to {SEGMENTS_MAX}")]
    Segments {
        /// The number asked for.
        got: u16,
    },
    /// A system call failed.
    #[error("cannot {what} disk {path:?}: {source}")]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// An open, locked disk. Offsets and lengths are in bytes, and the caller has checked them against
/// [`size`](Self::size).
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    size: u64,
    read_only: bool,
    serial: [u8; SERIAL_MAX],
    /// Whether a flush has failed.
    flush_failed: Mutex<bool>,
    pub(super) faults: Faults,
}

impl Disk {
    pub(super) fn open(options: &BlockOptions) -> Result<Self, OpenError> {
        let BlockOptions { path, read_only, .. } = options;
        let read_only = *read_only;
        let serial = serial(options)?;
        let failed = |what, source: io::Error| match source.kind() {
            ErrorKind::NotFound => OpenError::NotFound { path: path.clone() },
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => OpenError::Permission {
                path: path.clone(),
                access: if read_only { "reading" } else { "writing" },
            },
            _ => OpenError::Io { what, path: path.clone(), source },
        };

        // Checked before it is opened: to open a pipe would wait, to open a tape would wind it.
        let kind = fs::metadata(path).map_err(|error| failed("look up", error))?.file_type();
        if kind.is_dir() {
            return Err(OpenError::Directory { path: path.clone() });
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::Kind { path: path.clone() });
        }
        let mut file =
            File::options().read(true).write(!read_only).open(path).map_err(|error| failed("open", error))?;
        lock(&file, path, read_only)?;

        let size = file.seek(SeekFrom::End(0)).map_err(|error| failed("get the size of", error))?;
        if size == 0 {
            return Err(OpenError::Empty { path: path.clone() });
        }
        if !size.is_multiple_of(SECTOR_SIZE.into()) {
            return Err(OpenError::Size { path: path.clone(), got: size });
        }
        let (flush_failed, faults) = (Mutex::new(false), Faults::default());
        Ok(Self { file, size, read_only, serial, flush_failed, faults })
    }

    /// Forgets that a flush has failed, as if the disk had been opened again.
    #[cfg(fuzzing)]
    pub(super) fn forget_failure(&self) {
        *self.flush_failed.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn sectors(&self) -> u64 {
        self.size / u64::from(SECTOR_SIZE)
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The serial number, padded with zeroes.
    pub(super) fn serial(&self) -> &[u8; SERIAL_MAX] {
        &self.serial
    }

    /// Fills `memory` with the bytes at `offset`.
    ///
    /// # Errors
    /// Those of preadv(2), and `UnexpectedEof` when the disk has become smaller.
    pub(super) fn read(&self, offset: u64, memory: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.transfer(Call::Read, offset, memory, ErrorKind::UnexpectedEof, |fd, pieces, offset| {
            let count = i32::try_from(pieces.len()).unwrap_or(0);
            // SAFETY: each of the `count` pieces is a range of mapped memory that `memory` borrows, in which Rust has
            // no references, since the guest may change it at any time.
            unsafe { libc::preadv(fd, pieces.as_ptr(), count, offset) }
        })
    }

    /// Writes `memory` at `offset`.
    ///
    /// # Errors
    /// Those of pwritev(2), and `WriteZero` when the disk takes no more.
    pub(super) fn write(&self, offset: u64, memory: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.transfer(Call::Write, offset, memory, ErrorKind::WriteZero, |fd, pieces, offset| {
            let count = i32::try_from(pieces.len()).unwrap_or(0);
            // SAFETY: as in `read`; the memory is only read.
            unsafe { libc::pwritev(fd, pieces.as_ptr(), count, offset) }
        })
    }

    fn transfer(
        &self,
        call: Call,
        offset: u64,
        memory: &[VolatileSlice<'_>],
        ended: ErrorKind,
        transfer: impl Fn(i32, &[libc::iovec], libc::off_t) -> isize,
    ) -> io::Result<()> {
        let piece = |slice: &VolatileSlice<'_>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        let mut pieces: Vec<_> = memory.iter().map(piece).collect();
        let mut pieces = pieces.as_mut_slice();
        let mut offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        while !pieces.is_empty() {
            let count = self.faults.limit(call, pieces.len().min(PIECES_MAX))?;
            let moved = transfer(self.file.as_raw_fd(), &pieces[..count], offset);
            let Ok(moved) = usize::try_from(moved) else {
                match io::Error::last_os_error() {
                    error if error.kind() == ErrorKind::Interrupted => continue,
                    error => return Err(error),
                }
            };
            if moved == 0 {
                return Err(ended.into());
            }
            offset += libc::off_t::try_from(moved).map_err(io::Error::other)?;
            pieces = advance(pieces, moved);
        }
        Ok(())
    }

    /// Makes all writes so far durable.
    ///
    /// After a failure the kernel drops the writes that it could not carry out, reports the error once, and succeeds
    /// from then on. So once a flush has failed, all flushes fail, of every queue and every front-end, until
    /// the disk is opened again.
    ///
    /// # Errors
    /// Those of fdatasync(2).
    pub(super) fn flush(&self) -> io::Result<()> {
        // Locked throughout: of two flushes at the same time, the kernel tells one of the failure.
        let mut failed = self.flush_failed.lock().unwrap_or_else(PoisonError::into_inner);
        if *failed {
            return Err(io::Error::other("an earlier flush failed, and with it writes may be lost"));
        }
        let flushed = self.faults.check(Call::Flush).and_then(|()| self.file.sync_data());
        if let Err(error) = &flushed {
            *failed = true;
            log::error!(
                "writes to the disk may be lost: {error}; every flush fails until the back-end is started again"
            );
        }
        flushed
    }

    /// Frees `len` bytes at `offset`, which may read as anything afterwards. A file system that cannot free them keeps
    /// them: a discard is a hint.
    ///
    /// # Errors
    /// Those of fallocate(2).
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.fallocate(flags, offset, len).map(drop)
    }

    /// Makes `len` bytes at `offset` read as zeroes, and frees them if `unmap`.
    ///
    /// # Errors
    /// Those of fallocate(2) and pwrite(2).
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let flags = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        if self.fallocate(flags | FallocateFlags::KEEP_SIZE, offset, len)? {
            return Ok(());
        }
        let (mut offset, mut rest) = (offset, len);
        while rest != 0 {
            let count = usize::try_from(rest).unwrap_or(usize::MAX).min(ZEROES.len());
            self.faults.check(Call::Write)?;
            self.file.write_all_at(&ZEROES[..count], offset)?;
            let count = u64::try_from(count).map_err(io::Error::other)?;
            (offset, rest) = (offset + count, rest - count);
        }
        Ok(())
    }

    /// Calls fallocate(2), and returns whether the file system supports the operation.
    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
        self.faults.check(Call::Allocate)?;
        loop {
            match rustix::fs::fallocate(&self.file, flags, offset, len) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                // A block device answers INVAL when its blocks are larger than the range's alignment.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Takes an advisory lock on the disk, shared with other readers if `read_only`.
fn lock(file: &File, path: &Path, read_only: bool) -> Result<(), OpenError> {
    let taken = if read_only { file.try_lock_shared() } else { file.try_lock() };
    match taken {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(OpenError::Busy { path: path.to_owned() }),
        // Some file systems and small kernels have no locks.
        Err(TryLockError::Error(error))
            if [Errno::NOSYS, Errno::OPNOTSUPP, Errno::NOLCK]
                .iter()
                .any(|errno| error.raw_os_error() == Some(errno.raw_os_error())) =>
        {
            log::warn!("disk {path:?} cannot be locked, so nothing keeps others from writing it: {error}");
            Ok(())
        }
        Err(TryLockError::Error(source)) => {
            Err(OpenError::Io { what: "lock", path: path.to_owned(), source })
        }
    }
}

/// The rest of `pieces` after the first `moved` bytes.
fn advance(pieces: &mut [libc::iovec], mut moved: usize) -> &mut [libc::iovec] {
    let done = pieces
        .iter()
        .take_while(|piece| {
            let whole = moved >= piece.iov_len;
            if whole {
                moved -= piece.iov_len;
            }
            whole
        })
        .count();
    let rest = &mut pieces[done..];
    if let Some(first) = rest.first_mut() {
        first.iov_base = first.iov_base.wrapping_byte_add(moved);
        first.iov_len -= moved;
    }
    rest
}

fn serial(options: &BlockOptions) -> Result<[u8; SERIAL_MAX], OpenError> {
    let printable = |byte: &u8| byte.is_ascii_graphic() || *byte == b' ';
    let text: Vec<u8> = match &options.serial {
        Some(serial) => {
            let good = (1..=SERIAL_MAX).contains(&serial.len()) && serial.as_bytes().iter().all(printable);
            if !good {
                return Err(OpenError::Serial { got: serial.clone() });
            }
            serial.clone().into_bytes()
        }
        None => {
            let name = options.path.file_name().map(OsStrExt::as_bytes).unwrap_or_default();
            name.iter().copied().filter(printable).take(SERIAL_MAX).collect()
        }
    };
    let text = if text.is_empty() { b"vvu" } else { text.as_slice() };
    let mut serial = [0; SERIAL_MAX];
    serial[..text.len()].copy_from_slice(text);
    Ok(serial)
}

#[cfg(test)]
#[path = "disk_test.rs"]
pub(super) mod tests;
