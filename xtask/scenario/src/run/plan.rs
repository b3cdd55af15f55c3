//! Settles the addresses and paths of a scenario before anything starts.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use vvu_testvm::{Addr, Cpu, Device, Express, Iommu, ProxyConfig, RunDir, Slot, SocketDir, VmConfig};

use crate::format::{Memory, Scenario, VmSpec};

/// The proxies and VMs to start.
#[derive(Debug)]
pub(super) struct Plan {
    /// The proxies by vvu device.
    pub proxies: BTreeMap<String, ProxyConfig>,
    /// The VMs by name.
    pub vms: BTreeMap<String, VmConfig>,
    /// By vvu device that steps attach: the sibling VM and the index among the devices that can be attached to it.
    pub attachments: BTreeMap<String, (String, usize)>,
}

impl Plan {
    /// Settles addresses and paths of `scenario`. `default_iommu` is the IOMMU of a device VM that names none: VFIO needs
    /// one.
    ///
    /// # Errors
    ///
    /// Fails if a VM has more devices than its bus has slots, or `default_iommu` does.
    pub(super) fn new(
        scenario: &Scenario,
        run: &RunDir,
        sockets: &SocketDir,
        default_iommu: impl Fn(&VmSpec) -> Result<Iommu>,
    ) -> Result<Self> {
        let slots = settle(scenario)?;
        let express = settle_express(scenario, &slots)?;
        let mut proxies = BTreeMap::new();
        for (name, vvu) in &scenario.vvu {
            let sibling = &vvu.sibling_vm;
            let first = scenario.vvu_of_sibling(sibling).next().map_or(name.as_str(), |(first, _)| first);
            let memory_mib = scenario.vms.get(sibling).map_or(0, VmSpec::most_memory_mib);
            let fresh = ProxyConfig::new(name, memory_mib, sockets);
            let proxy = ProxyConfig {
                slot: slots[name.as_str()],
                express: express
                    .get(name.as_str())
                    .copied()
                    .zip(fresh.express)
                    .map(|(slot, express)| Express { slot, ..express }),
                memory_link: sockets.socket(&format!("{first}.mem")),
                memory_mib: (first == name).then_some(memory_mib),
                window: scenario.has_window(sibling),
                huge_pages: scenario.vms.get(sibling).is_some_and(|vm| vm.huge_pages),
                trace: Some(run.file(&format!("trace-{name}.jsonl"))),
                queues: vvu.virtqueues().into(),
                supervised: vvu.supervised,
                ..fresh
            };
            proxies.insert(name.clone(), proxy);
        }
        let mut vms = BTreeMap::new();
        let mut attachments = BTreeMap::new();
        for (name, spec) in &scenario.vms {
            let back_ends: Vec<_> = scenario.vvu_of_device(name).collect();
            let front_ends: Vec<_> = scenario.vvu_of_sibling(name).collect();
            let iommu = match (spec.iommu, back_ends.is_empty()) {
                (None, false) => Some(default_iommu(spec)?),
                (chosen, _) => chosen,
            };
            let mut own: Vec<_> = back_ends.iter().flat_map(|(vvu, _)| proxies[*vvu].devices()).collect();
            let windows = back_ends.iter().filter(|(_, vvu)| vvu.memory == Memory::Window);
            // One for each sibling, however many devices it has.
            let windows: BTreeMap<_, _> =
                windows.map(|(vvu, spec)| (&spec.sibling_vm, &proxies[*vvu])).collect();
            for (sibling, proxy) in windows {
                let slot = Device::last_free_slot(&own).with_context(|| {
                    format!("no PCI slot of {name:?} is left for the window of {sibling:?}")
                })?;
                let memory_mib = scenario.vms.get(sibling).map_or(0, VmSpec::most_memory_mib);
                own.push(proxy.window_device(slot, memory_mib));
            }
            let (mut siblings, mut attachable) = (Vec::new(), Vec::new());
            for (vvu, spec) in &front_ends {
                let others = || own.iter().chain(&siblings).chain(&attachable);
                let slot = Slot::first_free(|slot| others().any(|device: &Device| device.slot() == slot));
                let device = Device::VhostUser {
                    slot: slot.with_context(|| format!("no PCI slot of {name:?} is left for {vvu:?}"))?,
                    socket: text(&proxies[*vvu].vhost_user),
                    frontend: spec.frontend.clone(),
                    reconnect_ms: spec.reconnect_ms,
                };
                if scenario.attaches(vvu) {
                    attachments.insert((*vvu).to_owned(), (name.clone(), attachable.len()));
                    attachable.push(device);
                } else {
                    siblings.push(device);
                }
            }
            let config = VmConfig {
                name: name.clone(),
                vmm: spec.vmm.clone(),
                memory_mib: spec.memory_mib,
                max_memory_mib: spec.max_memory_mib,
                numa_nodes: spec.numa_nodes,
                cpus: spec.cpus,
                cpu: spec.cpu.map_or(Cpu::Best, Cpu::Level),
                memory_offset_mib: front_ends.first().map_or(0, |(vvu, _)| proxies[*vvu].memory_offset_mib()),
                memory_file: front_ends.first().map(|(vvu, _)| proxies[*vvu].memory_file()),
                iommu,
                devices: own.into_iter().chain(siblings).collect(),
                attachable,
                managed: scenario.manages(name),
                cmdline: spec.cmdline.clone(),
                modules: spec.modules.clone(),
                reboots: scenario.reboots(name),
            };
            vms.insert(name.clone(), config);
        }
        Ok(Self { proxies, vms, attachments })
    }
}

