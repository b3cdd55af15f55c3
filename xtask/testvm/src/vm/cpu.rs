//! CPU models of VMs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A level of instructions that programs may expect (x86-64 psABI, "Micro-Architecture Levels").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CpuLevel {
    /// The first 64-bit CPUs.
    #[serde(rename = "x86-64-v1")]
    V1,
    /// With SSE 4.2 and POPCNT, as of 2008.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// With AVX 2 and BMI 2, as of 2013.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// With AVX-512, as of 2017.
    #[serde(rename = "x86-64-v4")]
    V4,
}

impl CpuLevel {
    /// The name in scenarios and machine profiles.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            CpuLevel::V1 => "x86-64-v1",
            CpuLevel::V2 => "x86-64-v2",
            CpuLevel::V3 => "x86-64-v3",
            CpuLevel::V4 => "x86-64-v4",
        }
    }
}

/// The CPUs of a VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cpu {
    /// The best that the accelerator has.
    #[default]
    Best,
    /// A model that has this level.
    Level(CpuLevel),
    /// A model that can run KVM in the guest, emulated.
    Hypervisor,
}
