//! The set-up of VMs: QEMU, kernel, programs, base image, accelerator.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result};
use vvu_artifacts::accel::{Accelerator, Kind};
use vvu_artifacts::image::{BaseImage, GuestBinaries};
use vvu_artifacts::kernel::Kernel;
use vvu_artifacts::qemu::Qemu;

use crate::vmm::Vmm;

/// Identifies a kernel of a set-up.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelId {
    /// Name of its source; `None` for the source that the command line chooses.
    pub(crate) source: Option<String>,
    /// Configuration fragments in addition to the base.
    pub(crate) fragments: Vec<String>,
}

impl KernelId {
    /// The kernel of a named source, or of the source that the command line chooses, with these configuration
    /// fragments in addition to the base.
    #[must_use]
    pub fn new(source: Option<&str>, fragments: &[String]) -> Self {
        Self { source: source.map(str::to_owned), fragments: fragments.to_owned() }
    }

    /// The kernel of the source that the command line chooses, with these configuration fragments in addition to the
    /// base.
    #[must_use]
    pub fn with_fragments(fragments: &[String]) -> Self {
        Self { source: None, fragments: fragments.to_owned() }
    }
}

/// Needs of some VMs in addition to those of all VMs.
#[derive(Debug, Clone, Default)]
pub struct Needs {
    /// The kernels; if there is none, the plain one.
    pub kernels: BTreeSet<KernelId>,
    /// VMMs by their names in `guest-images/versions.json`.
    pub vmms: BTreeSet<String>,
    /// Names of programs from `guest-images/programs.json`.
    pub programs: BTreeSet<String>,
}

impl Needs {
    /// The plain kernel and these programs.
    pub fn programs<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        Self { programs: names.into_iter().map(str::to_owned).collect(), ..Self::default() }
    }
}

/// Everything that VMs need, ready to use.
pub struct Setup {
    /// The QEMU of the VMs that name none.
    pub qemu: Qemu,
    /// The VMMs that VMs name.
    pub vmms: BTreeMap<String, Box<dyn Vmm>>,
    /// The guest kernels.
    pub kernels: BTreeMap<KernelId, Kernel>,
    /// Directory trees with programs, by program.
    pub programs: BTreeMap<String, PathBuf>,
    /// Our own programs.
    pub binaries: GuestBinaries,
    /// The initramfs that all VMs share.
    pub base: BaseImage,
    /// The accelerator and the reason for it.
    pub accelerator: Accelerator,
    /// Factor by which limits exceed those for native speed.
    pub slowness: u32,
}

impl Setup {
    /// A kernel.
    ///
    /// # Errors
    ///
    /// Fails if the needs did not name it.
    pub fn kernel(&self, id: &KernelId) -> Result<&Kernel> {
        self.kernels.get(id).with_context(|| format!("{id:?} was not obtained"))
    }

    /// The VMM of this name; without a name, the QEMU that the command line chooses.
    ///
    /// # Errors
    ///
    /// Fails if the needs did not name it.
    pub fn vmm(&self, name: Option<&str>) -> Result<&dyn Vmm> {
        let Some(name) = name else { return Ok(&self.qemu) };
        let vmm = self.vmms.get(name).with_context(|| format!("the VMM {name:?} was not obtained"))?;
        Ok(vmm.as_ref())
    }
}

/// `wanted`, or the factor that suits the accelerator.
pub(crate) fn slowness(accelerator: &Accelerator, wanted: Option<u32>) -> u32 {
    wanted.unwrap_or(match accelerator.kind {
        Kind::Kvm => 2,
        Kind::Tcg => 6,
    })
}
