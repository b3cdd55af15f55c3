//! A virtio-blk driver over the `vhost` crate's front-end: plays the sibling VM in tests.
//!
//! It owns the sibling's memory, lays its rings and buffers out there itself, and bounds each wait.
#![allow(dead_code, unused_imports, unreachable_pub, reason = "each test target uses its own part of this")]

mod backend;
mod driver;
mod ivshmem;
mod memory;
mod ring;
mod vmm;

use std::io;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use backend::Backend;
pub use driver::{Completion, Driver, Setup, config_u16, config_u64};
pub use memory::{Piece, SiblingMemory};
pub use ring::{Descriptor, INDIRECT, NEXT, Ring, WRITE, readable, wait};
pub use vmm::Vmm;

/// Longest time that anything here may take. Far more than it needs, and less than a runner waits.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Asks `done` again and again until it has an answer.
///
/// # Panics
/// When there is none within [`DEADLINE`].
pub fn wait_until<T>(awaited: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(start.elapsed() < DEADLINE, "gave up after {DEADLINE:?} waiting until {awaited}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A thread whose end can be awaited for a bounded time.
pub struct Task<T> {
    name: &'static str,
    handle: JoinHandle<()>,
    result: Receiver<T>,
}

impl<T: Send + 'static> Task<T> {
    /// Runs `work` in a thread.
    pub fn spawn(name: &'static str, work: impl FnOnce() -> T + Send + 'static) -> Self {
        let (sender, result) = channel();
        let work = move || drop(sender.send(work()));
        let handle = std::thread::Builder::new().name(name.to_owned()).spawn(work).expect("thread");
        Self { name, handle, result }
    }

    /// What the thread came to.
    pub fn join(self) -> T {
        let result = self.result.recv_timeout(DEADLINE);
        let result = result.unwrap_or_else(|error| panic!("waiting for {} to end: {error}", self.name));
        self.handle.join().expect("thread that has sent its result");
        result
    }
}

/// Open file descriptors of this process.
pub fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc").count()
}

/// Threads of this process.
pub fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").expect("/proc").count()
}

/// `len` bytes that differ from sector to sector and from one `seed` to another.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| next()).collect();
    bytes.truncate(len);
    bytes
}

/// A disk image with `content`, and the directory that holds it and the sockets of the test.
pub fn disk(content: &[u8]) -> io::Result<(tempfile::TempDir, std::path::PathBuf)> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("disk.img");
    std::fs::write(&path, content)?;
    Ok((dir, path))
}
