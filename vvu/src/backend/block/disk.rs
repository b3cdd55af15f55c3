//! The disk: a file or block device, read and written straight from and to guest memory.
#![expect(unsafe_code, reason = "preadv and pwritev take guest memory as raw pointers")]

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use libc::iovec;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::faults::{Call, Faults};
use super::gate::Gate;
use super::open_error::OpenError;
use super::options::{BlockOptions, SERIAL_MAX};
use super::topology::{self, Alignment, Topology};

/// Bytes of a sector, the unit of all addresses and lengths (virtio 1.2, 5.2.4).
pub(super) const SECTOR_SIZE: u16 = 512;

/// How long a lock is waited for that a back-end which was killed still has: the kernel keeps its file open until the
/// disk has carried out the requests that were in flight in an io_uring.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_INTERVAL: Duration = Duration::from_millis(5);

/// A system call on the disk. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step<'a> {
    /// preadv(2)
    Read { pieces: &'a [iovec], offset: u64 },
    /// pwritev(2)
    Write { pieces: &'a [iovec], offset: u64 },
    /// fdatasync(2)
    Flush,
    /// fallocate(2)
    Allocate { flags: FallocateFlags, offset: u64, len: u64 },
    /// ioctl(2) `BLKDISCARD`
    Discard { offset: u64, len: u64 },
}

/// An open, locked disk. Whoever names offsets and lengths has checked them against [`size`](Self::size).
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    size: u64,
    read_only: bool,
    serial: [u8; SERIAL_MAX],
    is_device: bool,
    /// What direct I/O asks for, if the disk is opened for that.
    direct: Option<Alignment>,
    topology: Topology,
    pub(super) gate: Gate,
    pub(super) faults: Faults,
}

impl Disk {
    pub(super) fn open(options: &BlockOptions) -> Result<Self, OpenError> {
        let BlockOptions { path, read_only, direct, .. } = options;
        let (read_only, direct) = (*read_only, *direct);
        let serial = serial(options)?;
        let failed = |what, source: io::Error| match source.kind() {
            ErrorKind::NotFound => OpenError::NotFound { path: path.clone() },
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => OpenError::Permission {
                path: path.clone(),
                access: if read_only { "reading" } else { "writing" },
            },
            // What open(2) answers to O_DIRECT.
            ErrorKind::InvalidInput if direct && what == OPEN => OpenError::Direct { path: path.clone() },
            _ => OpenError::Io { what, path: path.clone(), source },
        };

        // Checked before it is opened: to open a pipe would wait, to open a tape would wind it.
        let kind = fs::metadata(path).map_err(|error| failed("look up", error))?.file_type();
        if kind.is_dir() {
            return Err(OpenError::Directory { path: path.clone() });
        }
        let is_device = kind.is_block_device();
        if !kind.is_file() && !is_device {
            return Err(OpenError::Kind { path: path.clone() });
        }
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let open = File::options().read(true).write(!read_only).custom_flags(flags).open(path);
        let mut file = open.map_err(|error| failed(OPEN, error))?;
        lock(&file, path, read_only)?;

        let asked = |error| failed("get the block size of", error);
        let direct = if direct {
            let alignment = Alignment::of(&file, is_device).map_err(asked)?;
            Some(alignment.ok_or_else(|| OpenError::Direct { path: path.clone() })?)
        } else {
            None
        };
        let topology = Topology::of(&file, is_device, direct).map_err(asked)?;
        let size = file.seek(SeekFrom::End(0)).map_err(|error| failed("get the size of", error))?;
        if size == 0 {
            return Err(OpenError::Empty { path: path.clone() });
        }
        let block = topology.logical;
        if !size.is_multiple_of(block.into()) {
            return Err(OpenError::Size { path: path.clone(), got: size, block });
        }
        let (gate, faults) = (Gate::default(), Faults::default());
        Ok(Self { file, size, read_only, serial, is_device, direct, topology, gate, faults })
    }

