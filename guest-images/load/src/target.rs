//! The disk or file under load.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, ensure};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Blocks of one size.
#[derive(Debug)]
pub(crate) struct Target {
    file: File,
    block: usize,
    blocks: u64,
}

impl Target {
    /// Opens what is at `path`, past the page cache if `direct`.
    pub(crate) fn open(path: &Path, block: usize, writable: bool, direct: bool) -> anyhow::Result<Self> {
        let mut flags = OFlags::CLOEXEC | if writable { OFlags::RDWR } else { OFlags::RDONLY };
        flags.set(OFlags::DIRECT, direct);
        let file = rustix::fs::open(path, flags, Mode::empty());
        let hint = if direct && file.as_ref().is_err_and(|error| *error == Errno::INVAL) {
            " with O_DIRECT; try --buffered"
        } else {
            ""
        };
        let mut file = File::from(file.with_context(|| format!("cannot open {}{hint}", path.display()))?);
        let size = file.seek(SeekFrom::End(0)).with_context(|| format!("cannot size {}", path.display()))?;
        let blocks = size / block as u64;
        ensure!(blocks > 0, "{} has {size} bytes: want at least one block of {block}", path.display());
        Ok(Self { file, block, blocks })
    }

    /// Whole blocks in it.
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Bytes of a block.
    pub(crate) fn block_size(&self) -> usize {
        self.block
    }

    fn offset(&self, block: u64) -> u64 {
        block * self.block as u64
    }

    pub(crate) fn read(&self, block: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, self.offset(block))
    }

    pub(crate) fn write(&self, block: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, self.offset(block))
    }

    /// Returns when all that was written is durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
