//! What a scenario must fulfil beyond its format. Every complaint begins with the JSON path of the place.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};

use crate::image::GuestPrograms;

use super::{Action, Addr, DiskFacts, DiskSpec, Scenario, Step, Values, VmSpec};

/// Most queues of a vvu device that the proxy relays.
const MAX_QUEUES: u32 = 64;
/// Largest generated disk: it lives in the memory of a VM.
const MAX_DISK_MIB: u64 = 64 << 10;
/// Names become file names and placeholders.
const NAME: &str = "lower-case letters, digits, - and _, at most 32, first a letter";

impl Scenario {
    pub(super) fn check(&self) -> Result<()> {
        check_name(&self.name).context("at name")?;
        ensure!(!self.vms.is_empty(), "at vms: want at least one VM");
        for fragment in &self.kernel {
            check_name(fragment).context("at kernel")?;
        }
        let programs = GuestPrograms::read()?;
        for (name, vm) in &self.vms {
            check_name(name).and_then(|()| vm.check(&programs)).with_context(|| format!("at vms.{name}"))?;
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
            ensure!(
                (1..=MAX_QUEUES).contains(&vvu.queues),
                "at vvu.{name}.queues: {}: want 1 to {MAX_QUEUES}",
                vvu.queues
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
        // Known once the scenario runs; here only their names count.
        let mut values = self.values(|_| String::new(), |_| DiskFacts::default());
        ensure!(!self.steps.is_empty(), "at steps: want at least one");
        let mut started = BTreeSet::new();
        for (index, step) in self.steps.iter().enumerate() {
            self.check_step(step, &mut values, &mut started).with_context(|| format!("at steps[{index}]"))?;
        }
        Ok(())
    }

    fn check_step<'a>(
        &self,
        step: &'a Step,
        values: &mut Values,
        started: &mut BTreeSet<&'a str>,
    ) -> Result<()> {
        self.known_vm(&step.vm).context("vm")?;
        let Some(action) = step.action() else {
            bail!("want exactly one of start, run, spawn, kill, console and power_off");
        };
        if let Some(check) = &step.check {
            check_name(check).context("check")?;
        }
        match action {
            Action::Start => ensure!(started.insert(&step.vm), "{:?} was started before", step.vm),
            Action::Run(command) | Action::Spawn { command, .. } => {
                values.fill(command)?;
            }
            Action::Console(pattern) => {
                values.pattern(pattern).context("console")?;
            }
            Action::Kill(_) | Action::PowerOff => {}
        }
        if let Some(pattern) = &step.expect.stdout {
            ensure!(matches!(action, Action::Run(_)), "expect.stdout: only a run has it");
            values.pattern(pattern).context("expect.stdout")?;
        }
        if let Some(save) = &step.save {
            let found = step.expect.stdout.is_some() || step.console.is_some();
            ensure!(found, "save: want expect.stdout or console, whose match is saved");
            check_name(save).context("save")?;
            values.set(save, "0");
        }
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
