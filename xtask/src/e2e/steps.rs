//! Carries out a scenario's steps on its running VMs.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail};
use vvu_init::protocol::End;

use crate::interrupt;
use crate::progress::{Progress, Stage};
use crate::report::{Check, CheckResult};
use crate::scenario::{Action, Scenario, Step, Values};
use crate::vm::proxy::Proxy;
use crate::vm::{Vm, ending, printed};

/// The check whose time is in the report's sums.
const VDA_CHECK: &str = "vda-appears";

/// Starts the VM of a name.
pub(crate) type Launch<'a> = Box<dyn Fn(&str) -> Result<Vm> + 'a>;

/// Everything that runs.
pub(crate) struct Running<'a> {
    /// The VMs by name; one that was powered off is gone.
    pub(crate) vms: BTreeMap<String, Vm>,
    /// The proxies.
    pub(crate) proxies: Vec<Proxy>,
    /// Starts a VM.
    pub(crate) launch: Launch<'a>,
    /// When the first VM was started.
    pub(crate) launched: Option<Instant>,
    /// The placeholders' values.
    pub(crate) values: Values,
    /// How much longer than at native speed things may take.
    pub(crate) slowness: u32,
}

/// What came of the steps.
#[derive(Debug, Default)]
pub(crate) struct Done {
    /// One for each check of the scenario.
    pub(crate) checks: Vec<Check>,
    /// From the launch of the first VM to the check `vda-appears`, in seconds.
    pub(crate) launch_to_vda: Option<f64>,
    /// Why a step that belongs to no check failed.
    pub(crate) error: Option<Error>,
}

/// Carries out all steps until one fails.
pub(crate) fn carry_out(scenario: &Scenario, running: &mut Running<'_>, progress: &Progress) -> Done {
    let mut done = Done { checks: planned(scenario), ..Done::default() };
    let mut stage: Option<(&str, Stage)> = None;
    for (index, step) in scenario.steps.iter().enumerate() {
        let name = step.check.as_deref().unwrap_or("boot");
        stage = match stage {
            Some((last, stage)) if last == name => Some((last, stage)),
            last => {
                if let Some((last, stage)) = last {
                    stage.done(evidence_of(&done.checks, last));
                }
                Some((name, progress.stage(name)))
            }
        };
        if let (Some((_, stage)), Some(action)) = (&stage, step.action()) {
            let text = action.to_string();
            stage.update(format!("{}: {}", step.vm, running.values.fill(&text).unwrap_or(text)));
        }
        let result = running.step(step).with_context(|| format!("steps[{index}]"));
        if name == VDA_CHECK && result.is_ok() {
            done.launch_to_vda = running.launched.map(|launched| launched.elapsed().as_secs_f64());
        }
        let last_of_check = scenario.steps[index + 1..].iter().all(|later| later.check != step.check);
        if let Err(error) = record(&mut done.checks, step, last_of_check, result) {
            done.error = Some(error);
        }
        let failed = done.checks.iter().any(|check| check.result == CheckResult::Fail);
        if failed || done.error.is_some() {
            // Dropping the stage says that it failed.
            return done;
        }
    }
    if let Some((last, stage)) = stage {
        stage.done(evidence_of(&done.checks, last));
    }
    done
}

/// The scenario's checks in order, none of them made yet.
fn planned(scenario: &Scenario) -> Vec<Check> {
    let mut checks: Vec<Check> = Vec::new();
    for name in scenario.steps.iter().filter_map(|step| step.check.as_ref()) {
        if checks.iter().all(|check| check.name != *name) {
            checks.push(Check { name: name.clone(), ..Check::default() });
        }
    }
    checks
}

/// Writes a step's result into its check. A failed step without a check comes back as an error.
fn record(checks: &mut [Check], step: &Step, last: bool, result: Result<String>) -> Result<()> {
    let Some(check) = checks.iter_mut().find(|check| Some(&check.name) == step.check.as_ref()) else {
        return result.map(drop);
    };
    match result {
        Ok(evidence) => {
            if !evidence.is_empty() {
                let separator = if check.evidence.is_empty() { "" } else { "\n" };
                check.evidence.push_str(separator);
                check.evidence.push_str(&evidence);
            }
            if last {
                check.result = CheckResult::Pass;
            }
        }
        Err(error) => {
            check.result = CheckResult::Fail;
            check.evidence = format!("{error:#}");
        }
    }
    Ok(())
}

