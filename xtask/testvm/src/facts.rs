//! Facts for reports: the VMM, kernel and accelerator of a run, and its outcome.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vvu_process::progress::StageTime;

/// The VM in which a nested run took place.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Outer {
    /// The accelerator of the outer VM.
    pub accelerator: Accelerator,
    /// The QEMU used.
    pub qemu: Qemu,
    /// The kernel of the outer VM, which has KVM.
    pub kernel: Kernel,
    /// Stages outside the outer VM, in the order in which they ended.
    pub stages: Vec<StageTime>,
    /// Duration of the whole run in seconds.
    pub seconds: f64,
}

/// How a run went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Every check passed.
    Pass,
    /// A check failed.
    Fail,
    /// It could not run.
    #[default]
    Error,
    /// It was interrupted.
    Interrupted,
}

/// The accelerator that ran the VMs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Accelerator {
    /// `kvm` or `tcg`.
    pub used: String,
    /// Why this one.
    pub reason: String,
}

impl From<&vvu_artifacts::accel::Accelerator> for Accelerator {
    fn from(accelerator: &vvu_artifacts::accel::Accelerator) -> Self {
        Self { used: accelerator.kind.to_string(), reason: accelerator.reason.clone() }
    }
}

/// The QEMU used.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Qemu {
    /// Path of the program.
    pub path: PathBuf,
    /// Version that the program reports.
    pub version: String,
}

/// The guest kernel used.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    /// Release, such as `6.12.117`.
    pub version: String,
    /// SHA-256 of the resolved configuration.
    pub config_digest: String,
}

impl From<&vvu_artifacts::kernel::Kernel> for Kernel {
    fn from(kernel: &vvu_artifacts::kernel::Kernel) -> Self {
        Self { version: kernel.version.clone(), config_digest: kernel.config_digest.clone() }
    }
}

/// `words` as a shell reads them back.
pub fn command_line(words: impl IntoIterator<Item = impl AsRef<str>>) -> String {
    words.into_iter().map(|word| quoted(word.as_ref())).collect::<Vec<_>>().join(" ")
}

/// `word` as one word of the shell.
#[must_use]
pub fn quoted(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-+=./:,%@".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_is_quoted_for_the_shell() {
        let words = ["qemu", "-append", "a b", "it's", "{\"x\":1}", "plain=1,b:/c.d-e_f", ""];
        assert_eq!(command_line(words), r#"qemu -append 'a b' 'it'\''s' '{"x":1}' plain=1,b:/c.d-e_f ''"#);
    }
}
