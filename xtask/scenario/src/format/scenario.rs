//! The types of a scenario file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vvu_testvm::{Addr, CpuLevel, Frontend, Iommu, KernelId, Needs};

use super::step::Step;
use super::text::Values;

/// The placeholder that numbers the rounds of a repeat.
pub const ROUND: &str = "round";

/// A scenario file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// The JSON Schema of this file, for editors; a run does not read it.
    #[serde(default, rename = "$schema", skip_serializing_if = "Option::is_none")]
    pub schema: Option<String>,
    /// Name of the scenario: lower-case letters, digits, `-` and `_`. It is the file's name without `.json`.
    #[schemars(regex(pattern = "^[a-z][a-z0-9_-]{0,31}$"))]
    pub name: String,
    /// One line for `cargo xtask e2e --list`.
    pub description: String,
    /// The kernel of the VMs that name none of their own.
    #[serde(default, skip_serializing_if = "KernelSpec::is_default")]
    pub kernel: KernelSpec,
    /// Where the source of a kernel that is built comes from, if not from the machine's own suites: a name in
    /// `guest-images/versions.json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_source: Option<String>,
    /// Texts that other texts use as placeholders, by name; `e2e --set NAME=TEXT` gives another one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub variables: BTreeMap<String, String>,
    /// The VMs by name.
    pub vms: BTreeMap<String, VmSpec>,
    /// The vvu devices by name: each joins a device VM and a sibling VM through a proxy of its own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub vvu: BTreeMap<String, VvuSpec>,
    /// The disk images by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disks: BTreeMap<String, DiskSpec>,
    /// What is done, in this order.
    #[schemars(length(min = 1))]
    pub steps: Vec<Step>,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// RAM in MiB.
    #[schemars(range(min = 64))]
    pub memory_mib: u64,
    /// RAM in MiB that the VM can have once steps have added some to it; as much as `memory_mib` unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_mib: Option<u64>,
    /// NUMA nodes among which the RAM is divided equally, each part a piece of the sibling memory file.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    #[schemars(range(min = 1, max = 8))]
    pub numa_nodes: u32,
    /// Virtual CPUs.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    #[schemars(range(min = 1, max = 8))]
    pub cpus: u32,
    /// What the CPUs can do, if programs need more than the VMM's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuLevel>,
    /// For a sibling VM: take the RAM from the host's huge pages.
    #[serde(default, skip_serializing_if = "is_false")]
    pub huge_pages: bool,
    /// The VMM that runs the VM, if not the run's: a name in `guest-images/versions.json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<String>,
    /// The VM's kernel, if not the scenario's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelSpec>,
    /// Kernel modules that the VM loads besides those of its devices; a kernel that has none is expected to have them in its
    /// image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub modules: Vec<String>,
    /// The IOMMU in front of the VM's PCI devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu: Option<Iommu>,
    /// Added to the kernel command line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
    /// A directory whose tree is laid over the VM's root, relative to the scenario file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<PathBuf>,
    /// Programs that the VM gets: names in `guest-images/programs.json`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub programs: Vec<String>,
}

/// A kernel of VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "want a list of kernel fragments, or the name of a distribution's kernel")]
pub enum KernelSpec {
    /// One that is built, with these fragments besides the base: names under `guest-images/kernel`.
    Fragments(Vec<String>),
    /// A distribution's own, unmodified: `distribution`, or a name of `kernel_packages` in `guest-images/versions.json`.
    Packaged(String),
}

impl Default for KernelSpec {
    fn default() -> Self {
        Self::Fragments(Vec::new())
    }
}

impl KernelSpec {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A vvu device and the proxy that serves it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VvuSpec {
    /// VM that has the PCI device and runs the back-end.
    #[serde(default = "device", skip_serializing_if = "is_device")]
    pub device_vm: String,
    /// VM that has the front-end.
    #[serde(default = "sibling", skip_serializing_if = "is_sibling")]
    pub sibling_vm: String,
    /// Where the PCI device is in the device VM.
    #[serde(default, skip_serializing_if = "is_default_addr")]
    pub addr: Addr,
    /// Virtqueues that the vvu device carries; as many as the front-end has unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub queues: Option<u16>,
    /// Whether the device VM has an express device for it, through which the guest notifies the sibling without the
    /// proxy; a VMM that has no such device leaves it out.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub express: bool,
    /// Whether its proxy runs the device in a worker, which `kill_worker` kills and `upgrade_proxy` replaces.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub supervised: bool,
    /// How the device VM gets at the sibling's memory.
    #[serde(default, skip_serializing_if = "Memory::is_default")]
    pub memory: Memory,
    /// Milliseconds after which a front-end that lost its connection makes another one; 0: it never does.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub reconnect_ms: u32,
    /// The sibling VM's device; a disk unless given.
    #[serde(default, skip_serializing_if = "is_default_frontend")]
    pub frontend: Frontend,
    /// The back-end that the scenario puts behind the device, for the table in `docs/compatibility.md`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
}

/// How a device VM gets at the memory of a sibling VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Memory {
    /// By the shared memory BAR of the vvu device.
    #[default]
    Bar,
    /// As persistent memory too; the kernel fragment `window` has what the guest needs for it.
    Window,
}

