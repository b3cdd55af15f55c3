//! A front-end that does what most do, and says how far it got.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use crate::common::{DEADLINE, Driver, Setup, SiblingMemory, readable};

/// How an attempt to use the disk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All requests were carried out.
    Served,
    /// A request failed.
    Failed,
    /// The back-end hung up.
    HungUp,
    /// Nothing came, not even the end of the connection.
    Hung,
}

/// Guest address of the data.
const DATA: u64 = 1 << 20;
const SECTOR: usize = 512;

/// Connects to `socket`, compares the disk with `content`, writes the last sector as it is, flushes, and leaves.
pub fn attempt(socket: &Path, memory: &Arc<SiblingMemory>, setup: Setup, content: &[u8]) -> Outcome {
    let begun = Instant::now();
    let mut driver = match Driver::connect(socket, memory, setup) {
        Ok(driver) => driver,
        Err(_) if begun.elapsed() < DEADLINE => return Outcome::HungUp,
        Err(_) => return Outcome::Hung,
    };
    let len = u32::try_from(content.len()).expect("a small disk");
    let last = content.len() - SECTOR;
    let mut request = |kind, at: usize, data: &[(u64, u32)]| {
        driver.submit(0, kind, (at / SECTOR) as u64, data);
        finish(&mut driver)
    };
    let read = request(VIRTIO_BLK_T_IN, 0, &[(DATA, len)]);
    if read == Outcome::Served {
        assert!(memory.read(DATA, content.len()) == content, "a read that succeeded brought something else");
    }
    if read != Outcome::Served && read != Outcome::Failed {
        return read;
    }
    memory.write(DATA, &content[last..]);
    let write = request(VIRTIO_BLK_T_OUT, last, &[(DATA, 512)]);
    if write != Outcome::Served && write != Outcome::Failed {
        return write;
    }
    let flush = request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    [read, write, flush].into_iter().find(|outcome| *outcome != Outcome::Served).unwrap_or(Outcome::Served)
}

/// Waits for the request that was sent last.
fn finish(driver: &mut Driver) -> Outcome {
    let begun = Instant::now();
    while begun.elapsed() < DEADLINE {
        let memory = Arc::clone(&driver.memory);
        match driver.rings[0].wait_for(&memory, Duration::from_millis(50)) {
            Ok((head, _)) => {
                let status = memory.read(Driver::header(&memory, 0, head) + 16, 1)[0];
                return if status == 0 { Outcome::Served } else { Outcome::Failed };
            }
            Err(_) if readable(&Raw(driver.frontend.as_raw_fd()), Duration::from_millis(1)) => {
                return Outcome::HungUp;
            }
            Err(_) => {}
        }
    }
    Outcome::Hung
}

struct Raw(i32);

impl AsRawFd for Raw {
    fn as_raw_fd(&self) -> i32 {
        self.0
    }
}
