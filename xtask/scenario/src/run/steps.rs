//! Carries out the steps of a scenario on its running VMs and proxies.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail, ensure};
use regex::Regex;
use serde_json::Value;
use vvu_init::protocol::{End, Exit};

use crate::format::{
    ExpectedReply, Milestone, Placed, QmpStep, ROUND, RunStep, Scenario, Step, TraceStep, Values,
    find_in_order,
};
use crate::report::{Check, CheckResult};
use vvu_process::interrupt;
use vvu_process::progress::{Progress, Stage};
use vvu_testvm::{Attack, Process, Reply, Vm, WorkerSignal, ending, printed};

/// The measurement that counts kills and reboots.
const FAULTS: &str = "faults_injected";

/// Name of the process that is the worker of a supervised proxy.
const WORKER: &str = "vvu-worker";
/// How long a supervised proxy may take at native speed to have another worker.
const WORKER_LIMIT: Duration = Duration::from_secs(10);

/// Starts or reads something by its name in the scenario.
pub(super) type Launch<'a, T> = Box<dyn Fn(&str) -> Result<T> + 'a>;

/// Attaches or detaches the front-end of a vvu device, given the running VMs; returns the evidence.
pub(super) type Attach<'a> = Box<dyn Fn(&BTreeMap<String, Vm>, &str, Instant) -> Result<String> + 'a>;

/// Attacks a device VM through the sibling memory file of a vvu device; returns the evidence.
pub(super) type Tamper<'a> = Box<dyn Fn(&str, Attack) -> Result<String> + 'a>;

/// Numbers for the report, by name.
pub(super) type Measurements = BTreeMap<String, f64>;

/// The running parts of a scenario, and what is known so far.
pub(super) struct Running<'a> {
    /// The VMs by name; one that has ended is gone.
    pub vms: BTreeMap<String, Vm>,
    /// The proxies by vvu device; one that was killed is gone.
    pub proxies: BTreeMap<String, Process>,
    /// Starts a VM.
    pub launch: Launch<'a, Vm>,
    /// Starts the proxy of a vvu device and waits until it listens.
    pub launch_proxy: Launch<'a, Process>,
    /// Attaches the front-end of a vvu device to its sibling VM.
    pub attach: Attach<'a>,
    /// Detaches it.
    pub detach: Attach<'a>,
    /// Attacks a device VM through the sibling memory file of a vvu device; returns what came of it.
    pub tamper: Tamper<'a>,
    /// Reads the messages of a vvu device so far.
    pub trace: Launch<'a, String>,
    /// When the first VM was launched.
    pub launched: Option<Instant>,
    /// The values of the placeholders.
    pub values: Values,
    /// The measurements so far.
    pub measurements: Measurements,
    /// Factor by which time limits are longer than at native speed.
    pub slowness: u32,
}

/// The outcome of the steps.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// The checks of the scenario, in the order of their first steps.
    pub checks: Vec<Check>,
    /// From the launch of the first VM to the milestone `disk-visible`, in seconds.
    pub launch_to_vda: Option<f64>,
    /// The failure of a step that belongs to no check, or of `before_end`.
    pub error: Option<Error>,
}

