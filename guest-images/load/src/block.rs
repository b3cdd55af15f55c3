//! Blocks that say what they are, so that a wrong one tells what went wrong.

use std::fmt;

use crate::random::Random;

const MAGIC: [u8; 8] = *b"vvu-load";
/// Magic, seed, block, generation, checksum and 4 bytes of zeroes.
const HEADER_SIZE: usize = 40;
const CHECKSUM: std::ops::Range<usize> = 32..36;

/// CRC-32C (Castagnoli), reflected.
const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut index: u32 = 0;
    while index < 256 {
        let mut value = index;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 0 { value >> 1 } else { value >> 1 ^ 0x82f6_3b78 };
            bit += 1;
        }
        table[index as usize] = value;
        index += 1;
    }
    table
};

fn crc32c(parts: [&[u8]; 2]) -> u32 {
    let step = |crc: u32, byte: &u8| CRC_TABLE[usize::from(crc.to_le_bytes()[0] ^ byte)] ^ crc >> 8;
    !parts.into_iter().flatten().fold(!0, step)
}

/// Which block, and how often it was written. Generations start at 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) seed: u64,
    pub(crate) block: u64,
    pub(crate) generation: u64,
}

/// The fault of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Not something that was ever written here.
    Foreign,
    /// Parts of different writes, or damaged.
    Torn { header: Identity },
    /// A whole block, but another one's.
    Misplaced { got: Identity },
    /// This block, but not as it was written last.
    Generation { got: u64, newest: u64 },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => write!(f, "not something that was written by this run"),
            Self::Torn { header } => {
                write!(
                    f,
                    "torn or damaged: its start is block {}, generation {}",
                    header.block, header.generation
                )
            }
            Self::Misplaced { got } => write!(f, "it is block {}, generation {}", got.block, got.generation),
            Self::Generation { got, newest } => write!(f, "generation {got} where {newest} was written last"),
        }
    }
}

/// Fills `data` with the block that `identity` stands for.
pub(crate) fn fill(data: &mut [u8], identity: Identity) {
    let Identity { seed, block, generation } = identity;
    let mut random = Random::new(seed ^ generation.rotate_left(32), block);
    let (header, body) = data.split_at_mut(HEADER_SIZE);
    for chunk in body.chunks_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes()[..chunk.len()]);
    }
    header.fill(0);
    header[..8].copy_from_slice(&MAGIC);
    for (field, value) in header[8..CHECKSUM.start].chunks_exact_mut(8).zip([seed, block, generation]) {
        field.copy_from_slice(&value.to_le_bytes());
    }
    let crc = crc32c([&header[..CHECKSUM.start], body]);
    header[CHECKSUM].copy_from_slice(&crc.to_le_bytes());
}

/// Checks that `data` is block `block` in one of the generations from `oldest` to `newest`, and returns
/// which.
pub(crate) fn check(data: &[u8], seed: u64, block: u64, oldest: u64, newest: u64) -> Result<u64, Fault> {
    let (header, body) = data.split_at(HEADER_SIZE);
    let word = |at: usize| header[at..at + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    let got = Identity { seed: word(8), block: word(16), generation: word(24) };
    if header[..8] != MAGIC || got.seed != seed {
        return Err(Fault::Foreign);
    }
    let crc = crc32c([&header[..CHECKSUM.start], body]);
    if header[CHECKSUM] != crc.to_le_bytes() {
        return Err(Fault::Torn { header: got });
    }
    if got.block != block {
        return Err(Fault::Misplaced { got });
    }
    if !(oldest..=newest).contains(&got.generation) {
        return Err(Fault::Generation { got: got.generation, newest });
    }
    Ok(got.generation)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(generation: u64) -> Vec<u8> {
        let mut data = vec![0; 4096];
        fill(&mut data, Identity { seed: 7, block: 3, generation });
        data
    }

    /// RFC 3720, B.4.
    #[test]
    fn checksums_are_crc32c() {
        assert_eq!(crc32c([b"123456789", b""]), 0xe306_9283);
        assert_eq!(crc32c([&[0; 16], &[0; 16]]), 0x8a91_36aa);
    }

    #[test]
    fn a_block_is_known_again() {
        assert_eq!(check(&block(5), 7, 3, 5, 5), Ok(5));
        assert_eq!(check(&block(5), 7, 3, 4, 5), Ok(5));
        assert_ne!(block(5)[HEADER_SIZE..], block(6)[HEADER_SIZE..], "content depends on the generation");
        let mut odd = vec![0; 512];
        fill(&mut odd, Identity { seed: 1, block: 0, generation: 1 });
        assert_eq!(check(&odd, 1, 0, 1, 1), Ok(1));
    }

    #[test]
    fn whatever_is_wrong_is_found_and_named() {
        assert_eq!(check(&block(5), 7, 3, 6, 7), Err(Fault::Generation { got: 5, newest: 7 }));
        assert!(matches!(check(&block(5), 7, 4, 5, 5), Err(Fault::Misplaced { .. })));
        assert_eq!(check(&block(5), 8, 3, 5, 5), Err(Fault::Foreign));
        assert_eq!(check(&[0; 4096], 7, 3, 1, 9), Err(Fault::Foreign));
        let torn = [&block(6)[..512], &block(5)[512..]].concat();
        assert!(matches!(check(&torn, 7, 3, 5, 6), Err(Fault::Torn { header }) if header.generation == 6));
        for at in [16, 24, 33, 40, 2048, 4095] {
            let mut flipped = block(5);
            flipped[at] ^= 4;
            assert!(check(&flipped, 7, 3, 5, 5).is_err(), "bit in byte {at}");
        }
    }
}