    /// Makes direct I/O ask for this.
    #[cfg(test)]
    pub(super) fn set_alignment(&mut self, memory: u32, block: u32) {
        self.direct = Some(Alignment { memory, block });
        self.topology.logical = block;
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

    /// Whether it is a block device.
    pub(super) fn is_device(&self) -> bool {
        self.is_device
    }

    /// What direct I/O asks for, if the disk is opened for that.
    pub(super) fn direct(&self) -> Option<Alignment> {
        self.direct
    }

    pub(super) fn topology(&self) -> Topology {
        self.topology
    }

    /// The serial number, padded with zeroes.
    pub(super) fn serial(&self) -> &[u8; SERIAL_MAX] {
        &self.serial
    }

    /// The descriptor on which the steps are carried out.
    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Returns what is to be carried out in place of `step`: in an ordinary build `step` itself.
    ///
    /// # Errors
    /// That of the step, if it fails without being carried out.
    pub(super) fn admit<'a>(&self, step: Step<'a>) -> io::Result<Step<'a>> {
        Ok(match step {
            Step::Read { pieces, offset } => {
                Step::Read { pieces: &pieces[..self.faults.limit(Call::Read, pieces.len())?], offset }
            }
            Step::Write { pieces, offset } => {
                Step::Write { pieces: &pieces[..self.faults.limit(Call::Write, pieces.len())?], offset }
            }
            Step::Flush => self.faults.check(Call::Flush).map(|()| step)?,
            Step::Allocate { .. } | Step::Discard { .. } => {
                self.faults.check(Call::Allocate).map(|()| step)?
            }
        })
    }

    /// Carries a step out, and returns the number of bytes that were read or written.
    ///
    /// # Errors
    /// That of the system call.
    pub(super) fn carry_out(&self, step: Step<'_>) -> io::Result<usize> {
        match step {
            Step::Read { pieces, offset } => self.transfer(pieces, offset, |fd, pieces, count, offset| {
                // SAFETY: each of the `count` pieces is a range of memory that stays mapped while `pieces` is borrowed, in
                // which Rust has no references, since the guest may change it at any time.
                unsafe { libc::preadv(fd, pieces, count, offset) }
            }),
            Step::Write { pieces, offset } => self.transfer(pieces, offset, |fd, pieces, count, offset| {
                // SAFETY: as above; the memory is only read.
                unsafe { libc::pwritev(fd, pieces, count, offset) }
            }),
            Step::Flush => Ok(rustix::fs::fdatasync(&self.file).map(|()| 0)?),
            Step::Allocate { flags, offset, len } => {
                Ok(rustix::fs::fallocate(&self.file, flags, offset, len).map(|()| 0)?)
            }
            Step::Discard { offset, len } => Ok(topology::discard(&self.file, offset, len).map(|()| 0)?),
        }
    }

    fn transfer(
        &self,
        pieces: &[iovec],
        offset: u64,
        call: impl Fn(RawFd, *const iovec, i32, libc::off_t) -> isize,
    ) -> io::Result<usize> {
        let count = i32::try_from(pieces.len()).map_err(io::Error::other)?;
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let moved = call(self.fd(), pieces.as_ptr(), count, offset);
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }
}

/// What [`Disk::open`] does when the kernel refuses direct I/O.
const OPEN: &str = "open";

/// Takes an advisory lock on the disk, shared with other readers if `read_only`.
fn lock(file: &File, path: &Path, read_only: bool) -> Result<(), OpenError> {
    let try_lock = || if read_only { file.try_lock_shared() } else { file.try_lock() };
    let deadline = Instant::now() + LOCK_PATIENCE;
    let mut taken = try_lock();
    while matches!(taken, Err(TryLockError::WouldBlock)) && Instant::now() < deadline {
        // flock(2) has no time limit, and the kernel tells nobody when it has closed the file.
        std::thread::sleep(LOCK_INTERVAL);
        taken = try_lock();
    }
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
