//! Machine profiles: everything that depends on the architecture of the guests, as data.
//!
//! A guest of another architecture takes one more [`Machine`] here and one more fragment in `guest-images/kernel`.
//! Guests have the architecture of the host, since one build of `vvu` runs on both.

use anyhow::{Context, Result};

/// The profile of one kind of virtual machine.
#[derive(Debug, PartialEq, Eq)]
pub struct Machine {
    /// The architecture as Rust names it. The fragment of this name in `guest-images/kernel` completes the base.
    pub architecture: &'static str,
    /// The architecture as people write it.
    pub title: &'static str,
    /// Rust's target triple for programs in the guests.
    pub rust_target: &'static str,
    /// Debian's names.
    pub debian: Debian,
    /// How a kernel for it is built.
    pub kernel: KernelBuild,
    /// QEMU's names.
    pub qemu: QemuNames,
    /// Added to every guest's kernel command line.
    pub cmdline: &'static str,
    /// Serial ports in the order in which a VMM makes them, as the guest's kernel names them below `/dev`: the first
    /// is the console, the second the control port.
    pub serial_ports: [&'static str; 2],
    /// IOMMUs that the machine can have, by the names that scenarios use.
    pub iommus: &'static [&'static str],
}

/// Debian's names for an architecture.
#[derive(Debug, PartialEq, Eq)]
pub struct Debian {
    /// The architecture of packages.
    pub architecture: &'static str,
    /// The name of the library folder below `usr/lib`.
    pub multiarch: &'static str,
    /// The program loader's file name.
    pub loader: &'static str,
    /// The folder of the loader below the root, as programs name it.
    pub loader_folder: &'static str,
    /// The package with QEMU.
    pub qemu_package: &'static str,
}

/// How a kernel for a machine is built and recognised.
#[derive(Debug, PartialEq, Eq)]
pub struct KernelBuild {
    /// Folder below `arch` in the source.
    pub folder: &'static str,
    /// A pattern for tar of the folders below `arch` that a build does not read.
    pub foreign_folders: &'static str,
    /// The target of make.
    pub make_target: &'static str,
    /// The file that make writes, in the build folder.
    pub output: &'static str,
    /// The format that the VMMs start.
    pub format: KernelFormat,
}

/// The format of a kernel that a VMM starts without firmware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelFormat {
    /// An ELF file for x86-64 with a PVH entry, or a bzImage that holds one.
    Pvh,
    /// An uncompressed arm64 `Image` (Documentation/arch/arm64/booting.rst of Linux).
    Arm64Image,
}

/// QEMU's names for a machine.
#[derive(Debug, PartialEq, Eq)]
pub struct QemuNames {
    /// Name of the program.
    pub program: &'static str,
    /// The value of `-machine`, without its memory.
    pub machine: &'static str,
    /// Folders below `usr/share` with firmware, besides QEMU's own.
    pub firmware: &'static [&'static str],
    /// Levels of the instruction set, and the CPU model that has each.
    pub cpu_levels: &'static [(&'static str, &'static str)],
    /// A CPU model that QEMU emulates well enough for KVM in the guest; `None` if there is none.
    pub hypervisor_cpu: Option<&'static str>,
}

/// A PC with a 64-bit CPU of Intel or AMD.
pub const X86_64: Machine = Machine {
    architecture: "x86_64",
    title: "x86-64",
    rust_target: "x86_64-unknown-linux-gnu",
    debian: Debian {
        architecture: "amd64",
        multiarch: "x86_64-linux-gnu",
        loader: "ld-linux-x86-64.so.2",
        loader_folder: "lib64",
        qemu_package: "qemu-system-x86",
    },
    kernel: KernelBuild {
        folder: "x86",
        // `um` is in the build of x86 too.
        foreign_folders: "[!xu]*",
        make_target: "vmlinux",
        output: "vmlinux",
        format: KernelFormat::Pvh,
    },
    qemu: QemuNames {
        program: "qemu-system-x86_64",
        machine: "q35,hpet=off,sata=off,smbus=off",
        firmware: &["seabios"],
        cpu_levels: &[
            ("x86-64-v1", "qemu64"),
            ("x86-64-v2", "Nehalem"),
            ("x86-64-v3", "Haswell"),
            ("x86-64-v4", "Skylake-Server"),
        ],
        hypervisor_cpu: Some("EPYC,+svm,+npt"),
    },
    cmdline: "no_timer_check",
    serial_ports: ["ttyS0", "ttyS1"],
    iommus: &["virtio-iommu", "intel-iommu", "amd-iommu"],
};

