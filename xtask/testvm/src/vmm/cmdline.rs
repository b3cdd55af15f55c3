//! The kernel command line of the guests, whatever VMM starts them.

use vvu_artifacts::machine::Machine;

use crate::vm::config::{Config, Device, Serial};
use crate::vm::iommu::Iommu;

/// For every guest. Without `quiet` the kernel prints messages up to "notice", among them the one that announces
/// `/dev/vda`; fewer messages save boot time. A kernel that panics reboots, which ends the VM.
const COMMON: &str = "loglevel=6 panic=-1";

/// Gives express devices, which no other driver wants, to vfio-pci as soon as the kernel finds them.
const EXPRESS: &str = "vfio-pci.ids=1af4:1110";

/// The kernel command line of a VM whose console is the first serial port of `machine`.
pub(super) fn cmdline(machine: &Machine, config: &Config, serial: Serial<'_>) -> String {
    let [console, control] = machine.serial_ports;
    let mut words = vec![format!("console={console}"), COMMON.to_owned(), machine.cmdline.to_owned()];
    words.push(format!("vvu.hostname={}", config.name));
    words.push(match serial {
        Serial::Inherited { .. } => format!("vvu.control={control}"),
        Serial::Terminal => "vvu.shell".to_owned(),
    });
    let iommu = match config.iommu {
        Some(Iommu::Virtio) => "vfio_iommu_type1.allow_unsafe_interrupts=1",
        Some(Iommu::Intel) => "intel_iommu=on",
        Some(Iommu::Amd) | None => "",
    };
    let express = config.devices.iter().any(|device| matches!(device, Device::Express { .. }));
    words.extend([iommu, if express { EXPRESS } else { "" }].map(str::to_owned));
    words.push(config.cmdline.clone());
    words.retain(|word| !word.is_empty());
    words.join(" ")
}
