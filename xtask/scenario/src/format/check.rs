//! What a scenario must fulfil beyond its format. Every complaint begins with the JSON path of the place.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};

use vvu_artifacts::image::GuestPrograms;
use vvu_artifacts::qemu::NEEDED_DEVICE;
use vvu_artifacts::versions::Versions;

use super::step::{ACTIONS, Repeat};
use vvu_testvm::vm::{Addr, MAX_QUEUES};

use super::{Action, DiskFacts, DiskSpec, Placed, ROUND, Scenario, Step, Values, VmSpec};

/// Largest generated disk: it lives in the memory of a VM.
const MAX_DISK_MIB: u64 = 64 << 10;
/// Most rounds of a repeat.
const MAX_ROUNDS: u32 = 1000;
/// Names become file names and placeholders.
const NAME: &str = "lower-case letters, digits, - and _, at most 32, first a letter";

impl Scenario {
    pub(super) fn check(&self) -> Result<()> {
        check_name(&self.name).context("at name")?;
        ensure!(!self.vms.is_empty(), "at vms: want at least one VM");
        for fragment in &self.kernel {
            check_name(fragment).context("at kernel")?;
        }
        let versions = Versions::read()?;
        if let Some(source) = &self.kernel_source {
            versions.kernel(source).context("at kernel_source")?;
        }
        let programs = GuestPrograms::read()?;
        for (name, vm) in &self.vms {
            check_name(name).and_then(|()| vm.check(&programs)).with_context(|| format!("at vms.{name}"))?;
            self.check_vmm(name, vm, &versions).with_context(|| format!("at vms.{name}.vmm"))?;
        }
        self.check_vvu()?;
        for (name, disk) in &self.disks {
            let checked = check_name(name).and_then(|()| self.known_vm(&disk.vm)).and_then(|()| disk.check());
            checked.with_context(|| format!("at disks.{name}"))?;
        }
        self.check_steps()
    }

    fn known_vm(&self, name: &str) -> Result<()> {
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

    fn check_steps(&self) -> Result<()> {
        ensure!(!self.steps.is_empty(), "at steps: want at least one");
        for (index, step) in self.steps.iter().enumerate() {
            if let Some(repeat) = &step.repeat {
                step.check_repeat(repeat).with_context(|| format!("at steps[{index}].repeat"))?;
            }
        }
        let mut state = State::new(self);
        // What holds for a second round holds for all.
        for placed in self.unrolled(2) {
            state.check(&placed).with_context(|| match placed.round {
                Some(round) => format!("at {}, round {round}", placed.path),
                None => format!("at {}", placed.path),
            })?;
        }
        Ok(())
    }
}

impl Step {
    fn check_repeat(&self, repeat: &Repeat) -> Result<()> {
        ensure!(
            self.action().is_none() && self.vm.is_none() && self.save.is_none(),
            "a repeat has nothing beside it but `check`"
        );
        ensure!((1..=MAX_ROUNDS).contains(&repeat.times), "times: {}: want 1 to {MAX_ROUNDS}", repeat.times);
        ensure!(!repeat.steps.is_empty(), "steps: want at least one");
        let nested = repeat.steps.iter().position(|step| step.repeat.is_some());
        ensure!(nested.is_none(), "steps[{}]: a repeat cannot hold another", nested.unwrap_or_default());
        Ok(())
    }
}

/// What is known before a step: checked by walking through the steps as a run does.
struct State<'a> {
    scenario: &'a Scenario,
    values: Values,
    /// VMs that run.
    vms: BTreeSet<&'a str>,
    /// vvu devices whose proxy runs.
    proxies: BTreeSet<&'a str>,
}

impl<'a> State<'a> {
    fn new(scenario: &'a Scenario) -> Self {
        let vms = scenario.vms.keys().filter(|vm| !scenario.has(vm, Action::Start));
        Self {
            scenario,
            // Known once the scenario runs; here only their names count.
            values: scenario.values(|_| String::new(), |_| DiskFacts::default()),
            vms: vms.map(String::as_str).collect(),
            proxies: scenario.vvu.keys().map(String::as_str).collect(),
        }
    }

