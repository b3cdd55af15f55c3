//! The description of a VM before it is started, in no VMM's words.

use std::path::Path;

use crate::vm::addr::Slot;
use crate::vm::cpu::Cpu;
use crate::vm::frontend::Frontend;
use crate::vm::iommu::Iommu;

/// What a VM boots.
#[derive(Debug, Clone, Copy)]
pub struct Boot<'a> {
    /// The kernel, in the format of the machine's profile.
    pub kernel: &'a Path,
    /// The initramfs.
    pub initramfs: &'a Path,
}

/// A VM with every path and address settled.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// The VM's name.
    pub name: String,
    /// The VMM that runs it, by its name in `guest-images/versions.json`; `None` for the run's QEMU.
    pub vmm: Option<String>,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// RAM in MiB that the VM can have once some has been added while it runs; `None`: none can be added.
    pub max_memory_mib: Option<u64>,
    /// NUMA nodes among which the RAM is divided equally, each part a piece of `memory_file`; 0 and 1: there are none.
    pub numa_nodes: u32,
    /// Virtual CPUs.
    pub cpus: u32,
    /// What the CPUs can do.
    pub cpu: Cpu,
    /// The file that is its RAM; `None` for memory of its own, which is shared with vfio-user servers too.
    pub memory_file: Option<String>,
    /// Where the RAM begins in `memory_file`, in MiB.
    pub memory_offset_mib: u64,
    /// The IOMMU in front of its devices.
    pub iommu: Option<Iommu>,
    /// The devices.
    pub devices: Vec<Device>,
    /// The devices that are not there at first and can be attached and detached while the VM runs. Each has a port of
    /// its own, which is at the device's address.
    pub attachable: Vec<Device>,
    /// Whether the VMM takes requests while the VM runs, such as to attach a device.
    pub managed: bool,
    /// Words that are added to the kernel command line.
    pub cmdline: String,
    /// Kernel modules that the guest loads besides those of its devices, if the kernel has modules.
    pub modules: Vec<String>,
    /// The VMM starts the guest again when it reboots. Otherwise the VMM exits.
    pub reboots: bool,
}

impl Config {
    /// A VM with one virtual CPU and no devices.
    #[must_use]
    pub fn new(name: &str, memory_mib: u64) -> Self {
        Self { name: name.to_owned(), memory_mib, cpus: 1, ..Self::default() }
    }

    /// The kernel modules that the guest needs, unless they are part of its kernel's image.
    pub fn kernel_modules(&self) -> impl Iterator<Item = &str> {
        // Before the devices that it stands in front of: without it their drivers wait.
        let iommu: Option<&str> = (self.iommu == Some(Iommu::Virtio)).then_some("virtio-iommu");
        let devices = self.devices.iter().chain(&self.attachable).flat_map(Device::kernel_modules);
        iommu
            .into_iter()
            .chain(devices.map(|name| *name as &str))
            .chain(self.modules.iter().map(String::as_str))
    }
}

/// A PCI device of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// The vvu device, which a proxy serves over vfio-user.
    Vvu {
        /// The PCI address.
        slot: Slot,
        /// The proxy's vfio-user socket.
        socket: String,
    },
    /// The express device of a vvu device, through which the guest notifies the sibling without the proxy. A VMM without
    /// such a device leaves it out.
    Express {
        /// Where it is.
        slot: Slot,
        /// The proxy's socket for it.
        socket: String,
    },
    /// The memory of a sibling VM, as persistent memory.
    Window {
        /// Where it is.
        slot: Slot,
        /// The sibling memory file.
        file: String,
        /// Size of the file in MiB.
        size_mib: u64,
    },
    /// A virtio device whose back-end is behind a vhost-user socket.
    VhostUser {
        /// The PCI address.
        slot: Slot,
        /// The socket.
        socket: String,
        /// The type of device.
        frontend: Frontend,
        /// Milliseconds between attempts to restore a lost connection; 0: the front-end makes none.
        reconnect_ms: u32,
    },
    /// A virtio block device that the VMM itself serves.
    VirtioBlk {
        /// The PCI address.
        slot: Slot,
        /// The disk image.
        file: String,
    },
}

impl Device {
    /// The last slot that none of `devices` has.
    pub fn last_free_slot(devices: &[Self]) -> Option<Slot> {
        Slot::last_free(|slot| devices.iter().any(|device| device.slot() == slot))
    }

    /// The PCI address.
    pub fn slot(&self) -> Slot {
        match self {
            Device::Vvu { slot, .. }
            | Device::Express { slot, .. }
            | Device::Window { slot, .. }
            | Device::VhostUser { slot, .. }
            | Device::VirtioBlk { slot, .. } => *slot,
        }
    }

    /// The line that a Linux guest prints on its console once it has the device, as a regular expression whose group is
    /// the name of the disk; `None` if it prints none.
    #[must_use]
    pub fn announcement(&self) -> Option<&'static str> {
        let disk = match self {
            Device::VhostUser { frontend, .. } => matches!(frontend, Frontend::Block(_)),
            Device::VirtioBlk { .. } => true,
            Device::Vvu { .. } | Device::Express { .. } | Device::Window { .. } => false,
        };
        disk.then_some(r"virtio_blk virtio\d+: \[(vd[a-z]+)\] \d+ 512-byte logical blocks.*")
    }

    /// The modules of Linux that drive it.
    fn kernel_modules(&self) -> &'static [&'static str] {
        match self {
            Device::Window { .. } => &["virtio_pmem", "nd_pmem", "ext4"],
            Device::Vvu { .. } | Device::Express { .. } => &["vfio_iommu_type1", "vfio-pci"],
            Device::VhostUser { frontend, .. } => frontend.kernel_modules(),
            Device::VirtioBlk { .. } => &["virtio_blk"],
        }
    }

    /// The unix socket that it is connected to.
    pub(crate) fn socket(&self) -> Option<&str> {
        match self {
            Device::Vvu { socket, .. }
            | Device::Express { socket, .. }
            | Device::VhostUser { socket, .. } => Some(socket),
            Device::VirtioBlk { .. } | Device::Window { .. } => None,
        }
    }
}

/// What the two serial ports are connected to.
#[derive(Debug, Clone, Copy)]
pub enum Serial<'a> {
    /// The console is the pipe that the VMM inherits as its standard output, and goes to a log as well; the control
    /// port is the socket that it inherits as its standard input.
    ///
    /// Not a socket for the console: one holds some 270 of the single bytes that a serial port writes, and a guest
    /// kernel drops what does not leave its port within 10 ms.
    Inherited {
        /// The socket at which somebody waits for the VMM's management connection, if the VM is managed.
        management: Option<&'a Path>,
    },
    /// The console is the terminal, with a shell on it; there is no control port.
    Terminal,
}
