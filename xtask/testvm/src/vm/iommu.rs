//! The IOMMU of a VM.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vvu_artifacts::kernel::Kernel;

/// How a VM's devices reach its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
pub enum Iommu {
    /// virtio-iommu; it does not remap interrupts, so the guest kernel gets
    /// `vfio_iommu_type1.allow_unsafe_interrupts=1`.
    #[serde(rename = "virtio-iommu")]
    #[value(name = "virtio-iommu")]
    Virtio,
    /// Intel VT-d with interrupt remapping.
    #[serde(rename = "intel-iommu")]
    #[value(name = "intel-iommu")]
    Intel,
    /// AMD-Vi with interrupt remapping.
    #[serde(rename = "amd-iommu")]
    #[value(name = "amd-iommu")]
    Amd,
}

impl Iommu {
    /// The IOMMU of a device VM for which none is chosen: virtio-iommu, unless a distribution made the kernel, which may
    /// lack it. VT-d and its interrupt remapping are in every such kernel for x86-64.
    #[must_use]
    pub fn default_for(kernel: &Kernel) -> Self {
        if kernel.modules.is_some() && cfg!(target_arch = "x86_64") { Self::Intel } else { Self::Virtio }
    }

    /// The name in scenarios, on the command line and in machine profiles.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Iommu::Virtio => "virtio-iommu",
            Iommu::Intel => "intel-iommu",
            Iommu::Amd => "amd-iommu",
        }
    }
}
