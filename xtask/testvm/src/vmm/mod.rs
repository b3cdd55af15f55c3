//! Virtual machine monitors (VMMs): what each of them can do, and how it starts a VM.
//!
//! [`Qemu`] runs every kind of VM. [`CloudHypervisor`] runs a sibling VM on a terminal. Another VMM is one more
//! implementation of [`Vmm`], and one more name in `guest-images/versions.json` and [`obtain`].

mod cloud_hypervisor;
mod cmdline;
mod qemu;
mod words;

use std::fmt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vvu_artifacts::accel::Kind;
use vvu_artifacts::cache::Cache;
use vvu_artifacts::qemu::Qemu;
use vvu_artifacts::versions::{Versions, VmmSource};
use vvu_process::progress::Progress;

use crate::facts;
use crate::rundir::MAX_SOCKET_PATH;
use crate::vm::addr::Slot;
use crate::vm::config::{Boot, Config, Device, Serial};
use crate::vm::cpu::Cpu;

use cloud_hypervisor::CloudHypervisor;

/// A VMM that is installed, with all that its program needs to run.
pub trait Vmm: fmt::Debug + Send + Sync {
    /// Its name, such as `QEMU`.
    fn name(&self) -> &'static str;

    /// The program.
    fn program(&self) -> &Path;

    /// Its version as it tells it, such as `11.1.3`.
    fn version(&self) -> &str;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// Parts of lines that it prints when it cannot go on although its process does.
    fn failures(&self) -> &'static [&'static str];

    /// A command that starts it, to which a VM's own arguments are added.
    fn command(&self) -> Command;

    /// The words that a shell script writes before a VM's own arguments.
    fn argv_prefix(&self) -> Vec<String>;

    /// The arguments that start a VM. The same VM always gets the same.
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

/// What a VMM can do. All of them start a Linux kernel without firmware and connect virtio-blk to a vhost-user socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// What can run the guests' code.
    pub accelerators: &'static [Kind],
    /// Hosts a vvu device behind an IOMMU: can run a device VM.
    pub vvu_devices: bool,
    /// Takes the console and the control port as file descriptors that it inherits, and writes a log of the console:
    /// commands can be run in the guest.
    pub inherited_ports: bool,
    /// Can run CPUs of a model other than the accelerator's best.
    pub cpu_models: bool,
    /// IOMMUs in front of the devices.
    pub iommus: bool,
}

impl Capabilities {
    /// Fails if the VMM `name` cannot run a VM.
    fn check(&self, name: &str, config: &Config, accelerator: Kind, serial: Serial<'_>) -> Result<()> {
        let vm = &config.name;
        ensure!(
            self.accelerators.contains(&accelerator),
            "{vm}: {name} does not run on {accelerator}: it needs {}",
            self.accelerators.iter().map(Kind::to_string).collect::<Vec<_>>().join(" or ")
        );
        let vvu = config.devices.iter().any(|device| matches!(device, Device::Vvu { .. }));
        ensure!(
            self.vvu_devices || !vvu,
            "{vm}: {name} cannot host a vvu device here: run QEMU in the device VM"
        );
        ensure!(
            self.inherited_ports || matches!(serial, Serial::Terminal),
            "{vm}: {name} has no control port that it inherits, so no commands can be run in its guest: run it on a \
             terminal, with `cargo xtask vm`"
        );
        ensure!(
            self.cpu_models || config.cpu == Cpu::Best,
            "{vm}: {name} has the host's CPU only: leave `cpu` out"
        );
        ensure!(self.iommus || config.iommu.is_none(), "{vm}: {name} has no IOMMU that is supported here");
        Ok(())
    }
}

/// Finds the VMM that `guest-images/versions.json` has by this name, or downloads it into the cache.
///
/// # Errors
///
/// There is none of that name, it is not installed, or it cannot be downloaded.
pub(crate) fn obtain(progress: &Progress, cache: &Cache, name: &str) -> Result<Box<dyn Vmm>> {
    Ok(match Versions::read()?.vmm(name)? {
        VmmSource::Qemu(_) => Box::new(Qemu::named(progress, cache, name)?),
        VmmSource::CloudHypervisor {} => {
            let stage = progress.stage(format!("vmm {name}"));
            let vmm = CloudHypervisor::locate().with_context(|| format!("the VMM {name:?} cannot be had"))?;
            stage.done(vmm.version());
            Box::new(vmm)
        }
    })
}

/// Fails if two devices of a VM are at one address, of which `taken` has some, or the path of a socket is too long.
fn check_devices(config: &Config, taken: &[Slot]) -> Result<()> {
    let mut taken = taken.to_vec();
    for device in &config.devices {
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

#[cfg(test)]
#[path = "rig_test.rs"]
mod rig;
#[cfg(test)]
#[path = "vmm_test.rs"]
mod tests;
