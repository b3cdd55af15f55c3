//! Reads the old format of scenario files and turns it into the current one.
//!
//! In the old format, a step had its action as one key beside `vm`, `check` and others, a VM named its `qemu` and QEMU's
//! model of its CPUs, and a front-end had the properties of QEMU's device.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value};
use vvu_testvm::{
    Addr, BlockFrontend, CpuLevel, Features, Frontend, FsFrontend, Iommu, NetFrontend, PlainFrontend,
};

use super::layout::to_text;
use super::matrix::Matrix;
use super::scenario::{DiskSpec, KernelSpec, Memory, Scenario, VmSpec, VvuSpec};
use super::step::{
    ConsoleStep, ExpectedExit, ExpectedResult, KillStep, Milestone, RepeatStep, RunStep, Signal, SpawnStep,
    Step, VmStep, VmWaitStep, WaitStep,
};
use super::step_host::{ProxyStep, TraceStep};

/// The check whose time the report gave, as it now gives that of the milestone `disk-visible`.
const DISK_VISIBLE: &str = "vda-appears";
/// Default name of a spawned command.
const SPAWNED: &str = "spawned";

/// Turns the text of a scenario or matrix file of the old format into one of the current format.
///
/// # Errors
///
/// The text is not of the old format, or has something without a counterpart. The message names the place as a JSON path.
pub fn upgraded(text: &str) -> Result<String> {
    let json: Value = serde_json::from_str(text)?;
    if json.get("axes").is_some() {
        return to_text(&matrix(json)?);
    }
    let mut json = serde_json::Deserializer::from_str(text);
    let old: OldScenario = serde_path_to_error::deserialize(&mut json)
        .map_err(|error| anyhow!("at {}: {}", error.path(), error.inner()))?;
    to_text(&old.upgraded()?)
}

/// Turns the patches and steps of a matrix.
fn matrix(mut json: Value) -> Result<Matrix> {
    for (axis, json) in elements(&mut json, "axes") {
        for (value, json) in elements(json, "values") {
            let place = format!("axes[{axis}].values[{value}]");
            if let Some(old) = json.get_mut("steps").map(Value::take) {
                let old: Vec<OldStep> = serde_path_to_error::deserialize(&old)
                    .map_err(|error| anyhow!("at {place}.steps{}: {}", error.path(), error.inner()))?;
                json["steps"] = serde_json::to_value(steps(old).with_context(|| format!("at {place}"))?)?;
            }
            if let Some(old) = json.get_mut("patch") {
                patch(old).with_context(|| format!("at {place}.patch"))?;
            }
        }
    }
    Ok(serde_path_to_error::deserialize(json)?)
}

/// The elements of the list `key`, if there is one, with their positions.
fn elements<'a>(json: &'a mut Value, key: &str) -> impl Iterator<Item = (usize, &'a mut Value)> {
    json.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten().enumerate()
}

/// The values of the object `key`, if there is one.
fn members<'a>(json: &'a mut Value, key: &str) -> impl Iterator<Item = &'a mut Value> {
    json.get_mut(key).and_then(Value::as_object_mut).into_iter().flat_map(Map::values_mut)
}

