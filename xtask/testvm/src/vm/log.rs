//! The output of a VMM itself.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use vvu_process::text::printable;

/// Bytes of the output that are kept.
const KEPT: usize = 1500;
/// Most bytes that one check reads; a VMM that prints more is read further by the next check.
const CHUNK: u64 = 64 << 10;

/// Follows the log that a VMM writes.
pub(super) struct VmmLog {
    path: PathBuf,
    file: File,
    /// The last bytes that were read.
    tail: Vec<u8>,
    /// Parts of lines that the VMM prints when it cannot go on although its process does.
    failures: &'static [&'static str],
}

impl VmmLog {
    /// Follows `path` from its present end.
    pub(super) fn follow(path: PathBuf, failures: &'static [&'static str]) -> Result<Self> {
        let opened = File::open(&path).and_then(|mut file| file.seek(SeekFrom::End(0)).map(|_| file));
        let file = opened.with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self { path, file, tail: Vec::new(), failures })
    }

    /// The file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Fails if the VMM has printed that it cannot go on.
    pub(super) fn check(&mut self) -> Result<()> {
        // A log that cannot be read any more is no failure of the VM.
        let _ = Read::by_ref(&mut self.file).take(CHUNK).read_to_end(&mut self.tail);
        let text = String::from_utf8_lossy(&self.tail);
        let failed = |line: &&str| self.failures.iter().any(|failure| line.contains(failure));
        if let Some(line) = text.lines().find(failed) {
            bail!("the VMM cannot go on: {}", printable(line));
        }
        self.tail.drain(..self.tail.len().saturating_sub(KEPT));
        Ok(())
    }

    /// The end of the output, for a person to read.
    pub(super) fn tail(&mut self) -> String {
        // A failure is part of the text.
        let _ = self.check();
        let start = self.tail.len().saturating_sub(KEPT);
        printable(String::from_utf8_lossy(&self.tail[start..]).trim())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn only_what_is_new_is_read_and_a_failure_is_found_in_pieces() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        let mut vmm = File::create(&path).expect("made");
        vmm.write_all(b"KVM internal error of the VM before\n").expect("written");
        let mut log = VmmLog::follow(path, &["KVM internal error"]).expect("there");
        log.check().expect("nothing new");
        vmm.write_all(&vec![b'x'; 128 << 10]).expect("written");
        log.check().expect("noise");
        assert_eq!(log.file.stream_position().expect("a position"), CHUNK + 36);
        log.check().expect("noise");
        log.check().expect("noise");
        assert_eq!(log.tail.len(), KEPT);
        vmm.write_all(b"\nKVM inter").expect("written");
        log.check().expect("not yet");
        vmm.write_all(b"nal error. Suberror: 1\x1b[0m\n").expect("written");
        let error = log.check().expect_err("failed").to_string();
        assert_eq!(error, r"the VMM cannot go on: KVM internal error. Suberror: 1\u{1b}[0m");
        assert!(log.tail().ends_with(r"Suberror: 1\u{1b}[0m"));
    }
}