/// Chooses a slot for each vvu device.
fn settle(scenario: &Scenario) -> Result<BTreeMap<&str, Slot>> {
    let mut slots = BTreeMap::new();
    let mut taken = BTreeSet::new();
    // Fixed addresses first, so that "auto" does not take one of them.
    for (name, vvu) in &scenario.vvu {
        if let Addr::Fixed(slot) = vvu.addr {
            slots.insert(name.as_str(), slot);
            taken.insert((vvu.device_vm.as_str(), slot));
        }
    }
    for (name, vvu) in &scenario.vvu {
        if vvu.addr == Addr::Auto {
            let vm = vvu.device_vm.as_str();
            let slot = Slot::first_free(|slot| taken.contains(&(vm, slot)))
                .with_context(|| format!("no PCI slot of {vm:?} is left for {name:?}"))?;
            slots.insert(name, slot);
            taken.insert((vm, slot));
        }
    }
    Ok(slots)
}

/// Chooses a slot for the express device of each vvu device that has one: the last ones, so that all others stay where
/// they would be without. A VM that is a sibling itself has none: its VMM would tell the proxy of its memory about the
/// express device's, which is in no sibling memory file.
fn settle_express<'s>(
    scenario: &'s Scenario,
    vvu_slots: &BTreeMap<&str, Slot>,
) -> Result<BTreeMap<&'s str, Slot>> {
    let mut slots: BTreeMap<&str, Slot> = BTreeMap::new();
    let is_sibling = |vm| scenario.vvu_of_sibling(vm).next().is_some();
    for (name, vvu) in scenario.vvu.iter().filter(|(_, vvu)| vvu.express && !is_sibling(&vvu.device_vm)) {
        let taken = |slot| {
            let same_vm = scenario.vvu_of_device(&vvu.device_vm).map(|(other, _)| other);
            same_vm
                .into_iter()
                .any(|other| vvu_slots.get(other) == Some(&slot) || slots.get(other) == Some(&slot))
        };
        let slot = Slot::last_free(taken).with_context(|| {
            format!("no PCI slot of {:?} is left for the express device of {name:?}", vvu.device_vm)
        })?;
        slots.insert(name, slot);
    }
    Ok(slots)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vvu_testvm::{BlockFrontend, Frontend};

    fn plan(text: &str) -> Plan {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("s.json");
        std::fs::write(&file, text).expect("written");
        let scenario = Scenario::load(&file).expect("valid");
        let run = RunDir::create(dir.path(), "s").expect("a run directory");
        let sockets = SocketDir::for_run(&run).expect("a directory");
        Plan::new(&scenario, &run, &sockets, |_| Ok(Iommu::Virtio)).expect("settled")
    }

    /// How many sockets and links the proxies make.
    fn transient(plan: &Plan) -> usize {
        plan.proxies.values().map(|proxy| proxy.transient().len()).sum()
    }

    #[test]
    fn proxies_and_vms_of_several_devices_fit_together() {
        let plan = plan(
            r#"{"name": "s", "description": "", "vms": {"device": {"memory_mib": 512, "iommu": "amd-iommu"},
                "one": {"memory_mib": 1024}, "two": {"memory_mib": 128}, "bare": {"memory_mib": 64}},
                "vvu": {"a": {"sibling_vm": "one", "addr": "auto"}, "b": {"sibling_vm": "two", "frontend": {"block": {"queues": 2}}}},
                "steps": [{"power_off": {"vm": "bare"}}]}"#,
        );
        assert_eq!(plan.proxies["b"].slot, Slot::DEFAULT);
        assert_eq!(plan.proxies["a"].slot.to_string(), "0000:00:11.0");
        assert_eq!(plan.proxies["a"].memory_mib, Some(1024));
        let link = plan.proxies["a"].memory_link.display().to_string();
        assert_eq!(plan.vms["one"].memory_file, Some(link.clone()));
        assert_eq!(plan.vms["one"].iommu, None);
        assert_eq!(plan.vms["bare"].memory_file, None);
        assert_eq!(plan.vms["device"].iommu, Some(Iommu::Amd));
        let slots: Vec<_> = plan.vms["device"].devices.iter().map(|device| device.slot().device()).collect();
        assert_eq!(slots, [0x11, 0x1e, 0x10, 0x1d]);
        let socket = plan.proxies["b"].vhost_user.display().to_string();
        let frontend = Frontend::Block(BlockFrontend { queues: 2, ..BlockFrontend::default() });
        let want = Device::VhostUser { slot: Slot::DEFAULT, socket, frontend, reconnect_ms: 0 };
        assert_eq!(plan.vms["two"].devices, [want]);
        assert_eq!(transient(&plan), 8);
        let words = plan.proxies["a"].words(Path::new("/v/vvu")).join(" ");
        assert!(words.starts_with("/v/vvu proxy --vfio-user /"), "{words}");
        assert!(
            words.contains(&format!("--memory-size 1024M --memory-link {link} --queues 1 --trace ")),
            "{words}"
        );
    }

    #[test]
    fn a_device_vm_that_is_a_sibling_itself_has_no_express_device() {
        let plan = plan(
            r#"{"name": "s", "description": "", "vms": {"bottom": {"memory_mib": 64}, "middle": {"memory_mib": 64},
                "top": {"memory_mib": 64}}, "vvu": {"a": {"device_vm": "bottom", "sibling_vm": "middle"},
                "b": {"device_vm": "middle", "sibling_vm": "top"}}, "steps": [{"power_off": {"vm": "top"}}]}"#,
        );
        assert!(plan.proxies["a"].express.is_some() && plan.proxies["b"].express.is_none());
    }

    #[test]
    fn devices_of_one_sibling_share_its_memory_file() {
        let plan = plan(
            r#"{"name": "s", "description": "", "vms": {"device": {"memory_mib": 512}, "sibling": {"memory_mib": 256}},
                "vvu": {"a": {}, "b": {"addr": "auto", "frontend": {"net": {"queue_pairs": 2}}}},
                "steps": [{"power_off": {"vm": "device"}}]}"#,
        );
        let (a, b) = (&plan.proxies["a"], &plan.proxies["b"]);
        assert_eq!((a.memory_mib, b.memory_mib), (Some(256), None));
        assert_eq!(a.memory_link, b.memory_link);
        let words = b.words(Path::new("vvu")).join(" ");
        assert!(
            words.contains(&format!("--memory {} --queues 4 --trace /", a.memory_link.display())),
            "{words}"
        );
        let slots: Vec<_> = plan.vms["sibling"].devices.iter().map(|device| device.slot().device()).collect();
        assert_eq!(slots, [0x10, 0x11]);
        assert_eq!(transient(&plan), 7);
    }

    #[test]
    fn a_device_vm_has_one_window_for_each_sibling() {
        let plan = plan(
            r#"{"name": "s", "description": "", "vms": {"device": {"memory_mib": 256},
                "one": {"memory_mib": 512}, "two": {"memory_mib": 128}, "three": {"memory_mib": 64}},
                "vvu": {"a": {"sibling_vm": "one", "memory": "window"},
                        "b": {"sibling_vm": "one", "memory": "window", "addr": "auto"},
                        "c": {"sibling_vm": "two", "memory": "window", "addr": "auto"},
                        "d": {"sibling_vm": "three", "addr": "auto"}},
                "steps": [{"power_off": {"vm": "device"}}]}"#,
        );
        let windows: Vec<_> = plan.vms["device"]
            .devices
            .iter()
            .filter_map(|device| match device {
                Device::Window { slot, file, size_mib } => Some((slot.device(), file.clone(), *size_mib)),
                _ => None,
            })
            .collect();
        let link = |vvu: &str| plan.proxies[vvu].memory_file();
        assert_eq!(windows, [(0x1a, link("a"), 546), (0x19, link("c"), 162)]);
        let offsets = ["one", "two", "three"].map(|vm| plan.vms[vm].memory_offset_mib);
        assert_eq!(offsets, [2, 2, 0]);
        let words = |vvu: &str| plan.proxies[vvu].words(Path::new("vvu")).join(" ");
        assert!(words("a").ends_with(" --window") && words("c").ends_with(" --window"));
        assert!(!words("b").contains("--window") && !words("d").contains("--window"));
    }

    #[test]
    fn a_vvu_device_that_a_step_attaches_is_not_there_at_first() {
        let plan = plan(
            r#"{"name": "s", "description": "", "vms": {"device": {"memory_mib": 512},
                "sibling": {"memory_mib": 256, "max_memory_mib": 512}},
                "vvu": {"a": {}, "b": {"addr": "auto"}}, "steps": [{"attach": {"vvu": "b"}}]}"#,
        );
        let sibling = &plan.vms["sibling"];
        let slots =
            |devices: &[Device]| devices.iter().map(|device| device.slot().device()).collect::<Vec<_>>();
        assert_eq!((slots(&sibling.devices), slots(&sibling.attachable)), (vec![0x10], vec![0x11]));
        assert!(sibling.managed && !plan.vms["device"].managed);
        assert_eq!(plan.attachments, [("b".to_owned(), ("sibling".to_owned(), 0))].into());
        assert_eq!((sibling.memory_mib, sibling.max_memory_mib), (256, Some(512)));
        assert_eq!(plan.proxies["a"].memory_mib, Some(512));
    }
}
