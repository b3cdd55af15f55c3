//! Scenarios: which VMs to start, what to do in them and what must come of it, as data.
//!
//! The format is described in `scenarios/README.md`; the types here are its definition.

mod check;
mod step;
mod text;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use vvu_testvm::setup::{KernelId, Needs};
use vvu_testvm::vm::{Addr, CpuLevel, Frontend, Iommu};

pub use step::{Action, Placed, Step};
pub use text::Values;

/// The placeholder that numbers the rounds of a repeat.
pub const ROUND: &str = "round";

/// A scenario file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Name of the scenario; for one under `scenarios/`, its file name without `.json`.
    pub name: String,
    /// One line for `e2e --list`.
    pub description: String,
    /// Kernel fragments that its VMs need besides the base: names under `guest-images/kernel`.
    #[serde(default)]
    pub kernel: Vec<String>,
    /// Where its VMs' kernel comes from, if not from the machine's own suites: a name in
    /// `guest-images/versions.json`.
    #[serde(default)]
    pub kernel_source: Option<String>,
    /// The VMs by name.
    pub vms: BTreeMap<String, VmSpec>,
    /// The vvu devices by name: each joins a device VM and a sibling VM through a proxy of its own.
    #[serde(default)]
    pub vvu: BTreeMap<String, VvuSpec>,
    /// The disk images by name.
    #[serde(default)]
    pub disks: BTreeMap<String, DiskSpec>,
    /// What is done, in this order.
    pub steps: Vec<Step>,
}

/// A VM.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Virtual CPUs.
    #[serde(default = "one")]
    pub cpus: u32,
    /// For a sibling VM: take the RAM from the host's huge pages.
    #[serde(default)]
    pub huge_pages: bool,
    /// What the CPUs can do, if programs need more than the VMM's default.
    #[serde(default)]
    pub cpu: Option<CpuLevel>,
    /// The VMM that runs it, if not the run's: a name in `guest-images/versions.json`.
    #[serde(default)]
    pub vmm: Option<String>,
    /// The IOMMU in front of the VM's PCI devices.
    #[serde(default)]
    pub iommu: Option<Iommu>,
    /// Added to the kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// A directory whose tree is laid over the VM's root, relative to the scenario file.
    #[serde(default)]
    pub overlay: Option<PathBuf>,
    /// Programs that it gets: names in `guest-images/programs.json`.
    #[serde(default)]
    pub programs: Vec<String>,
}

/// A vvu device and the proxy that serves it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VvuSpec {
    /// VM that has the PCI device and runs the back-end.
    #[serde(default = "device")]
    pub device_vm: String,
    /// VM that has the front-end.
    #[serde(default = "sibling")]
    pub sibling_vm: String,
    /// Where the PCI device is in the device VM.
    #[serde(default)]
    pub addr: Addr,
    /// Virtqueues that the vvu device carries; as many as the front-end has unless given.
    #[serde(default)]
    pub queues: Option<u16>,
    /// Milliseconds after which a front-end that lost its connection makes another one; 0: it never does.
    #[serde(default)]
    pub reconnect_ms: u32,
    /// The sibling VM's device.
    #[serde(default)]
    pub frontend: Frontend,
}

/// A disk image, placed in the root directory of a VM as `NAME.img`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// VM that gets the image.
    #[serde(default = "device")]
    pub vm: String,
    /// An existing image, relative to the scenario file; else one is generated.
    #[serde(default)]
    pub file: Option<PathBuf>,
    /// Size of a generated image in MiB.
    #[serde(default)]
    pub size_mib: u64,
    /// What a generated image is filled with.
    #[serde(default)]
    pub pattern: Pattern,
    /// Another seed gives other content.
    #[serde(default)]
    pub seed: u64,
}

/// What is known of a disk image once it exists.
#[derive(Debug, Clone, Default)]
pub struct DiskFacts {
    /// SHA-256 of the content, in hexadecimal.
    pub sha256: String,
    /// Size in bytes, a multiple of 512.
    pub bytes: u64,
}

/// What a generated disk is filled with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// Pseudo-random bytes, different in every sector.
    #[default]
    Random,
    /// Zeroes.
    Zero,
}

impl VvuSpec {
    /// The virtqueues that the vvu device carries.
    #[must_use]
    pub fn virtqueues(&self) -> u16 {
        self.queues.unwrap_or_else(|| self.frontend.virtqueues())
    }
}