impl Memory {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A disk image, which is the file `/NAME.img` in a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// VM that gets the image.
    #[serde(default = "device", skip_serializing_if = "is_device")]
    pub vm: String,
    /// An existing raw image, relative to the scenario file; else one is generated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Size of a generated image in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub size_mib: Option<u64>,
    /// Content of a generated image.
    #[serde(default, skip_serializing_if = "Pattern::is_default")]
    pub pattern: Pattern,
    /// Another seed gives other content.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub seed: u64,
}

/// What is known of a vvu device once its scenario is planned.
#[derive(Debug, Clone, Default)]
pub struct VvuFacts {
    /// The PCI address in the device VM.
    pub bdf: String,
    /// Path of the sibling memory file.
    pub memory: String,
}

/// What is known of a disk image once it exists.
#[derive(Debug, Clone, Default)]
pub struct DiskFacts {
    /// SHA-256 of the content, in hexadecimal.
    pub sha256: String,
    /// Size in bytes, a multiple of 512.
    pub bytes: u64,
}

/// Content of a generated disk image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// Pseudo-random bytes, different in every sector.
    #[default]
    Random,
    /// Zeroes.
    Zero,
}

impl Pattern {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl VmSpec {
    /// The most RAM that the VM can have, in MiB.
    #[must_use]
    pub fn most_memory_mib(&self) -> u64 {
        self.max_memory_mib.unwrap_or(self.memory_mib)
    }
}

impl VvuSpec {
    /// The virtqueues that the vvu device carries.
    #[must_use]
    pub fn virtqueues(&self) -> u16 {
        self.queues.unwrap_or_else(|| self.frontend.virtqueues())
    }
}

impl Scenario {
    /// The placeholders of the scenario's texts: `vvu` tells what is known of a vvu device, `disk` what is known of a
    /// disk.
    ///
    /// # Errors
    ///
    /// A variable has the name of another placeholder, or uses one that is unknown.
    pub fn values(&self, vvu: impl Fn(&str) -> VvuFacts, disk: impl Fn(&str) -> DiskFacts) -> Result<Values> {
        let mut values = Values::default();
        for name in self.vvu.keys() {
            let VvuFacts { bdf, memory } = vvu(name);
            if self.vvu.len() == 1 {
                values.set("bdf", &bdf);
                values.set("memory", &memory);
            }
            values.set(format!("{name}.bdf"), bdf);
            values.set(format!("{name}.memory"), memory);
        }
        for name in self.disks.keys() {
            let DiskFacts { sha256, bytes } = disk(name);
            let sectors = (bytes / 512).to_string();
            let path = format!("/{name}.img");
            if self.disks.len() == 1 {
                values.set("disk", &path);
                values.set("sha256", &sha256);
                values.set("capacity_sectors", &sectors);
            }
            values.set(name, path);
            values.set(format!("{name}.sha256"), sha256);
            values.set(format!("{name}.sectors"), sectors);
            values.set(format!("{name}.bytes"), bytes.to_string());
        }
        self.add_variables(&mut values)?;
        Ok(values)
    }

    /// Adds the variables to `values`, those that others use first.
    fn add_variables(&self, values: &mut Values) -> Result<()> {
        let taken = self.variables.keys().find(|name| values.has(name));
        ensure!(
            taken.is_none(),
            "at variables.{}: a placeholder has this name",
            taken.map_or("", |name| name)
        );
        let mut left: Vec<_> = self.variables.iter().collect();
        while !left.is_empty() {
            let before = left.len();
            left.retain(|(name, text)| {
                let filled = values.fill(text);
                let is_left = filled.is_err();
                filled.into_iter().for_each(|text| values.set(*name, text));
                is_left
            });
            if left.len() == before {
                // With these as known, what is still unknown is nobody's name.
                left.iter().for_each(|(name, _)| values.set(*name, ""));
                for (name, text) in &left {
                    values.fill(text).with_context(|| format!("at variables.{name}"))?;
                }
                bail!("at variables.{}: it uses itself", left[0].0);
            }
        }
        Ok(())
    }