/// Carries out the steps until one fails. Calls `before_end` before the last steps if these only power VMs off, else after
/// all steps.
pub(super) fn carry_out(
    scenario: &Scenario,
    running: &mut Running<'_>,
    progress: &Progress,
    before_end: &mut dyn FnMut(&mut Running<'_>) -> Result<()>,
) -> Done {
    let steps = scenario.unrolled(u32::MAX);
    let is_work = |placed: &Placed<'_>| !matches!(placed.step, Step::PowerOff(_));
    let end = steps.iter().rposition(is_work).map_or(0, |last| last + 1);
    let mut done = Done { checks: planned(&steps), ..Done::default() };
    let mut stage: Option<(&str, Stage)> = None;
    for (index, placed) in steps.iter().enumerate() {
        if index == end {
            if let Some((last, stage)) = stage.take() {
                stage.done(evidence_of(&done.checks, last));
            }
            done.error = before_end(running).err();
            if done.error.is_some() {
                return done;
            }
        }
        let name = placed.check.unwrap_or("boot");
        stage = match stage {
            Some((last, stage)) if last == name => Some((last, stage)),
            last => {
                if let Some((last, stage)) = last {
                    stage.done(evidence_of(&done.checks, last));
                }
                Some((name, progress.stage(name)))
            }
        };
        running.enter(placed.round);
        if let Some((_, stage)) = &stage {
            let text = placed.step.to_string();
            let place = placed.step.vm().unwrap_or("host");
            stage.update(format!("{place}: {}", running.values.fill(&text).unwrap_or(text)));
        }
        let result = running.step(placed.step).with_context(|| placed.place());
        if placed.step.milestone() == Some(Milestone::DiskVisible) && result.is_ok() {
            done.launch_to_vda = running.launched.map(|launched| launched.elapsed().as_secs_f64());
        }
        let last_of_check = steps[index + 1..].iter().all(|later| later.check != placed.check);
        if let Err(error) = record(&mut done.checks, placed.check, last_of_check, result) {
            done.error = Some(error);
        }
        let failed = done.checks.iter().any(|check| check.result == CheckResult::Fail);
        if failed || done.error.is_some() {
            // Dropping the stage marks it as failed.
            return done;
        }
    }
    if let Some((last, stage)) = stage {
        stage.done(evidence_of(&done.checks, last));
    }
    if end == steps.len() {
        done.error = before_end(running).err();
    }
    done
}

/// The checks of the scenario, each not reached yet.
fn planned(steps: &[Placed<'_>]) -> Vec<Check> {
    let mut checks: Vec<Check> = Vec::new();
    for name in steps.iter().filter_map(|placed| placed.check) {
        if checks.iter().all(|check| check.name != name) {
            checks.push(Check { name: name.to_owned(), ..Check::default() });
        }
    }
    checks
}

/// Adds a step's result to its check; `last` says that it is the check's last step. Returns the error of a step that
/// belongs to no check.
fn record(checks: &mut [Check], name: Option<&str>, last: bool, result: Result<String>) -> Result<()> {
    let Some(check) = checks.iter_mut().find(|check| Some(check.name.as_str()) == name) else {
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
    /// Sets the placeholder for the round of a repeat; removes it outside of one.
    fn enter(&mut self, round: Option<u32>) {
        match round {
            Some(round) => self.values.set(ROUND, round.to_string()),
            None => self.values.unset(ROUND),
        }
    }

    /// Carries out one step and returns the evidence.
    fn step(&mut self, step: &Step) -> Result<String> {
        interrupt::check()?;
        let evidence = match step {
            Step::Start(start) => self.start(&start.vm).map(|()| String::new()),
            Step::KillProxy(proxy) => self.kill_proxy(&proxy.vvu),
            Step::StartProxy(proxy) => self.start_proxy(&proxy.vvu),
            Step::KillWorker(proxy) => self.replace_worker(&proxy.vvu, WorkerSignal::Kill),
            Step::UpgradeProxy(proxy) => self.replace_worker(&proxy.vvu, WorkerSignal::Upgrade),
            Step::Trace(trace) => self.look_at(trace),
            Step::Tamper(tamper) => (self.tamper)(&tamper.vvu, tamper.attack),
            Step::Attach(attach) => (self.attach)(&self.vms, &attach.vvu, self.deadline(step)),
            Step::Detach(detach) => (self.detach)(&self.vms, &detach.vvu, self.deadline(step)),
            step => self.act_in_vm(step),
        }?;
        if step.is_fault() {
            *self.measurements.entry(FAULTS.to_owned()).or_default() += 1.0;
        }
        Ok(evidence)
    }

    /// Starts a VM.
    pub(super) fn start(&mut self, name: &str) -> Result<()> {
        let vm = (self.launch)(name)?;
        self.launched.get_or_insert(vm.launched());
        self.vms.insert(name.to_owned(), vm);
        Ok(())
    }

    fn kill_proxy(&mut self, name: &str) -> Result<String> {
        self.proxies.remove(name).with_context(|| format!("the proxy {name} does not run"))?.kill();
        Ok(format!("the proxy {name} was killed"))
    }

    fn start_proxy(&mut self, name: &str) -> Result<String> {
        self.proxies.insert(name.to_owned(), (self.launch_proxy)(name)?);
        Ok(format!("the proxy {name} runs again"))
    }

    fn replace_worker(&mut self, name: &str, signal: WorkerSignal) -> Result<String> {
        let proxy = self.proxies.get(name).with_context(|| format!("the proxy {name} does not run"))?;
        let deadline = Instant::now() + WORKER_LIMIT.saturating_mul(self.slowness);
        proxy.replace_worker(WORKER, signal, deadline)?;
        Ok(format!("the proxy {name} has another worker"))
    }

    /// Looks at the messages of a vvu device.
    fn look_at(&mut self, step: &TraceStep) -> Result<String> {
        let trace = (self.trace)(&step.vvu)?;
        let mut evidence = find_in_order(&step.expect, &trace)
            .with_context(|| format!("messages of {}", step.vvu))?
            .to_owned();
        if let Some(pattern) = &step.matches {
            let (found, line) = shown(&step.vvu, &trace, &self.values.pattern(pattern)?)?;
            self.save(step.save.as_deref(), step.measure, found)?;
            evidence = line;
        }
        Ok(evidence)
    }

    fn act_in_vm(&mut self, step: &Step) -> Result<String> {
        let name = step.vm().with_context(|| format!("{step} has no VM"))?;
        let vm = self.vms.remove(name).with_context(|| format!("the VM {name} does not run"))?;
        if matches!(step, Step::KillVm(_)) {
            vm.kill_vmm();
            return Ok(format!("the VM {name} was killed"));
        }
        let result = self.act(&vm, step);
        if !matches!(step, Step::PowerOff(_)) || result.is_err() {
            self.vms.insert(name.to_owned(), vm);
        }
        result
    }

    fn act(&mut self, vm: &Vm, step: &Step) -> Result<String> {
        let limit = self.limit(step);
        let deadline = Instant::now() + limit;
        let values = &self.values;
        if !matches!(step, Step::Console(_) | Step::Qmp(_)) {
            vm.ready(deadline)?;
        }
        Ok(match step {
            Step::Run(step) => {
                let command = values.fill(&step.command)?;
                let exit = vm.exec(&command, Instant::now() + limit)?;
                let (found, evidence) = judge(vm.name(), &command, &exit, step, values)?;
                self.save(step.save.as_deref(), step.measure, found)?;
                evidence
            }
            Step::Spawn(step) => {
                let command = values.fill(&step.command)?;
                vm.spawn(&step.name, &command, step.expect.exit, deadline)?;
                String::new()
            }
            Step::Kill(step) => {
                let end = vm.kill(&step.name, step.signal.number(), deadline)?;
                format!("{} ended with {} after {}", step.name, ending(end), step.signal)
            }
            Step::Wait(step) => {
                let end = vm.wait_for_end(&step.name, deadline)?;
                format!("{} ended with {}", step.name, ending(end))
            }
            Step::Console(step) => {
                let pattern = values.pattern(&step.line)?;
                let found = match command_of(&step.line) {
                    Some(name) => vm.wait_for_line_of(name, &pattern, deadline)?,
                    None => vm.wait_for(&pattern, deadline)?,
                };
                self.save(step.save.as_deref(), step.measure, Some(found.value))?;
                found.line
            }
            Step::Qmp(step) => ask(vm, step, values, deadline)?,
            Step::Reboot(_) => {
                vm.reboot(deadline)?;
                format!("{} rebooted", vm.name())
            }
            Step::PowerOff(_) => {
                vm.power_off(deadline)?;
                format!("{} powered off, QEMU ended with exit code 0", vm.name())
            }
            Step::Start(_)
            | Step::KillVm(_)
            | Step::KillProxy(_)
            | Step::StartProxy(_)
            | Step::Attach(_)
            | Step::Detach(_)
            | Step::KillWorker(_)
            | Step::UpgradeProxy(_)
            | Step::Tamper(_)
            | Step::Trace(_)
            | Step::Repeat(_) => bail!("{step} is not done inside a VM"),
        })
    }

    /// How long a step may take.
    fn limit(&self, step: &Step) -> Duration {
        let seconds = step.timeout_s().saturating_mul(self.slowness.into());
        Duration::from_secs(seconds.min(86_400))
    }

    fn deadline(&self, step: &Step) -> Instant {
        Instant::now() + self.limit(step)
    }

    /// Saves what a step found as the placeholder `name`, and adds it to the measurement of that name with `measure`.
    fn save(&mut self, name: Option<&str>, measure: bool, found: Option<String>) -> Result<()> {
        let (Some(name), Some(value)) = (name, found) else { return Ok(()) };
        if measure {
            let number: f64 =
                value.trim().parse().with_context(|| format!("{name} is no number: {value:?}"))?;
            *self.measurements.entry(name.to_owned()).or_default() += number;
        }
        self.values.set(name, value);
        Ok(())
    }
}

/// The spawned command whose lines are the only ones that a pattern can match, since it begins with `^\[NAME\]`.
fn command_of(pattern: &str) -> Option<&str> {
    let (name, _) = pattern.strip_prefix(r"^\[")?.split_once(r"\]")?;
    name.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_".contains(letter)).then_some(name)
}

/// Finds `pattern` in a trace. Returns the value to save and the first line of the match.
fn shown(name: &str, trace: &str, pattern: &Regex) -> Result<(Option<String>, String)> {
    let Some(found) = pattern.captures(trace) else {
        bail!(
            "no messages of {name} match /{pattern}/ among {}; `vvu trace` prints them",
            trace.lines().count()
        );
    };
    let value = found.get(1).or_else(|| found.get(0)).map(|found| found.as_str().to_owned());
    let line = found.get(0).and_then(|found| found.as_str().lines().next()).unwrap_or_default().to_owned();
    Ok((value, line))
}

/// Sends a QMP command and compares the answer with what the step expects. Returns the evidence.
fn ask(vm: &Vm, step: &QmpStep, values: &Values, deadline: Instant) -> Result<String> {
    let arguments = values.fill_json(&Value::Object(step.arguments.clone()))?;
    let reply = vm.qmp(&step.execute, &arguments, deadline)?;
    let evidence = answered(step, &reply, values)?;
    if let Some(event) = &step.event {
        return Ok(vm.qmp_event(event, &Value::Null, deadline)?.to_string());
    }
    Ok(evidence)
}

/// Compares the answer to a QMP command with what the step expects. Returns the evidence.
fn answered(step: &QmpStep, reply: &Reply, values: &Values) -> Result<String> {
    let QmpStep { execute, expect: ExpectedReply { result, error }, .. } = step;
    let (pattern, text) = match (reply, error) {
        (Reply::Return(value), None) => (result, value.to_string()),
        (Reply::Error(text), Some(_)) => (error, text.clone()),
        (Reply::Return(value), Some(_)) => bail!("{execute} returned {value}, want an error"),
        (Reply::Error(text), None) => bail!("{execute} failed: {text}"),
    };
    if let Some(pattern) = pattern {
        let pattern = values.pattern(pattern)?;
        ensure!(pattern.is_match(&text), "{execute} gave {text}, which /{pattern}/ does not match");
    }
    Ok(format!("{execute}: {text}"))
}

/// Compares a command's exit code and output with what the step expects. Returns the value to save and the evidence.
fn judge(
    vm: &str,
    command: &str,
    exit: &Exit,
    step: &RunStep,
    values: &Values,
) -> Result<(Option<String>, String)> {
    let want = step.expect.exit;
    if exit.end != End::Code(want) {
        let printed = printed(&exit.output);
        bail!("{vm}: `{command}` ended with {}, want exit code {want}{printed}", ending(exit.end));
    }
    let stdout = exit.output.stdout.trim_end();
    let mut value = None;
    if let Some(pattern) = &step.expect.stdout {
        let pattern = values.pattern(pattern)?;
        let Some(found) = pattern.captures(stdout) else {
            let printed = printed(&exit.output);
            bail!("{vm}: `{command}` printed nothing that matches /{pattern}/{printed}");
        };
        value = found.get(1).or_else(|| found.get(0)).map(|found| found.as_str().to_owned());
    }
    let evidence =
        if stdout.is_empty() { format!("`{command}` gave exit code {want}") } else { stdout.to_owned() };
    Ok((value, evidence))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_shows_a_match_across_its_lines_or_says_that_it_does_not() {
        let trace = "{\"size\":1}\n{\"size\":2}\n";
        let look = |pattern: &str| shown("vvu", trace, &Values::default().pattern(pattern).expect("regular"));
        let found = look("\"size\":1(?s:.*)\"size\":(2)").expect("shown");
        assert_eq!(found, (Some("2".to_owned()), "\"size\":1}".to_owned()));
        let error = look("\"size\":3").expect_err("not there").to_string();
        assert!(error.contains("no messages of vvu match") && error.contains("among 2"), "{error}");
    }

    #[test]
    fn a_pattern_tells_whose_line_it_is_for() {
        assert_eq!(command_of(r"^\[back-end_1\] .*ready"), Some("back-end_1"));
        for other in [r"\[backend\] ready", r"^\[(a|b)\] x", r"^\[vda", r"^\[ *\d+\.\d+\] virtio", "ready"] {
            assert_eq!(command_of(other), None, "{other}");
        }
    }

    #[test]
    fn an_answer_of_qmp_must_be_the_one_that_the_step_expects() {
        let answer = |expect: &str, reply: Reply| {
            let step = format!(r#"{{"vm": "sibling", "execute": "x", "expect": {expect}}}"#);
            let step: QmpStep = serde_json::from_str(&step).expect("a step");
            answered(&step, &reply, &Values::default()).map_err(|error| error.to_string())
        };
        let returned = || Reply::Return(serde_json::json!({"slots": 4}));
        let failed = || Reply::Error("no such slot".to_owned());
        assert_eq!(answer("{}", returned()).expect("as wanted"), r#"x: {"slots":4}"#);
        assert_eq!(answer(r#"{"result": ":4"}"#, returned()).expect("as wanted"), r#"x: {"slots":4}"#);
        assert_eq!(answer(r#"{"error": "slot$"}"#, failed()).expect("as wanted"), "x: no such slot");
        for (expect, reply, want) in [
            ("{}", failed(), "x failed: no such slot"),
            (r#"{"error": ""}"#, returned(), "want an error"),
            (r#"{"result": ":5"}"#, returned(), "does not match"),
            (r#"{"error": "disk"}"#, failed(), "does not match"),
        ] {
            let error = answer(expect, reply).expect_err(expect);
            assert!(error.contains(want), "{error}");
        }
    }
}