/// A generic 64-bit Arm machine. Unproven: no guest of it has been run. Its kernel fragment and a probe of its KVM are
/// missing, so [`Machine::host`] does not offer it.
pub const AARCH64: Machine = Machine {
    architecture: "aarch64",
    title: "64-bit Arm",
    rust_target: "aarch64-unknown-linux-gnu",
    debian: Debian {
        architecture: "arm64",
        multiarch: "aarch64-linux-gnu",
        loader: "ld-linux-aarch64.so.1",
        loader_folder: "lib",
        qemu_package: "qemu-system-arm",
    },
    kernel: KernelBuild {
        folder: "arm64",
        foreign_folders: "[!a]*",
        make_target: "Image",
        output: "arch/arm64/boot/Image",
        format: KernelFormat::Arm64Image,
    },
    qemu: QemuNames {
        program: "qemu-system-aarch64",
        machine: "virt,gic-version=max",
        firmware: &[],
        cpu_levels: &[],
        hypervisor_cpu: None,
    },
    cmdline: "",
    serial_ports: ["ttyAMA0", "ttyAMA1"],
    iommus: &["virtio-iommu"],
};

impl Machine {
    /// The profile for guests of this host.
    ///
    /// # Errors
    ///
    /// There is none for the architecture that this program was built for.
    pub fn host() -> Result<&'static Self> {
        Self::of(std::env::consts::ARCH)
    }

    /// The profile for guests of a host of this architecture, by Rust's name for it.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn of(architecture: &str) -> Result<&'static Self> {
        (architecture == X86_64.architecture).then_some(&X86_64).with_context(|| {
            format!(
                "guests have the host's architecture, and only {} is supported, not {architecture}",
                X86_64.title
            )
        })
    }

    /// QEMU's CPU model that has a level of the instruction set.
    ///
    /// # Errors
    ///
    /// The machine has no such level.
    pub fn qemu_cpu(&self, level: &str) -> Result<&'static str> {
        let found = self.qemu.cpu_levels.iter().find(|(name, _)| *name == level);
        found.map(|(_, model)| *model).with_context(|| {
            let known: Vec<_> = self.qemu.cpu_levels.iter().map(|(name, _)| *name).collect();
            format!("a machine of {} has no CPU of level {level}: known are {}", self.title, known.join(", "))
        })
    }

    /// QEMU's CPU model that can run KVM in the guest.
    ///
    /// # Errors
    ///
    /// QEMU emulates none for this machine.
    pub fn qemu_hypervisor_cpu(&self) -> Result<&'static str> {
        self.qemu
            .hypervisor_cpu
            .with_context(|| format!("QEMU emulates no CPU of {} that runs KVM in the guest", self.title))
    }

    /// The library folder of Debian's packages, relative to the root.
    #[must_use]
    pub fn libraries(&self) -> String {
        format!("usr/lib/{}", self.debian.multiarch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_a_profile_is_told_which_one_there_is() {
        assert_eq!(Machine::of("x86_64").expect("supported"), &X86_64);
        let error = Machine::of("aarch64").expect_err("unproven").to_string();
        assert!(error.contains("only x86-64 is supported, not aarch64"), "{error}");
    }

    #[test]
    fn a_cpu_is_found_by_its_level() {
        assert_eq!(X86_64.qemu_cpu("x86-64-v2").expect("known"), "Nehalem");
        let error = X86_64.qemu_cpu("x86-64-v9").expect_err("unknown").to_string();
        assert!(error.contains("known are x86-64-v1, x86-64-v2"), "{error}");
        AARCH64.qemu_cpu("x86-64-v2").expect_err("of another machine");
        AARCH64.qemu_hypervisor_cpu().expect_err("there is none");
    }
}
