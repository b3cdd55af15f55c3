//! Starts and ends the VMs and proxies of a scenario.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use vvu_artifacts::kernel::Kernel;
use vvu_process::progress::Progress;
use vvu_testvm::{Boot, Lab, Process, Vm, VmConfig};

use super::images::Images;
use super::plan::Plan;
use super::steps::{Measurements, Running};
use crate::format::{Placed, Scenario, Values};
use crate::report::{self, Part};

/// Starts the VMs and proxies of a scenario as its plan says.
pub(super) struct Launcher<'a> {
    /// The lab in which the VMs and proxies run.
    pub(super) lab: &'a Lab<'a>,
    /// Kernel of each guest.
    pub(super) kernels: BTreeMap<String, &'a Kernel>,
    /// Kernel of a guest that names none.
    pub(super) kernel: &'a Kernel,
    /// Configuration of each VM and proxy.
    pub(super) plan: &'a Plan,
    /// Initramfs of each guest that needs one of its own.
    pub(super) images: &'a Images,
}

impl<'a> Launcher<'a> {
    /// Starts the proxies, then the VMs that no step starts.
    pub(super) fn start(&'a self, scenario: &Scenario, values: Values) -> Result<Running<'a>> {
        let proxies = self.plan.proxies.keys().map(|name| Ok((name.clone(), self.proxy(name)?)));
        let mut running = Running {
            vms: BTreeMap::new(),
            proxies: proxies.collect::<Result<_>>()?,
            launch: Box::new(|name| self.vm(name)),
            launch_proxy: Box::new(|name| self.proxy(name)),
            trace: Box::new(|name| self.trace(name)),
            tamper: Box::new(|name, attack| {
                let proxy = self.plan.proxies.get(name);
                let proxy = proxy.with_context(|| format!("no vvu device is called {name:?}"))?;
                attack.carry_out(&proxy.memory_link)
            }),
            attach: Box::new(|vms, vvu, deadline| {
                let (vm, config, index) = self.attachment(vms, vvu)?;
                Ok(self.lab.attach(vm, config, index, deadline)?.evidence)
            }),
            detach: Box::new(|vms, vvu, deadline| {
                let (vm, config, index) = self.attachment(vms, vvu)?;
                self.lab.detach(vm, config, index, deadline)?;
                Ok(format!("{} gave {vvu} back", vm.name()))
            }),
            launched: None,
            values,
            measurements: Measurements::new(),
            slowness: self.lab.setup().slowness,
        };
        for name in scenario.vms.keys().filter(|name| !scenario.starts(name)) {
            running.start(name)?;
        }
        Ok(running)
    }

    /// Kills the VMs and stops the proxies. Fails if a proxy exits with an error, or a process or file is left over.
    pub(super) fn end(&self, running: Running<'_>) -> Result<String> {
        let Running { vms, proxies, .. } = running;
        drop(vms);
        let stopped: Vec<Result<()>> = proxies.values().map(Process::stop).collect();
        drop(proxies);
        stopped.into_iter().collect::<Result<()>>()?;
        self.lab.check_leftovers()
    }

    /// Seconds that a bare boot of the scenario's kernel takes.
    pub(super) fn bare_boot(&self, progress: &Progress) -> Result<f64> {
        let stage = progress.stage("bare-boot");
        let initramfs = &self.lab.setup().base.path;
        let seconds = self.lab.bare_boot(Boot { kernel: &self.kernel.vmlinux, initramfs })?.as_secs_f64();
        stage.done(format!("{seconds:.2} s"));
        Ok(seconds)
    }

    /// Writes the script that starts the proxies and VMs by hand.
    pub(super) fn write_replay(&self, scenario: &Scenario, values: &Values) -> Result<()> {
        let mut parts = Vec::new();
        for (name, proxy) in &self.plan.proxies {
            let words = proxy.words(&self.lab.setup().binaries.vvu);
            parts.push(Part { name: name.clone(), words, steps: Vec::new() });
        }
        // The script starts VMs in the order in which the scenario uses them.
        let mut names: Vec<&String> = scenario.vms.keys().collect();
        let steps = scenario.unrolled(1);
        let in_vm = |placed: &Placed<'_>, name: &str| placed.step.vm() == Some(name);
        names.sort_by_key(|name| steps.iter().position(|placed| in_vm(placed, name)));
        for name in names {
            let config = self.plan.vms.get(name).context("every VM is planned")?;
            let words = self.lab.vm_words(config, self.boot(name))?;
            let steps = steps.iter().filter(|placed| in_vm(placed, name));
            let steps = steps.map(|placed| {
                let text = report::by_hand(placed.step);
                // A value that a step saves is not known yet.
                values.fill(&text).unwrap_or(text)
            });
            parts.push(Part { name: name.clone(), words, steps: steps.collect() });
        }
        let run = self.lab.run();
        let sockets = self.lab.sockets().path().display().to_string();
        run.write_script("replay.sh", &report::replay_script(&run.id(), &sockets, &parts))
    }

    fn proxy(&self, name: &str) -> Result<Process> {
        let config = self.plan.proxies.get(name);
        self.lab.proxy(config.with_context(|| format!("no vvu device is called {name:?}"))?)
    }

    fn vm(&self, name: &str) -> Result<Vm> {
        let config = self.plan.vms.get(name).with_context(|| format!("no VM is called {name:?}"))?;
        self.lab.vm_with(config, self.boot(name))
    }

    /// The sibling VM of a vvu device, its configuration and the index of the front-end among what can be attached.
    fn attachment<'v>(
        &'v self,
        vms: &'v BTreeMap<String, Vm>,
        vvu: &str,
    ) -> Result<(&'v Vm, &'v VmConfig, usize)> {
        let (name, index) =
            self.plan.attachments.get(vvu).with_context(|| format!("no step attaches {vvu:?}"))?;
        let vm = vms.get(name).with_context(|| format!("the VM {name} does not run"))?;
        let config = self.plan.vms.get(name).context("every VM is planned")?;
        Ok((vm, config, *index))
    }

    fn boot(&self, vm: &str) -> Boot<'_> {
        let initramfs = self.images.files.get(vm).unwrap_or(&self.lab.setup().base.path);
        let kernel = self.kernels.get(vm).unwrap_or(&self.kernel);
        Boot { kernel: &kernel.vmlinux, initramfs }
    }

    /// Reads the vhost-user messages that a vvu device has carried so far, one JSON object a line.
    fn trace(&self, name: &str) -> Result<String> {
        let path = self.plan.proxies.get(name).and_then(|config| config.trace.as_deref());
        let path = path.with_context(|| format!("{name:?} has no trace"))?;
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    }
}
