//! The interface that every VMM implements.

use std::fmt;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use vvu_artifacts::accel::Kind;

use crate::facts;
use crate::qmp::Exchange;
use crate::rundir::MAX_SOCKET_PATH;
use crate::vm::addr::Slot;
use crate::vm::config::{Boot, Config, Device, Serial};
use crate::vm::cpu::Cpu;

/// A VMM that can be started.
pub trait Vmm: fmt::Debug + Send + Sync {
    /// Name for messages, such as `QEMU`.
    fn name(&self) -> &'static str;

    /// Path of the program.
    fn program(&self) -> &Path;

    /// The version that the program reports, such as `11.1.3`.
    fn version(&self) -> &str;

    /// The kinds of VM that it can run.
    fn capabilities(&self) -> Capabilities;

    /// Parts of the lines that it prints when it cannot go on, although its process does not exit.
    fn failures(&self) -> &'static [&'static str];

    /// The command that starts it, without a VM's arguments.
    fn command(&self) -> Command;

    /// The words that a shell script writes before a VM's arguments.
    fn argv_prefix(&self) -> Vec<String>;

    /// The exchanges that attach `config.attachable[index]` to its running VM.
    ///
    /// # Errors
    ///
    /// The VMM cannot attach such a device.
    fn attach(&self, config: &Config, index: usize) -> Result<Vec<Exchange>>;

    /// The exchanges that detach `config.attachable[index]` from its running VM. The last ones happen once the guest has
    /// let go of it.
    ///
    /// # Errors
    ///
    /// The VMM cannot detach such a device.
    fn detach(&self, config: &Config, index: usize) -> Result<Vec<Exchange>>;

    /// The arguments that start a VM. Equal input gives equal arguments.
    ///
    /// # Errors
    ///
    /// The VMM cannot run such a VM, two devices have one address, or a socket's path is too long.
    fn arguments(
        &self,
        config: &Config,
        accelerator: Kind,
        boot: Boot<'_>,
        serial: Serial<'_>,
    ) -> Result<Vec<String>>;
}

impl From<&dyn Vmm> for facts::Qemu {
    fn from(vmm: &dyn Vmm) -> Self {
        Self { path: vmm.program().to_owned(), version: vmm.version().to_owned() }
    }
}

/// The kinds of VM that a VMM can run. Every VMM starts a Linux kernel without firmware and has a vhost-user front-end
/// for disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// The accelerators that it runs on.
    pub accelerators: &'static [Kind],
    /// It hosts vvu devices, so it can run a device VM.
    pub vvu_devices: bool,
    /// It inherits the console and the control port as file descriptors, so commands can be run in the guest.
    pub inherited_ports: bool,
    /// It has CPU models other than the best of the accelerator.
    pub cpu_models: bool,
    /// It has IOMMUs.
    pub iommus: bool,
    /// It has NUMA nodes.
    pub numa: bool,
    /// It attaches devices and adds RAM while a VM runs.
    pub hot_plug: bool,
}

impl Capabilities {
    /// Fails if the VMM `name` cannot run a VM.
    pub(super) fn check(
        &self,
        name: &str,
        config: &Config,
        accelerator: Kind,
        serial: Serial<'_>,
    ) -> Result<()> {
        let vm = &config.name;
        ensure!(
            self.accelerators.contains(&accelerator),
            "{vm}: {name} does not run on {accelerator}: it needs {}",
            self.accelerators.iter().map(Kind::to_string).collect::<Vec<_>>().join(" or ")
        );
        let vvu = config.devices.iter().any(|device| matches!(device, Device::Vvu { .. }));
        ensure!(
            self.vvu_devices || !vvu,
            "{vm}: this {name} cannot host a vvu device: want a VMM with a vfio-user client, such as QEMU 10.1 or later"
        );
        ensure!(
            self.inherited_ports || matches!(serial, Serial::Terminal),
            "{vm}: {name} cannot inherit a control port, so no commands can be run in its guest: run the VM on a terminal, \
             with `cargo xtask vm`"
        );
        ensure!(
            self.cpu_models || config.cpu == Cpu::Best,
            "{vm}: {name} offers the host's CPU only: leave `cpu` out"
        );
        ensure!(self.iommus || config.iommu.is_none(), "{vm}: no IOMMU of {name} is supported here");
        ensure!(self.numa || config.numa_nodes <= 1, "{vm}: {name} is given no NUMA nodes here");
        let plain = config.attachable.is_empty() && !config.managed && config.max_memory_mib.is_none();
        ensure!(
            self.hot_plug || plain,
            "{vm}: devices and RAM cannot be added to a running VM of {name} here"
        );
        Ok(())
    }
}

/// Fails if two devices of a VM are at one address, of which `taken` has some, or the path of a socket is too long.
pub(super) fn check_devices(config: &Config, taken: &[Slot]) -> Result<()> {
    let mut taken = taken.to_vec();
    for device in config.devices.iter().chain(&config.attachable) {
        let slot = device.slot();
        ensure!(
            !taken.contains(&slot),
            "{}: two devices at {slot}: give one of them another address",
            config.name
        );
        taken.push(slot);
        if let Some(socket) = device.socket() {
            ensure!(
                socket.len() <= MAX_SOCKET_PATH,
                "{socket} has {} bytes: a unix socket's path may have {MAX_SOCKET_PATH}",
                socket.len()
            );
        }
    }
    Ok(())
}
