//! Disk images whose content a digest identifies.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::cache::hex;

/// Bytes that are made, hashed and written at a time.
const CHUNK: usize = 1 << 20;

/// A disk image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskImage {
    /// Length in bytes.
    pub size: u64,
    /// The content.
    pub pattern: Pattern,
}

/// The content of a disk image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pattern {
    /// Zero bytes.
    Zero,
    /// Bytes that look random and depend on nothing but this seed and their offset.
    Seed(u64),
    /// A file of the host, which must have the size of the image.
    Copy(PathBuf),
}

impl DiskImage {
    /// An image of zero bytes.
    pub fn zero(size: u64) -> Self {
        Self { size, pattern: Pattern::Zero }
    }

    /// An image with the content of `seed`.
    pub fn seeded(size: u64, seed: u64) -> Self {
        Self { size, pattern: Pattern::Seed(seed) }
    }

    /// Writes the image and returns its SHA-256 in hexadecimal.
    ///
    /// # Errors
    ///
    /// `out` fails, or the file to copy is not readable or not of the image's size.
    pub fn write(&self, out: &mut impl Write) -> Result<String> {
        let mut source = match &self.pattern {
            Pattern::Copy(path) => {
                let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
                let length =
                    file.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
                ensure!(length == self.size, "{} has {length} bytes, want {}", path.display(), self.size);
                Some((path, file))
            }
            Pattern::Zero | Pattern::Seed(_) => None,
        };
        let mut hash = Sha256::new();
        let mut chunk = vec![0; CHUNK];
        let mut offset = 0;
        while offset < self.size {
            let length = usize::try_from(self.size - offset).unwrap_or(CHUNK).min(CHUNK);
            let chunk = &mut chunk[..length];
            match (&self.pattern, &mut source) {
                (Pattern::Seed(seed), _) => fill(*seed, offset, chunk),
                (_, Some((path, file))) => {
                    file.read_exact(chunk).with_context(|| format!("cannot read {}", path.display()))?;
                }
                _ => {}
            }
            hash.update(&*chunk);
            out.write_all(chunk)?;
            offset += length as u64;
        }
        Ok(hex(&hash.finalize()))
    }
}

/// Fills with the bytes that `seed` has at `offset`, a multiple of 8: word n is the n-th output of SplitMix64.
fn fill(seed: u64, offset: u64, bytes: &mut [u8]) {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut state = seed.wrapping_add(STEP.wrapping_mul(offset / 8));
    for word in bytes.chunks_mut(8) {
        state = state.wrapping_add(STEP);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        word.copy_from_slice(&mixed.to_le_bytes()[..word.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(image: &DiskImage) -> (Vec<u8>, String) {
        let mut out = Vec::new();
        let digest = image.write(&mut out).expect("write");
        assert_eq!(out.len() as u64, image.size);
        (out, digest)
    }

    #[test]
    fn seeded_content_is_fixed_for_good() {
        let (content, _) = bytes(&DiskImage::seeded(20, 0));
        // The first outputs of SplitMix64 with seed 0, little-endian.
        assert_eq!(content[..8], 0xe220_a839_7b1d_cdaf_u64.to_le_bytes());
        assert_eq!(content[8..16], 0x6e78_9e6a_a1b9_65f4_u64.to_le_bytes());
        assert_eq!(content[16..], 0x06c4_5d18_8009_454f_u64.to_le_bytes()[..4]);
        assert_ne!(bytes(&DiskImage::seeded(20, 1)).0, content);
    }

    #[test]
    fn chunks_join_without_a_seam() {
        let (content, _) = bytes(&DiskImage::seeded(CHUNK as u64 + 1000, 7));
        let mut at_once = vec![0; CHUNK + 1000];
        fill(7, 0, &mut at_once);
        assert!(content == at_once);
    }

    #[test]
    fn digests_are_those_of_the_content() {
        // SHA-256 of 512 zero bytes.
        let zeroes = "076a27c79e5ace2a3d47f9dd2e83e4ff6ea8872b3c2218f66c92b89b55f36560";
        assert_eq!(bytes(&DiskImage::zero(512)).1, zeroes);
        let file = tempfile::NamedTempFile::new().expect("file");
        file.as_file().set_len(512).expect("set_len");
        let copy = DiskImage { size: 512, pattern: Pattern::Copy(file.path().to_owned()) };
        assert_eq!(bytes(&copy).1, zeroes);
        let wrong = DiskImage { size: 1024, ..copy };
        let error = wrong.write(&mut Vec::new()).expect_err("size differs");
        assert!(error.to_string().ends_with("has 512 bytes, want 1024"), "{error}");
    }
}
