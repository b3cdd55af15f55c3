//! Keys, which identify entries.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// The key of an entry: SHA-256 over labelled parts, which are everything that the entry is made from.
#[derive(Debug, Clone, Default)]
pub(crate) struct Key(Sha256);

impl Key {
    /// A key with no parts.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a part. Labels and lengths are hashed too, so that bytes cannot move from one part to the next.
    #[must_use]
    pub(crate) fn part(mut self, label: &str, bytes: impl AsRef<[u8]>) -> Self {
        for piece in [label.as_bytes(), bytes.as_ref()] {
            self.0.update((piece.len() as u64).to_le_bytes());
            self.0.update(piece);
        }
        self
    }

    /// The key's name on disk: the first 128 bits in hexadecimal.
    pub(crate) fn name(&self) -> String {
        hex(&self.0.clone().finalize()[..16])
    }

    /// The whole SHA-256 in hexadecimal.
    pub(crate) fn digest(&self) -> String {
        hex(&self.0.clone().finalize())
    }
}

/// SHA-256 of a file in hexadecimal.
///
/// # Errors
///
/// The file cannot be read.
pub(crate) fn sha256_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 17];
    loop {
        let count = file.read(&mut buffer).with_context(|| format!("cannot read {}", path.display()))?;
        if count == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..count]);
    }
}

/// `bytes` in lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
