//! Checks VMs, vvu devices and disks beyond their format. Every message begins with the JSON path of the place.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};

use vvu_artifacts::image::GuestPrograms;
use vvu_artifacts::qemu::NEEDED_DEVICE;
use vvu_artifacts::versions::Versions;

use vvu_testvm::{Addr, MAX_QUEUES};

use super::scenario::{DiskSpec, KernelSpec, Memory, Scenario, VmSpec, VvuSpec};

/// Largest generated disk in MiB.
const MAX_DISK_MIB: u64 = 64 << 10;
/// RAM that a VM needs for each byte of its disks: the initramfs with the disks stays in RAM until it is unpacked, and the
/// file system that it is unpacked into takes at most half of the rest.
const DISK_ROOM: u64 = 3;
/// RAM in MiB that a VM needs beside its disks: the kernel, and three times the initramfs without disks.
const SYSTEM_MIB: u64 = 64;
/// Description of a valid name. Names become file names and placeholders.
const NAME: &str = "lower-case letters, digits, - and _, at most 32, first a letter";

impl Scenario {
    pub(super) fn check(&self) -> Result<()> {
        check_name(&self.name).context("at name")?;
        ensure!(!self.vms.is_empty(), "at vms: want at least one VM");
        for variable in self.variables.keys() {
            check_name(variable).context("at variables")?;
        }
        let versions = Versions::read()?;
        self.kernel.check(&versions).context("at kernel")?;
        if let Some(source) = &self.kernel_source {
            versions.kernel(source).context("at kernel_source")?;
            ensure!(
                matches!(self.kernel, KernelSpec::Fragments(_)),
                "at kernel_source: want none, as the kernel is a distribution's own"
            );
        }
        let programs = GuestPrograms::read()?;
        for (name, vm) in &self.vms {
            check_name(name).and_then(|()| vm.check(&programs)).with_context(|| format!("at vms.{name}"))?;
            self.check_vmm(name, vm, &versions).with_context(|| format!("at vms.{name}.vmm"))?;
            let kernel = vm.kernel.as_ref().map_or(Ok(()), |kernel| kernel.check(&versions));
            kernel.with_context(|| format!("at vms.{name}.kernel"))?;
        }
        self.check_vvu()?;
        for (name, disk) in &self.disks {
            let checked = check_name(name).and_then(|()| self.known_vm(&disk.vm)).and_then(|()| disk.check());
            checked.with_context(|| format!("at disks.{name}"))?;
        }
        for (name, vm) in &self.vms {
            self.check_room(name, vm)?;
        }
        self.check_steps()
    }

    pub(super) fn known_vm(&self, name: &str) -> Result<()> {
        let known: Vec<_> = self.vms.keys().map(String::as_str).collect();
        ensure!(self.vms.contains_key(name), "no VM is called {name:?}: `vms` has {}", known.join(", "));
        Ok(())
    }

    fn check_vmm(&self, name: &str, vm: &VmSpec, versions: &Versions<'static>) -> Result<()> {
        let Some(vmm) = &vm.vmm else { return Ok(()) };
        let hosts = versions.vmm(vmm)?.hosts_vvu_devices();
        ensure!(
            hosts || self.vvu_of_device(name).next().is_none(),
            "{vmm:?} has no {NEEDED_DEVICE}, which a VM with a vvu device needs: want one of {}, or none for the \
             run's VMM",
            versions.with_vvu_devices()
        );
        Ok(())
    }

    /// Checks that the disks of a VM fit into its RAM.
    fn check_room(&self, name: &str, vm: &VmSpec) -> Result<()> {
        let mut bytes = 0_u64;
        let mut largest = (0, "");
        for (disk, spec) in self.disks.iter().filter(|(_, spec)| spec.vm == name) {
            let size = spec.bytes().with_context(|| format!("at disks.{disk}"))?;
            bytes = bytes.saturating_add(size);
            largest = largest.max((size, disk));
        }
        let mib = bytes.div_ceil(1 << 20);
        let want = mib.saturating_mul(DISK_ROOM).saturating_add(SYSTEM_MIB);
        ensure!(
            mib == 0 || vm.memory_mib >= want,
            "at disks.{}: {mib} MiB of disks do not fit into the {} MiB of {name:?}, which unpacks them into its RAM: \
             want `memory_mib` to be {want} or more there",
            largest.1,
            vm.memory_mib
        );
        Ok(())
    }