impl Scenario {
    /// Reads and checks a scenario file.
    ///
    /// # Errors
    ///
    /// Names the file and the place in it, as a JSON path, and what is wrong there.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the scenario {}", path.display()))?;
        let dir = path.parent().unwrap_or(Path::new("."));
        Self::parse(&text, dir).with_context(|| format!("{} is not a valid scenario", path.display()))
    }

    /// Reads and checks the text of a scenario file in `dir`.
    ///
    /// # Errors
    ///
    /// As [`Scenario::load`].
    pub fn parse(text: &str, dir: &Path) -> Result<Self> {
        let mut json = serde_json::Deserializer::from_str(text);
        let mut scenario: Scenario = serde_path_to_error::deserialize(&mut json)
            .map_err(|error| anyhow::anyhow!("at {}: {}", error.path(), error.inner()))?;
        json.end().context("after the scenario")?;
        for vm in scenario.vms.values_mut() {
            vm.overlay = vm.overlay.take().map(|overlay| dir.join(overlay));
        }
        for disk in scenario.disks.values_mut() {
            disk.file = disk.file.take().map(|file| dir.join(file));
        }
        scenario.check()?;
        Ok(scenario)
    }

    /// The placeholders of its texts: `bdf` gives the address of a vvu device, `disk` what is known of a disk.
    pub fn values(&self, bdf: impl Fn(&str) -> String, disk: impl Fn(&str) -> DiskFacts) -> Values {
        let mut values = Values::default();
        for name in self.vvu.keys() {
            values.set(format!("{name}.bdf"), bdf(name));
            if self.vvu.len() == 1 {
                values.set("bdf", bdf(name));
            }
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
        values
    }

    /// The steps one after the other, the rounds of a repeat unrolled, at most `rounds` of them.
    pub fn unrolled(&self, rounds: u32) -> Vec<Placed<'_>> {
        let placed = |(index, step)| Placed::unroll(step, format!("steps[{index}]"), rounds);
        self.steps.iter().enumerate().flat_map(placed).collect()
    }

    /// Whether a step has this action for the VM `vm`.
    pub fn has(&self, vm: &str, action: Action<'_>) -> bool {
        self.unrolled(1)
            .iter()
            .any(|placed| placed.step.vm.as_deref() == Some(vm) && placed.step.action() == Some(action))
    }

    /// The kernel that its VMs run.
    #[must_use]
    pub fn kernel_id(&self) -> KernelId {
        KernelId::new(self.kernel_source.as_deref(), &self.kernel)
    }

    /// RAM of all its VMs in MiB.
    pub fn memory_mib(&self) -> u64 {
        self.vms.values().map(|vm| vm.memory_mib).fold(0, u64::saturating_add)
    }

    /// The vvu devices whose front-end is in `vm`.
    pub fn vvu_of_sibling<'a>(&'a self, vm: &'a str) -> impl Iterator<Item = (&'a str, &'a VvuSpec)> {
        self.vvu.iter().filter(move |(_, vvu)| vvu.sibling_vm == vm).map(|(name, vvu)| (name.as_str(), vvu))
    }

    /// The vvu devices whose back-end is in `vm`.
    pub fn vvu_of_device<'a>(&'a self, vm: &'a str) -> impl Iterator<Item = (&'a str, &'a VvuSpec)> {
        self.vvu.iter().filter(move |(_, vvu)| vvu.device_vm == vm).map(|(name, vvu)| (name.as_str(), vvu))
    }
}

/// What `scenarios` need.
pub fn needs<'a>(scenarios: impl IntoIterator<Item = &'a Scenario>) -> Needs {
    let mut needs = Needs::default();
    for scenario in scenarios {
        needs.kernels.insert(scenario.kernel_id());
        needs.qemus.extend(scenario.vms.values().filter_map(|vm| vm.vmm.clone()));
        needs.programs.extend(scenario.vms.values().flat_map(|vm| &vm.programs).cloned());
    }
    needs
}

/// The scenarios under `dir`, by name.
///
/// # Errors
///
/// The directory cannot be read, or holds a file that is no scenario or has another name than its scenario.
pub fn list(dir: &Path) -> Result<BTreeMap<String, Scenario>> {
    let mut scenarios = BTreeMap::new();
    for path in files(dir)? {
        let scenario = Scenario::load(&path)?;
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        ensure!(
            scenario.name == stem,
            "{} names itself {:?}: want {stem:?}, its file name",
            path.display(),
            scenario.name
        );
        scenarios.insert(scenario.name.clone(), scenario);
    }
    Ok(scenarios)
}

/// Finds the scenario `name` under `dir`.
///
/// # Errors
///
/// There is none of that name; the message lists those there are.
pub fn find(dir: &Path, name: &str) -> Result<Scenario> {
    let path = dir.join(format!("{name}.json"));
    let files = files(dir)?;
    if files.contains(&path) {
        return Scenario::load(&path);
    }
    let known: Vec<_> =
        files.iter().filter_map(|file| file.file_stem()).map(|stem| stem.to_string_lossy()).collect();
    bail!(
        "there is no scenario {name:?}: known are {}; use --scenario-file for one of your own",
        known.join(", ")
    )
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot list {}", dir.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn one() -> u32 {
    1
}

fn device() -> String {
    "device".to_owned()
}

fn sibling() -> String {
    "sibling".to_owned()
}

#[cfg(test)]
mod tests;