    /// Gives the variable `name` another text.
    ///
    /// # Errors
    ///
    /// The scenario has no such variable, or the text makes it invalid.
    pub fn set_variable(&mut self, name: &str, text: &str) -> Result<()> {
        let known = self.variables.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let variable = self.variables.get_mut(name).with_context(|| match known.as_str() {
            "" => format!("the scenario {} has no variables", self.name),
            known => format!("the scenario {} has no variable {name:?}: known are {known}", self.name),
        })?;
        text.clone_into(variable);
        self.check()
    }

    /// The kernel of a VM.
    #[must_use]
    pub fn kernel_of(&self, vm: &VmSpec) -> KernelId {
        match vm.kernel.as_ref().unwrap_or(&self.kernel) {
            KernelSpec::Fragments(names) => KernelId::new(self.kernel_source.as_deref(), names),
            KernelSpec::Packaged(name) => KernelId::Packaged(name.clone()),
        }
    }

    /// The kernel of the VMs that name none of their own, or of the first VM if all do.
    #[must_use]
    pub fn kernel_id(&self) -> KernelId {
        let plain = self.vms.values().find(|vm| vm.kernel.is_none()).or(self.vms.values().next());
        plain.map_or_else(KernelId::default, |vm| self.kernel_of(vm))
    }

    /// The most RAM of all VMs in MiB.
    #[must_use]
    pub fn memory_mib(&self) -> u64 {
        self.vms.values().map(VmSpec::most_memory_mib).fold(0, u64::saturating_add)
    }

    /// The vvu devices whose front-end is in `vm`.
    pub fn vvu_of_sibling<'a>(&'a self, vm: &'a str) -> impl Iterator<Item = (&'a str, &'a VvuSpec)> {
        self.vvu.iter().filter(move |(_, vvu)| vvu.sibling_vm == vm).map(|(name, vvu)| (name.as_str(), vvu))
    }

    /// Whether the memory file of the sibling VM `vm` is made for a window.
    #[must_use]
    pub fn has_window(&self, vm: &str) -> bool {
        self.vvu_of_sibling(vm).any(|(_, vvu)| vvu.memory == Memory::Window)
    }

    /// The vvu devices whose back-end is in `vm`.
    pub fn vvu_of_device<'a>(&'a self, vm: &'a str) -> impl Iterator<Item = (&'a str, &'a VvuSpec)> {
        self.vvu.iter().filter(move |(_, vvu)| vvu.device_vm == vm).map(|(name, vvu)| (name.as_str(), vvu))
    }
}

/// The kernels, VMMs and programs that `scenarios` need.
pub fn needs<'a>(scenarios: impl IntoIterator<Item = &'a Scenario>) -> Needs {
    let mut needs = Needs::default();
    for scenario in scenarios {
        needs.kernels.extend(scenario.vms.values().map(|vm| scenario.kernel_of(vm)));
        needs.vmms.extend(scenario.vms.values().filter_map(|vm| vm.vmm.clone()));
        needs.programs.extend(scenario.vms.values().flat_map(|vm| &vm.programs).cloned());
    }
    needs
}

fn one() -> u32 {
    1
}

fn is_one(number: &u32) -> bool {
    *number == 1
}

fn is_zero<N: PartialEq + From<u8>>(number: &N) -> bool {
    *number == N::from(0)
}

fn yes() -> bool {
    true
}

fn is_true(flag: &bool) -> bool {
    *flag
}

fn is_false(flag: &bool) -> bool {
    !flag
}

pub(super) fn device() -> String {
    "device".to_owned()
}

fn is_device(name: &str) -> bool {
    name == "device"
}

pub(super) fn sibling() -> String {
    "sibling".to_owned()
}

fn is_sibling(name: &str) -> bool {
    name == "sibling"
}

fn is_default_addr(addr: &Addr) -> bool {
    *addr == Addr::default()
}

fn is_default_frontend(frontend: &Frontend) -> bool {
    *frontend == Frontend::default()
}