    fn check_vvu(&self) -> Result<()> {
        let mut taken = BTreeSet::new();
        for (name, vvu) in &self.vvu {
            let path = || format!("at vvu.{name}");
            check_name(name)
                .and_then(|()| self.known_vm(&vvu.device_vm))
                .and_then(|()| self.known_vm(&vvu.sibling_vm))
                .with_context(path)?;
            ensure!(
                vvu.device_vm != vvu.sibling_vm,
                "at vvu.{name}: {:?} cannot be its own sibling VM",
                vvu.device_vm
            );
            let queues = vvu.virtqueues();
            ensure!(
                (1..=MAX_QUEUES).contains(&queues),
                "at vvu.{name}.queues: {queues}: want 1 to {MAX_QUEUES}"
            );
            let sibling = self.vms.get(&vvu.sibling_vm);
            ensure!(
                vvu.memory == Memory::Bar || sibling.is_some_and(|vm| vm.most_memory_mib().is_multiple_of(2)),
                "at vvu.{name}.memory: a window has whole pages of 2 MiB: want an even number of MiB for {:?}",
                vvu.sibling_vm
            );
            let differs = |(_, other): &(&str, &VvuSpec)| {
                other.device_vm == vvu.device_vm && other.memory != vvu.memory
            };
            if let Some((other, _)) = self.vvu_of_sibling(&vvu.sibling_vm).find(differs) {
                bail!("at vvu.{name}.memory: {other:?} joins the same VMs: want the same `memory`");
            }
            vvu.frontend.check().with_context(|| format!("at vvu.{name}.frontend"))?;
            if let Addr::Fixed(slot) = vvu.addr {
                ensure!(
                    taken.insert((&vvu.device_vm, slot)),
                    "at vvu.{name}.addr: {slot} is taken by another vvu device of {:?}",
                    vvu.device_vm
                );
            }
        }
        Ok(())
    }
}

impl KernelSpec {
    fn check(&self, versions: &Versions<'static>) -> Result<()> {
        match self {
            KernelSpec::Fragments(names) => names.iter().try_for_each(|name| check_name(name)),
            KernelSpec::Packaged(name) => versions.kernel_package(name).map(drop),
        }
    }
}

impl VmSpec {
    fn check(&self, programs: &GuestPrograms) -> Result<()> {
        ensure!(
            self.memory_mib >= 64,
            "memory_mib: {}: want 64 or more, the guest kernel needs them",
            self.memory_mib
        );
        let most = self.most_memory_mib();
        ensure!(
            most >= self.memory_mib,
            "max_memory_mib: {most}: want `memory_mib`, {}, or more",
            self.memory_mib
        );
        let nodes = self.numa_nodes;
        ensure!(
            (1..=8).contains(&nodes) && self.memory_mib.is_multiple_of(nodes.into()),
            "numa_nodes: {nodes}: want 1 to 8, among which {} MiB of RAM can be divided",
            self.memory_mib
        );
        ensure!((1..=8).contains(&self.cpus), "cpus: {}: want 1 to 8, as in the guest kernel", self.cpus);
        for module in &self.modules {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
            ensure!(
                !module.is_empty() && module.bytes().all(plain),
                "modules: {module:?} is no module: want its name without .ko"
            );
        }
        ensure!(!self.cmdline.contains(['\n', '\0']), "cmdline: want one line");
        self.programs.iter().try_for_each(|name| programs.check(name)).context("programs")?;
        if let Some(overlay) = &self.overlay {
            ensure!(overlay.is_dir(), "overlay: {} is not a directory", overlay.display());
        }
        Ok(())
    }
}

impl DiskSpec {
    fn check(&self) -> Result<()> {
        let Some(file) = &self.file else {
            let size = self.size_mib.unwrap_or_default();
            ensure!(
                (1..=MAX_DISK_MIB).contains(&size),
                "size_mib: {size}: want 1 to {MAX_DISK_MIB}, or `file`"
            );
            return Ok(());
        };
        ensure!(self.size_mib.is_none(), "want one of file and size_mib, not both");
        let meta = std::fs::metadata(file)
            .with_context(|| format!("file: cannot open the disk image {}", file.display()))?;
        ensure!(meta.is_file(), "file: {} is not a regular file: want a raw disk image", file.display());
        ensure!(
            meta.len() > 0 && meta.len().is_multiple_of(512),
            "file: {} has {} bytes: want a multiple of 512; `truncate -s %512` pads it",
            file.display(),
            meta.len()
        );
        Ok(())
    }
}

impl DiskSpec {
    /// The size of the image.
    ///
    /// # Errors
    ///
    /// The metadata of the file cannot be read.
    pub fn bytes(&self) -> Result<u64> {
        match &self.file {
            None => Ok(self.size_mib.unwrap_or_default() << 20),
            Some(file) => {
                let meta = std::fs::metadata(file);
                Ok(meta
                    .with_context(|| format!("file: cannot open the disk image {}", file.display()))?
                    .len())
            }
        }
    }
}

pub(super) fn check_name(name: &str) -> Result<()> {
    let mut chars = name.chars();
    let first = chars.next().is_some_and(|c| c.is_ascii_lowercase());
    let rest = chars.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_');
    ensure!(first && rest && name.len() <= 32, "{name:?} is not a name: want {NAME}");
    Ok(())
}