/// Turns a merge patch for a scenario, in place.
fn patch(patch: &mut Value) -> Result<()> {
    for vm in members(patch, "vms") {
        if let Some(vmm) = vm.as_object_mut().and_then(|vm| vm.remove("qemu")) {
            vm["vmm"] = vmm;
        }
        if let Some(model) = vm["cpu"].as_str() {
            vm["cpu"] = serde_json::to_value(cpu_level(model)?)?;
        }
    }
    for vvu in members(patch, "vvu") {
        let known = vvu.get("frontend").is_none() && vvu.get("queues").is_none();
        ensure!(known, "vvu: rewrite `frontend` and `queues` by hand, as scenarios/README.md has them");
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OldScenario {
    name: String,
    description: String,
    #[serde(default)]
    kernel: Vec<String>,
    kernel_source: Option<String>,
    vms: BTreeMap<String, OldVm>,
    #[serde(default)]
    vvu: BTreeMap<String, OldVvu>,
    #[serde(default)]
    disks: BTreeMap<String, DiskSpec>,
    steps: Vec<OldStep>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OldVm {
    memory_mib: u64,
    cpus: Option<u32>,
    #[serde(default)]
    huge_pages: bool,
    cpu: Option<String>,
    qemu: Option<String>,
    iommu: Option<Iommu>,
    #[serde(default)]
    cmdline: String,
    overlay: Option<PathBuf>,
    #[serde(default)]
    programs: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OldVvu {
    device_vm: Option<String>,
    sibling_vm: Option<String>,
    #[serde(default)]
    addr: Addr,
    queues: Option<u16>,
    #[serde(default)]
    reconnect_ms: u32,
    #[serde(default)]
    frontend: OldFrontend,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct OldFrontend {
    #[serde(default)]
    kind: OldKind,
    #[serde(default)]
    properties: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum OldKind {
    #[default]
    Blk,
    Fs,
    Rng,
    Vsock,
    Console,
    Net,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct OldStep {
    check: Option<String>,
    vm: Option<String>,
    #[serde(default)]
    start: bool,
    run: Option<String>,
    spawn: Option<String>,
    #[serde(rename = "as")]
    name: Option<String>,
    kill: Option<String>,
    #[serde(default)]
    signal: Signal,
    wait: Option<String>,
    console: Option<String>,
    #[serde(default)]
    power_off: bool,
    #[serde(default)]
    reboot: bool,
    #[serde(default)]
    kill_vm: bool,
    kill_proxy: Option<String>,
    start_proxy: Option<String>,
    trace: Option<String>,
    repeat: Option<OldRepeat>,
    #[serde(default)]
    expect: ExpectedResult,
    save: Option<String>,
    #[serde(default)]
    measure: bool,
    timeout_s: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OldRepeat {
    times: u32,
    steps: Vec<OldStep>,
}

impl OldScenario {
    fn upgraded(self) -> Result<Scenario> {
        let vms = self.vms.into_iter().map(|(name, vm)| {
            let vm = vm.upgraded().with_context(|| format!("at vms.{name}"))?;
            Ok((name, vm))
        });
        let vvu = self.vvu.into_iter().map(|(name, vvu)| {
            let vvu = vvu.upgraded().with_context(|| format!("at vvu.{name}.frontend"))?;
            Ok((name, vvu))
        });
        Ok(Scenario {
            schema: None,
            name: self.name,
            description: self.description,
            kernel: KernelSpec::Fragments(self.kernel),
            kernel_source: self.kernel_source,
            variables: BTreeMap::new(),
            vms: vms.collect::<Result<_>>()?,
            vvu: vvu.collect::<Result<_>>()?,
            disks: self.disks,
            steps: steps(self.steps)?,
        })
    }
}

impl OldVm {
    fn upgraded(self) -> Result<VmSpec> {
        Ok(VmSpec {
            max_memory_mib: None,
            numa_nodes: 1,
            memory_mib: self.memory_mib,
            cpus: self.cpus.unwrap_or(1),
            cpu: self.cpu.as_deref().map(cpu_level).transpose()?,
            huge_pages: self.huge_pages,
            vmm: self.qemu,
            kernel: None,
            modules: Vec::new(),
            iommu: self.iommu,
            cmdline: self.cmdline,
            overlay: self.overlay,
            programs: self.programs,
        })
    }
}

/// The highest level that QEMU's CPU model has all of.
fn cpu_level(model: &str) -> Result<CpuLevel> {
    Ok(match model {
        "qemu64" | "kvm64" | "Conroe" | "Penryn" => CpuLevel::V1,
        "Nehalem" | "Westmere" | "SandyBridge" | "IvyBridge" => CpuLevel::V2,
        "Haswell" | "Broadwell" | "Skylake-Client" | "EPYC" => CpuLevel::V3,
        "Skylake-Server" | "Cascadelake-Server" | "Icelake-Server" => CpuLevel::V4,
        _ => bail!("cpu: {model:?} has no level here: want x86-64-v1, x86-64-v2, x86-64-v3 or x86-64-v4"),
    })
}

impl OldVvu {
    fn upgraded(self) -> Result<VvuSpec> {
        let queues = self.queues.unwrap_or(1);
        Ok(VvuSpec {
            device_vm: self.device_vm.unwrap_or_else(super::scenario::device),
            sibling_vm: self.sibling_vm.unwrap_or_else(super::scenario::sibling),
            addr: self.addr,
            queues: None,
            memory: Memory::default(),
            reconnect_ms: self.reconnect_ms,
            frontend: self.frontend.upgraded(queues)?,
            express: true,
            supervised: false,
            backend: None,
        })
    }
}

impl OldFrontend {
    fn upgraded(self, queues: u16) -> Result<Frontend> {
        let mut rest = self.properties;
        let mut flag = |name: &str| match rest.remove(name).as_deref() {
            None => Ok(None),
            Some("on" | "true" | "yes") => Ok(Some(true)),
            Some("off" | "false" | "no") => Ok(Some(false)),
            Some(other) => Err(anyhow!("properties.{name}: {other:?}: want on or off")),
        };
        let features = Features {
            indirect_desc: flag("indirect_desc")?,
            event_idx: flag("event_idx")?,
            access_platform: flag("iommu_platform")?,
            ring_packed: flag("packed")?,
        };
        let sized = matches!(self.kind, OldKind::Blk | OldKind::Fs);
        let queue_size = if sized { rest.remove("queue-size") } else { None };
        let queue_size = queue_size.map(|size| size.parse()).transpose().context("properties.queue-size")?;
        let tag = if matches!(self.kind, OldKind::Fs) { rest.remove("tag") } else { None };
        let plain = |rest| PlainFrontend { features, vmm_properties: rest };
        Ok(match self.kind {
            OldKind::Blk => {
                Frontend::Block(BlockFrontend { queues, queue_size, features, vmm_properties: rest })
            }
            OldKind::Fs => Frontend::Fs(FsFrontend {
                tag: tag.context("properties: want tag, by which the guest mounts the file system")?,
                request_queues: queues,
                queue_size,
                features,
                vmm_properties: rest,
            }),
            OldKind::Rng => Frontend::Rng(plain(rest)),
            OldKind::Vsock => Frontend::Vsock(plain(rest)),
            OldKind::Console => Frontend::Console(plain(rest)),
            OldKind::Net => {
                Frontend::Net(NetFrontend { queue_pairs: queues, queue_size, features, vmm_properties: rest })
            }
        })
    }
}

fn steps(old: Vec<OldStep>) -> Result<Vec<Step>> {
    let steps = old.into_iter().enumerate();
    steps.map(|(index, step)| step.upgraded().with_context(|| format!("at steps[{index}]"))).collect()
}

impl OldStep {
    /// The number of actions that the step has.
    fn actions(&self) -> usize {
        let flags = [self.start, self.power_off, self.reboot, self.kill_vm, self.repeat.is_some()];
        let texts = [
            &self.run,
            &self.spawn,
            &self.kill,
            &self.wait,
            &self.console,
            &self.kill_proxy,
            &self.start_proxy,
            &self.trace,
        ];
        flags.iter().filter(|flag| **flag).count() + texts.iter().filter(|text| text.is_some()).count()
    }

    fn upgraded(self) -> Result<Step> {
        ensure!(self.actions() == 1, "want exactly one action, such as run, spawn, console or power_off");
        let Self { check, expect, save, measure, timeout_s, .. } = self;
        let milestone = (check.as_deref() == Some(DISK_VISIBLE)).then_some(Milestone::DiskVisible);
        if let Some(vvu) = self.kill_proxy {
            return Ok(Step::KillProxy(ProxyStep { check, vvu }));
        }
        if let Some(vvu) = self.start_proxy {
            return Ok(Step::StartProxy(ProxyStep { check, vvu }));
        }
        if let Some(vvu) = self.trace {
            let matches = expect.stdout;
            return Ok(Step::Trace(TraceStep { check, vvu, expect: Vec::new(), matches, save, measure }));
        }
        if let Some(OldRepeat { times, steps: rounds }) = self.repeat {
            let steps = steps(rounds).context("repeat")?;
            return Ok(Step::Repeat(RepeatStep { check, times, steps }));
        }
        let vm = self.vm.context("vm: missing: name the VM in which it happens")?;
        Ok(if let Some(command) = self.run {
            Step::Run(RunStep { check, vm, command, expect, save, measure, milestone, timeout_s })
        } else if let Some(command) = self.spawn {
            let name = self.name.unwrap_or_else(|| SPAWNED.to_owned());
            Step::Spawn(SpawnStep {
                check,
                vm,
                name,
                command,
                expect: ExpectedExit { exit: expect.exit },
                timeout_s,
            })
        } else if let Some(name) = self.kill {
            Step::Kill(KillStep { check, vm, name, signal: self.signal, timeout_s })
        } else if let Some(name) = self.wait {
            Step::Wait(WaitStep { check, vm, name, timeout_s })
        } else if let Some(line) = self.console {
            Step::Console(ConsoleStep { check, vm, line, save, measure, milestone, timeout_s })
        } else if self.power_off {
            Step::PowerOff(VmWaitStep { check, vm, timeout_s })
        } else if self.reboot {
            Step::Reboot(VmWaitStep { check, vm, timeout_s })
        } else if self.kill_vm {
            Step::KillVm(VmStep { check, vm })
        } else {
            Step::Start(VmStep { check, vm })
        })
    }
}

#[cfg(test)]
#[path = "upgrade_test.rs"]
mod tests;
