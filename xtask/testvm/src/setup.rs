//! The set-up of VMs: QEMU, kernel, programs, base image, accelerator.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result};
use vvu_artifacts::accel::{Accelerator, Kind};
use vvu_artifacts::image::{BaseImage, GuestBinaries, OverlayEntry, kernel_modules};
use vvu_artifacts::kernel::{Kernel, KernelOptions};
use vvu_artifacts::qemu::Qemu;

use crate::vm::config::Config as VmConfig;
use crate::vmm::Vmm;

/// Identifies a kernel of a set-up.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum KernelId {
    /// Built here, unless the command line names another kernel.
    Built {
        /// Name of its source; `None` for the source that the command line chooses.
        source: Option<String>,
        /// Configuration fragments in addition to the base.
        fragments: Vec<String>,
    },
    /// A distribution's own, by its name in `guest-images/versions.json`, or `distribution`.
    Packaged(String),
}

impl Default for KernelId {
    fn default() -> Self {
        Self::with_fragments(&[])
    }
}

impl KernelId {
    /// The kernel of a named source, or of the source that the command line chooses, with these configuration
    /// fragments in addition to the base.
    #[must_use]
    pub fn new(source: Option<&str>, fragments: &[String]) -> Self {
        Self::Built { source: source.map(str::to_owned), fragments: fragments.to_owned() }
    }

    /// The kernel of the source that the command line chooses, with these configuration fragments in addition to the
    /// base.
    #[must_use]
    pub fn with_fragments(fragments: &[String]) -> Self {
        Self::Built { source: None, fragments: fragments.to_owned() }
    }

    /// The options by which the kernel is obtained if the command line has `options`.
    pub(crate) fn options(&self, options: &KernelOptions) -> KernelOptions {
        match self {
            Self::Built { source, fragments } => {
                let mut options = options.clone();
                options.fragments.extend(fragments.iter().cloned());
                options.named.clone_from(source);
                options
            }
            Self::Packaged(name) if options.file.is_none() && options.packaged().is_none() => {
                KernelOptions { package: Some(name.clone()), ..KernelOptions::default() }
            }
            Self::Packaged(_) => options.clone(),
        }
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

    /// What the initramfs of a VM with this kernel has beside the base: the kernel's modules for its devices.
    ///
    /// # Errors
    ///
    /// The kernel has modules, and one is missing.
    pub fn kernel_modules(&self, id: &KernelId, config: &VmConfig) -> Result<Vec<OverlayEntry>> {
        kernel_modules(self.kernel(id)?, config.kernel_modules())
            .with_context(|| format!("the VM {}", config.name))
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
