//! Finds the persistent memory that is a vvu device's memory.
//!
//! The driver writes a random number into the header through the shared memory BAR and takes the memory in which the number
//! appears. A name or a UUID in the memory would prove nothing: the sibling's VMM can write there too.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use super::Machine;
use super::ext4::{BLOCK, BLOCK_BYTES};
use crate::driver::{Driver, WindowSizes};
use crate::pci::{DeviceError, PciDevice};

/// How long other processes may take to find their memory.
const PATIENCE: Duration = Duration::from_secs(10);
/// Interval at which to try a lock that another process holds.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);
/// Bytes of a sector in sysfs, whatever the device's own are.
const SECTOR: u64 = 512;
/// Bytes of the number that is looked for.
const NUMBER: usize = 16;

/// The persistent memory of a vvu device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// The machine has none of the right size.
    #[error(
        "this machine has no persistent memory of {size} bytes for its window; add it to the VM (QEMU: -object \
         memory-backend-file,id=window,share=on,mem-path=<the --memory-link of the proxy>,size={size} -device \
         virtio-pmem-pci,memdev=window, and -m with maxmem=), and check that the kernel has CONFIG_VIRTIO_PMEM, \
         CONFIG_BLK_DEV_PMEM and CONFIG_BTT"
    )]
    Absent {
        /// Bytes.
        size: u64,
    },
    /// Memory of the right size is another device's.
    #[error("of the persistent memory of this machine ({names}), none is its sibling's")]
    Foreign {
        /// Names of what has the right size.
        names: String,
    },
    /// The sibling's guest could write what the kernel takes for its own metadata.
    #[error(
        "{name} has the size of its memory, but there is no header to protect this VM from the sibling's guest: start the \
         proxy with --window, and the sibling with offset=2M"
    )]
    Unguarded {
        /// Name of the memory.
        name: String,
    },
    /// Another process does not finish.
    #[error("another process has kept {name} locked for {} s", PATIENCE.as_secs())]
    Locked {
        /// Name of the memory.
        name: String,
    },
    /// Something cannot be read.
    #[error("cannot {what}: {source}")]
    Io {
        /// The operation.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// The shared memory BAR cannot be written to.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Persistent memory that is the sibling's. While this value lives, no other process looks for its memory here.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) name: String,
    pub(super) path: PathBuf,
    _lock: File,
}

/// Finds the memory of `driver`'s device.
pub(super) fn find<D: PciDevice>(
    machine: &Machine,
    driver: &Driver<D>,
    sizes: WindowSizes,
) -> Result<Found, FindError> {
    let names = candidates(machine, sizes.size);
    if names.is_empty() {
        return Err(FindError::Absent { size: sizes.size });
    }
    let deadline = Instant::now() + PATIENCE;
    // All in one order, so that two processes neither wait for each other nor overwrite each other's number.
    let locked = names.iter().map(|name| lock(machine, name, deadline)).collect::<Result<Vec<_>, _>>()?;
    let mut number = [0; NUMBER];
    getrandom(&mut number, GetRandomFlags::empty())
        .map_err(|error| io_error("get a random number", error))?;
    let place = sizes.header - BLOCK;
    driver.write_shared_memory(place, &number)?;
    for (name, lock) in names.iter().zip(locked) {
        if starts_with(&lock, place, &number).map_err(|error| io_error(format!("read {name}"), error))? {
            return Ok(Found { name: name.clone(), path: machine.dev.join(name), _lock: lock });
        }
    }
    Err(FindError::Foreign { names: names.join(", ") })
}

/// Fails if there is memory that may be a device's whose memory has no header.
pub(super) fn refuse_unguarded(machine: &Machine, size: u64) -> Result<(), FindError> {
    match candidates(machine, size).into_iter().next() {
        Some(name) => Err(FindError::Unguarded { name }),
        None => Ok(()),
    }
}

/// Whether the kernel uses what NVDIMM info blocks say (`PFN_INFO`, `DAX_INFO`). It offers to make such blocks then.
pub(super) fn believes_info_blocks(machine: &Machine) -> bool {
    let devices = fs::read_dir(machine.sys.join("bus/nd/devices")).into_iter().flatten().flatten();
    devices.into_iter().any(|device| {
        let seed = |name| fs::read_to_string(device.path().join(name));
        [seed("pfn_seed"), seed("dax_seed")].into_iter().flatten().any(|text| !text.trim().is_empty())
    })
}

/// The names of persistent memory of `size` bytes, in order.
fn candidates(machine: &Machine, size: u64) -> Vec<String> {
    let entries = fs::read_dir(machine.sys.join("block")).into_iter().flatten().flatten();
    let named = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        // `pmem0s` is a block translation table in persistent memory.
        let digits = name.strip_prefix("pmem")?;
        let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        let sectors: u64 = fs::read_to_string(entry.path().join("size")).ok()?.trim().parse().ok()?;
        (plain && sectors.checked_mul(SECTOR) == Some(size)).then_some(name)
    });
    let mut names: Vec<_> = named.collect();
    names.sort_unstable();
    names
}

/// Opens the memory for reading past the kernel's cache, and locks it.
fn lock(machine: &Machine, name: &str, deadline: Instant) -> Result<File, FindError> {
    let failed = |error: io::Error| io_error(format!("open {name}"), error);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(machine.open_flags)
        .open(machine.dev.join(name))
        .map_err(failed)?;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(RETRY_INTERVAL),
            Err(Errno::WOULDBLOCK) => return Err(FindError::Locked { name: name.to_owned() }),
            Err(error) => return Err(io_error(format!("lock {name}"), error)),
        }
    }
}

/// Whether the block at `offset` of `file` begins with `number`.
fn starts_with(file: &File, offset: u64, number: &[u8; NUMBER]) -> io::Result<bool> {
    // Direct I/O wants a buffer that is aligned like the block.
    let mut buffer = vec![0; 2 * BLOCK_BYTES];
    let start = buffer.as_ptr().align_offset(BLOCK_BYTES);
    let block = buffer.get_mut(start..start + BLOCK_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
    file.read_exact_at(block, offset)?;
    Ok(block.starts_with(number))
}

fn io_error(what: impl Into<String>, source: impl Into<io::Error>) -> FindError {
    FindError::Io { what: what.into(), source: source.into() }
}

#[cfg(test)]
#[path = "find_test.rs"]
mod tests;