fn evidence_of(checks: &[Check], name: &str) -> String {
    let evidence = checks.iter().find(|check| check.name == name).map_or("", |check| check.evidence.as_str());
    evidence.lines().next_back().unwrap_or_default().chars().take(80).collect()
}

impl Running<'_> {
    /// Carries out one step and returns the evidence.
    fn step(&mut self, step: &Step) -> Result<String> {
        interrupt::check()?;
        let action = step.action().context("a checked step has one action")?;
        if action == Action::Start {
            self.start(&step.vm)?;
            return Ok(String::new());
        }
        // Taken out, so that the others can be looked at while this one is waited for.
        let mut vm = self.vms.remove(&step.vm).with_context(|| format!("the VM {} does not run", step.vm))?;
        let result = self.act(&mut vm, step, action);
        if action != Action::PowerOff || result.is_err() {
            self.vms.insert(step.vm.clone(), vm);
        }
        result
    }

    /// Starts a VM.
    pub(crate) fn start(&mut self, name: &str) -> Result<()> {
        let vm = (self.launch)(name)?;
        self.launched.get_or_insert(vm.launched());
        self.vms.insert(name.to_owned(), vm);
        Ok(())
    }

    fn act(&mut self, vm: &mut Vm, step: &Step, action: Action<'_>) -> Result<String> {
        let seconds = step.timeout_s.unwrap_or(default_timeout(action)).saturating_mul(self.slowness.into());
        let limit = Duration::from_secs(seconds.min(86_400));
        let deadline = Instant::now() + limit;
        let Self { vms, proxies, values, .. } = self;
        let mut look = || {
            interrupt::check()?;
            proxies.iter_mut().try_for_each(Proxy::look)?;
            vms.values_mut().try_for_each(Vm::look)
        };
        if !matches!(action, Action::Console(_)) {
            vm.ready(deadline, &mut look)?;
        }
        match action {
            Action::Start => bail!("a start has nothing to wait for"),
            Action::Run(command) => {
                let command = values.fill(command)?;
                let exit = vm.run(&command, limit, &mut look)?;
                if exit.end != End::Code(step.expect.exit) {
                    bail!(
                        "{}: `{command}` ended with {}, want exit code {}{}",
                        vm.name(),
                        ending(exit.end),
                        step.expect.exit,
                        printed(&exit.output)
                    );
                }
                let stdout = exit.output.stdout.trim_end();
                if let Some(pattern) = &step.expect.stdout {
                    let pattern = values.pattern(pattern)?;
                    let Some(found) = pattern.captures(stdout) else {
                        bail!(
                            "{}: `{command}` printed nothing that matches /{pattern}/{}",
                            vm.name(),
                            printed(&exit.output)
                        );
                    };
                    if let Some(name) = &step.save {
                        let value = found.get(1).or_else(|| found.get(0)).map_or("", |value| value.as_str());
                        values.set(name, value);
                    }
                }
                Ok(if stdout.is_empty() {
                    format!("`{command}` gave exit code {}", step.expect.exit)
                } else {
                    stdout.to_owned()
                })
            }
            Action::Spawn { name, command } => {
                let command = values.fill(command)?;
                vm.spawn(name, &command, deadline, &mut look)?;
                Ok(String::new())
            }
            Action::Kill(name) => {
                vm.kill(name, deadline, &mut look)?;
                Ok(format!("sent SIGTERM to {name}"))
            }
            Action::Console(pattern) => {
                let found = vm.wait_for(&values.pattern(pattern)?, deadline, &mut look)?;
                if let Some(name) = &step.save {
                    values.set(name, found.value);
                }
                Ok(found.line)
            }
            Action::PowerOff => {
                vm.power_off(deadline, &mut look)?;
                Ok(format!("{} powered off, QEMU ended with exit code 0", vm.name()))
            }
        }
    }
}

/// Seconds allowed at native speed unless the scenario says otherwise.
fn default_timeout(action: Action<'_>) -> u64 {
    match action {
        Action::Start | Action::Spawn { .. } | Action::Kill(_) => 10,
        Action::Run(_) | Action::PowerOff => 20,
        Action::Console(_) => 30,
    }
}
