//! A directory with everything that a run needs, for an outer VM that has nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use vvu_artifacts::accel::Accelerator;
use vvu_artifacts::image::{BaseImage, GuestBinaries, OverlayEntry};
use vvu_artifacts::kernel::Kernel;
use vvu_artifacts::qemu::Qemu;

use crate::rundir::RunDir;
use crate::setup::{KernelId, Setup, slowness};

const FACTS: &str = "prepared.json";
const VMLINUX: &str = "vmlinux";
const BASE: &str = "base.cpio";
const VVU: &str = "vvu";
const INIT: &str = "vvu-init";
const LOAD: &str = "vvu-load";
const QEMU: &str = "qemu";

/// `prepared.json`: facts about the files beside it.
#[derive(Debug, Serialize, Deserialize)]
struct Facts {
    kernel_fragments: Vec<String>,
    kernel_version: String,
    kernel_config_digest: String,
    base_digest: String,
}

/// The content of such a directory.
pub(crate) struct Prepared {
    qemu: Qemu,
    kernel_fragments: Vec<String>,
    kernel: Kernel,
    binaries: GuestBinaries,
    base: BaseImage,
}

impl Prepared {
    /// Reads a directory that [`lay_out`] has described.
    ///
    /// # Errors
    ///
    /// Fails if a file is missing or QEMU does not run.
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        let file = |name: &str| dir.join(name);
        let facts = fs::read(file(FACTS))
            .with_context(|| format!("--prepared {}: cannot read {FACTS}", dir.display()))?;
        let facts: Facts = serde_json::from_slice(&facts)
            .with_context(|| format!("{} is of another version", file(FACTS).display()))?;
        let kernel = Kernel {
            vmlinux: file(VMLINUX),
            version: facts.kernel_version,
            config_digest: facts.kernel_config_digest,
            modules: None,
        };
        let bytes = fs::metadata(file(BASE)).with_context(|| format!("{}", file(BASE).display()))?.len();
        Ok(Self {
            qemu: Qemu::from_root(&file(QEMU))?,
            kernel_fragments: facts.kernel_fragments,
            kernel,
            binaries: GuestBinaries { init: file(INIT), vvu: file(VVU), load: file(LOAD) },
            base: BaseImage { path: file(BASE), digest: facts.base_digest, bytes },
        })
    }

    /// The set-up that consists of it.
    pub(crate) fn with(self, accelerator: Accelerator, wanted_slowness: Option<u32>) -> Setup {
        let Self { qemu, kernel_fragments, kernel, binaries, base } = self;
        let slowness = slowness(&accelerator, wanted_slowness);
        let kernels = [(KernelId::with_fragments(&kernel_fragments), kernel)].into();
        let (vmms, programs) = (BTreeMap::new(), BTreeMap::new());
        Setup { qemu, vmms, kernels, programs, binaries, base, accelerator, slowness }
    }
}

/// Describes the directory `place` of a guest: all of `setup`, with the kernel of these fragments and the QEMU in
/// `qemu_root`.
///
/// # Errors
///
/// Fails if the run directory cannot be written.
pub(crate) fn lay_out(
    setup: &Setup,
    kernel_fragments: &[String],
    qemu_root: &Path,
    run: &RunDir,
    place: &str,
) -> Result<Vec<OverlayEntry>> {
    let Setup { binaries, base, .. } = setup;
    let kernel = setup.kernel(&KernelId::with_fragments(kernel_fragments))?;
    let facts = Facts {
        kernel_fragments: kernel_fragments.to_owned(),
        kernel_version: kernel.version.clone(),
        kernel_config_digest: kernel.config_digest.clone(),
        base_digest: base.digest.clone(),
    };
    run.write(FACTS, serde_json::to_vec_pretty(&facts).context("cannot encode what is prepared")?)?;
    let facts = run.file(FACTS);
    let files = [
        (FACTS, 0o644, &facts),
        (VMLINUX, 0o644, &kernel.vmlinux),
        (BASE, 0o644, &base.path),
        (VVU, 0o755, &binaries.vvu),
        (INIT, 0o755, &binaries.init),
        (LOAD, 0o755, &binaries.load),
    ];
    let files = files.into_iter().map(|(name, mode, from)| OverlayEntry::File {
        path: format!("{place}/{name}"),
        mode,
        from: from.clone(),
    });
    let qemu = OverlayEntry::TreeAt { path: format!("{place}/{QEMU}"), from: qemu_root.to_owned() };
    Ok(files.chain([qemu]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_directory_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let error = Prepared::read(dir.path()).err().expect("refused");
        let error = format!("{error:#}");
        assert!(error.contains("--prepared") && error.contains(FACTS), "{error}");
    }
}
