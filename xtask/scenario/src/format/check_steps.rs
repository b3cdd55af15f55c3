//! Checks the steps of a scenario beyond their format. Every message begins with the JSON path of the place.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};

use super::check::check_name;
use super::placed::Placed;
use super::scenario::{DiskFacts, ROUND, Scenario, VvuFacts};
use super::step::{ConsoleStep, KillStep, RepeatStep, RunStep, SpawnStep, Step, VmStep, WaitStep};
use super::step_host::{AttachStep, DetachStep, ExpectedReply, ProxyStep, QmpStep, TraceStep};
use super::text::Values;

/// Most rounds of a repeat.
const MAX_ROUNDS: u32 = 1000;

impl Scenario {
    pub(super) fn check_steps(&self) -> Result<()> {
        ensure!(!self.steps.is_empty(), "at steps: want at least one");
        for (index, step) in self.steps.iter().enumerate() {
            if let Step::Repeat(repeat) = step {
                check_repeat(repeat).with_context(|| format!("at steps[{index}].repeat"))?;
            }
        }
        let mut state = State::new(self)?;
        // What holds for a second round holds for all.
        for placed in self.unrolled(2) {
            state.check(&placed).with_context(|| format!("at {}", placed.place()))?;
        }
        Ok(())
    }
}

fn check_repeat(repeat: &RepeatStep) -> Result<()> {
    ensure!((1..=MAX_ROUNDS).contains(&repeat.times), "times: {}: want 1 to {MAX_ROUNDS}", repeat.times);
    ensure!(!repeat.steps.is_empty(), "steps: want at least one");
    let nested = repeat.steps.iter().position(|step| matches!(step, Step::Repeat(_)));
    ensure!(nested.is_none(), "steps[{}]: a repeat cannot hold another", nested.unwrap_or_default());
    Ok(())
}

/// The state before a step. The check walks through the steps as a run does.
struct State<'a> {
    scenario: &'a Scenario,
    values: Values,
    /// VMs that run.
    vms: BTreeSet<&'a str>,
    /// vvu devices whose proxy runs.
    proxies: BTreeSet<&'a str>,
    /// Spawned commands for whose end no step has waited, by VM and name.
    spawned: BTreeSet<(&'a str, &'a str)>,
    /// vvu devices that a step has attached to their sibling VM.
    attached: BTreeSet<&'a str>,
}

impl<'a> State<'a> {
    fn new(scenario: &'a Scenario) -> Result<Self> {
        let vms = scenario.vms.keys().filter(|vm| !scenario.starts(vm));
        Ok(Self {
            scenario,
            // The values are known once the scenario runs; here only their names count.
            values: scenario.values(|_| VvuFacts::default(), |_| DiskFacts::default())?,
            vms: vms.map(String::as_str).collect(),
            proxies: scenario.vvu.keys().map(String::as_str).collect(),
            spawned: BTreeSet::new(),
            attached: BTreeSet::new(),
        })
    }

    fn check(&mut self, placed: &Placed<'a>) -> Result<()> {
        if let Some(check) = placed.check {
            check_name(check).context("check")?;
        }
        match placed.round {
            Some(round) => self.values.set(ROUND, round.to_string()),
            None => self.values.unset(ROUND),
        }
        let step = placed.step;
        if let Some(vm) = step.vm() {
            self.scenario.known_vm(vm).context("vm")?;
            let starts = matches!(step, Step::Start(_));
            ensure!(
                starts || self.vms.contains(vm),
                "vm: {vm:?} does not run: a `start` step must come before"
            );
        }
        ensure!(!step.has_no_time(), "timeout_s: 0: want 1 or more");
        match step {
            Step::Start(VmStep { vm, .. }) => {
                ensure!(self.vms.insert(vm), "start: {vm:?} runs already");
                self.proxies_run(vm)?;
            }
            Step::KillVm(VmStep { vm, .. }) => self.ended(vm),
            Step::PowerOff(power_off) => self.ended(&power_off.vm),
            Step::Attach(AttachStep { vvu, .. }) => {
                self.sibling_runs(vvu)?;
                ensure!(self.attached.insert(vvu), "vvu: {vvu:?} is attached already");
            }
            Step::Detach(DetachStep { vvu, .. }) => {
                self.sibling_runs(vvu)?;
                ensure!(
                    self.attached.remove(vvu.as_str()),
                    "vvu: {vvu:?} is not attached: an `attach` step must come before"
                );
            }
            Step::Qmp(qmp) => self.check_qmp(qmp)?,
            Step::Run(RunStep { command, expect, save, measure, .. }) => {
                self.values.fill(command).context("command")?;
                self.check_pattern("expect.stdout", expect.stdout.as_deref(), save.as_deref(), *measure)?;
            }
            Step::Spawn(SpawnStep { vm, name, command, .. }) => {
                self.values.fill(command).context("command")?;
                ensure!(!name.is_empty(), "name: want a name for `kill` and `wait`");
                self.spawned.insert((vm, name));
            }
            Step::Kill(KillStep { vm, name, .. }) | Step::Wait(WaitStep { vm, name, .. }) => {
                ensure!(
                    self.spawned.remove(&(vm.as_str(), name.as_str())),
                    "name: no spawned command {name:?} runs in {vm:?}: a `spawn` step must come before"
                );
            }
            Step::Reboot(reboot) => self.spawned.retain(|(vm, _)| *vm != reboot.vm),
            Step::Console(ConsoleStep { line, save, measure, .. }) => {
                self.check_pattern("line", Some(line), save.as_deref(), *measure)?;
            }
            Step::Trace(trace) => self.check_trace(trace)?,
            Step::Tamper(tamper) => self.known_vvu(&tamper.vvu)?,
            Step::KillProxy(ProxyStep { vvu, .. }) => {
                self.known_vvu(vvu)?;
                ensure!(self.proxies.remove(vvu.as_str()), "vvu: the proxy of {vvu:?} does not run");
            }
            Step::StartProxy(ProxyStep { vvu, .. }) => {
                self.known_vvu(vvu)?;
                ensure!(self.proxies.insert(vvu), "vvu: the proxy of {vvu:?} runs already");
            }
            Step::KillWorker(ProxyStep { vvu, .. }) | Step::UpgradeProxy(ProxyStep { vvu, .. }) => {
                self.known_vvu(vvu)?;
                ensure!(self.proxies.contains(vvu.as_str()), "vvu: the proxy of {vvu:?} does not run");
                let supervised = self.scenario.vvu.get(vvu).is_some_and(|vvu| vvu.supervised);
                ensure!(supervised, "vvu: {vvu:?} is not `supervised`");
            }
            Step::Repeat(_) => {}
        }
        Ok(())
    }

