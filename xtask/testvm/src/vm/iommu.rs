//! The IOMMU of a VM.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