    fn check(&mut self, placed: &Placed<'a>) -> Result<()> {
        let Placed { step, check, round, .. } = *placed;
        let Some(action) = step.action() else { bail!("want exactly one of {ACTIONS}") };
        if let Some(check) = check {
            check_name(check).context("check")?;
        }
        match round {
            Some(round) => self.values.set(ROUND, round.to_string()),
            None => self.values.unset(ROUND),
        }
        match &step.vm {
            None => ensure!(action.is_on_host(), "vm: missing: name the VM in which it happens"),
            Some(_) if action.is_on_host() => bail!("vm: this happens on the host, in no VM"),
            Some(vm) => {
                self.scenario.known_vm(vm).context("vm")?;
                self.follow(vm, action)?;
            }
        }
        match action {
            Action::Run(command) | Action::Spawn { command, .. } => {
                self.values.fill(command)?;
            }
            Action::Console(pattern) => {
                self.values.pattern(pattern).context("console")?;
            }
            Action::KillProxy(name) => {
                ensure!(self.proxies.remove(name), "kill_proxy: no proxy of a vvu device {name:?} runs");
            }
            Action::StartProxy(name) => {
                let (name, _) = self
                    .scenario
                    .vvu
                    .get_key_value(name)
                    .with_context(|| format!("start_proxy: no vvu device is called {name:?}"))?;
                ensure!(self.proxies.insert(name), "start_proxy: the proxy of {name:?} runs already");
            }
            Action::Trace(name) => {
                let known = self.scenario.vvu.contains_key(name);
                ensure!(known, "trace: no vvu device is called {name:?}");
                ensure!(step.expect.stdout.is_some(), "trace: want expect.stdout, which is looked for in it");
            }
            _ => {}
        }
        self.check_result(step, action)
    }

    /// Notes what `action` does to the VM `vm`.
    fn follow(&mut self, vm: &'a str, action: Action<'_>) -> Result<()> {
        if action == Action::Start {
            ensure!(self.vms.insert(vm), "start: {vm:?} runs already");
            return Ok(());
        }
        ensure!(self.vms.contains(vm), "vm: {vm:?} does not run: a `start` step must come before");
        if matches!(action, Action::PowerOff | Action::KillVm) {
            self.vms.remove(vm);
        }
        Ok(())
    }

    fn check_result(&mut self, step: &Step, action: Action<'_>) -> Result<()> {
        if let Some(pattern) = &step.expect.stdout {
            let prints = matches!(action, Action::Run(_) | Action::Trace(_));
            ensure!(prints, "expect.stdout: only run and trace have it");
            self.values.pattern(pattern).context("expect.stdout")?;
        }
        let ends = matches!(action, Action::Run(_) | Action::Spawn { .. });
        ensure!(ends || step.expect.exit == 0, "expect.exit: only run and spawn have it");
        if let Some(save) = &step.save {
            let found = step.expect.stdout.is_some() || step.console.is_some();
            ensure!(found, "save: want expect.stdout or console, whose match is saved");
            check_name(save).context("save")?;
            self.values.set(save, "0");
        }
        ensure!(!step.measure || step.save.is_some(), "measure: want `save`, which names the measurement");
        ensure!(step.timeout_s != Some(0), "timeout_s: 0: want 1 or more");
        Ok(())
    }
}

impl VmSpec {
    fn check(&self, programs: &GuestPrograms) -> Result<()> {
        ensure!(
            self.memory_mib >= 64,
            "memory_mib: {}: want 64 or more, the guest kernel needs them",
            self.memory_mib
        );
        ensure!((1..=8).contains(&self.cpus), "cpus: {}: want 1 to 8, as in the guest kernel", self.cpus);
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
            ensure!(
                (1..=MAX_DISK_MIB).contains(&self.size_mib),
                "size_mib: {}: want 1 to {MAX_DISK_MIB}, or `file`",
                self.size_mib
            );
            return Ok(());
        };
        ensure!(self.size_mib == 0, "want one of file and size_mib, not both");
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

fn check_name(name: &str) -> Result<()> {
    let mut chars = name.chars();
    let first = chars.next().is_some_and(|c| c.is_ascii_lowercase());
    let rest = chars.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_');
    ensure!(first && rest && name.len() <= 32, "{name:?} is not a name: want {NAME}");
    Ok(())
}