    /// Notes that the VM `vm` is gone, and what was attached to it.
    fn ended(&mut self, vm: &str) {
        self.vms.remove(vm);
        self.spawned.retain(|(of, _)| *of != vm);
        for (vvu, _) in self.scenario.vvu_of_sibling(vm) {
            self.attached.remove(vvu);
        }
    }

    /// Checks that the proxies of a VM that starts run: its VMM would wait for them, or end.
    fn proxies_run(&self, vm: &str) -> Result<()> {
        let of_sibling = self.scenario.vvu_of_sibling(vm).filter(|(vvu, _)| !self.scenario.attaches(vvu));
        for (vvu, _) in self.scenario.vvu_of_device(vm).chain(of_sibling) {
            ensure!(
                self.proxies.contains(vvu),
                "start: the proxy of {vvu:?}, to which {vm:?} connects, does not run: a `start_proxy` step must come before"
            );
        }
        Ok(())
    }

    fn sibling_runs(&self, vvu: &str) -> Result<()> {
        self.known_vvu(vvu)?;
        let sibling = self.scenario.vvu.get(vvu).map_or("", |vvu| &vvu.sibling_vm);
        ensure!(
            self.vms.contains(sibling),
            "vvu: the sibling VM of {vvu:?}, {sibling:?}, does not run: a `start` step must come before"
        );
        Ok(())
    }

    fn check_qmp(&mut self, qmp: &QmpStep) -> Result<()> {
        ensure!(!qmp.execute.is_empty(), "execute: want the name of a command");
        for (name, argument) in &qmp.arguments {
            self.values.fill_json(argument).with_context(|| format!("arguments.{name}"))?;
        }
        let ExpectedReply { result, error } = &qmp.expect;
        ensure!(result.is_none() || error.is_none(), "expect: want one of `result` and `error`, not both");
        self.check_pattern("expect.result", result.as_deref(), None, false)?;
        self.check_pattern("expect.error", error.as_deref(), None, false)
    }

    fn check_trace(&mut self, trace: &TraceStep) -> Result<()> {
        self.known_vvu(&trace.vvu)?;
        let wants = !trace.expect.is_empty() || trace.matches.is_some();
        ensure!(wants, "want `expect`, `matches` or both: what is looked for in the trace");
        for (index, message) in trace.expect.iter().enumerate() {
            message.check().with_context(|| format!("expect[{index}]"))?;
        }
        self.check_pattern("matches", trace.matches.as_deref(), trace.save.as_deref(), trace.measure)
    }

    /// Checks the regular expression at `key` and what is to be kept of its match.
    fn check_pattern(
        &mut self,
        key: &str,
        pattern: Option<&str>,
        save: Option<&str>,
        measure: bool,
    ) -> Result<()> {
        if let Some(pattern) = pattern {
            self.values.pattern(pattern).with_context(|| key.to_owned())?;
        }
        ensure!(!measure || save.is_some(), "measure: want `save`, which names the measurement");
        if let Some(save) = save {
            ensure!(pattern.is_some(), "save: want `{key}`, whose match is saved");
            check_name(save).context("save")?;
            self.values.set(save, "0");
        }
        Ok(())
    }

    fn known_vvu(&self, name: &str) -> Result<()> {
        let known: Vec<_> = self.scenario.vvu.keys().map(String::as_str).collect();
        ensure!(
            known.contains(&name),
            "vvu: no vvu device is called {name:?}: `vvu` has {}",
            known.join(", ")
        );
        Ok(())
    }
}
