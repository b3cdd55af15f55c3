//! A running VM: its VMM, its console and its control port.

pub(crate) mod addr;
pub(crate) mod config;
pub(crate) mod cpu;
pub(crate) mod frontend;
pub(crate) mod iommu;
mod log;
mod manage;

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail};
use regex::Regex;
use vvu_init::protocol::{Action, Empty, End, Exit, Identity, Kill, Outcome, Output, Run, Spawn};
use vvu_process::children::{self, Running};
use vvu_process::interrupt;
use vvu_process::text::printable;

use crate::console::{Console, Found};
use crate::control::Control;
use crate::qmp::Qmp;
use crate::spawned::ending;
use crate::transcript::Transcript;
use crate::watch::{Part, Watch, lock};
use log::VmmLog;

/// How long before its deadline a command is ended in the guest, so that its output still arrives.
const ANSWER_GRACE: Duration = Duration::from_secs(10);
/// How long a VMM that is ending may take to end, when an error is explained.
const END_LIMIT: Duration = Duration::from_millis(500);

/// Files that take a VM's output.
#[derive(Debug, Clone)]
pub(crate) struct Logs {
    /// What the guest prints.
    pub(crate) console: PathBuf,
    /// The output of the VMM itself.
    pub(crate) vmm: PathBuf,
}

/// A running VM. Dropping it kills it.
///
/// Every wait also ends, with an error that tells the reason, when the guest or the VMM fails, when a spawned command
/// ends unexpectedly, when another VM or process of the [`Lab`](crate::Lab) fails, and when a signal asks this program
/// to stop. The error of a VM shows the end of its console.
pub struct Vm {
    name: String,
    id: u32,
    launched: Instant,
    slowness: u32,
    state: Arc<Mutex<State>>,
    watch: Arc<Watch>,
}

/// A VM while it is waited for or checked.
struct State {
    name: String,
    vmm: Running,
    console: Console,
    control: Control,
    management: Option<Qmp>,
    /// The log of what the guest prints.
    console_log: PathBuf,
    vmm_log: VmmLog,
    /// The VM was shut down or killed on purpose, so its end is no failure.
    over: bool,
}

impl Vm {
    /// Default limit of [`Vm::run`], at native speed.
    pub const RUN_LIMIT: Duration = Duration::from_secs(20);

    /// Starts `command`, a VMM with the ports of `Serial::Inherited`, which connects to `management` if the VM is managed.
    /// It cannot go on after it has printed one of `failures`.
    pub(crate) fn launch(
        name: &str,
        mut command: Command,
        logs: Logs,
        management: Option<Qmp>,
        failures: &'static [&'static str],
        slowness: u32,
        watch: &Arc<Watch>,
    ) -> Result<Self> {
        let (console, console_end) = std::io::pipe().context("cannot make a pipe")?;
        let (control, control_end) = UnixStream::pair().context("cannot make a socket pair")?;
        // A VM that is started again continues the logs of the one before.
        let errors = OpenOptions::new().create(true).append(true).open(&logs.vmm);
        let errors = errors.with_context(|| format!("cannot write {}", logs.vmm.display()))?;
        command.stdin(OwnedFd::from(control_end)).stdout(console_end).stderr(Stdio::from(errors));
        let vmm_log = VmmLog::follow(logs.vmm, failures)?;
        let launched = Instant::now();
        let vmm = children::spawn(command).with_context(|| format!("cannot start the VM {name}"))?;
        let id = vmm.id();
        let console_log = logs.console;
        let log = OpenOptions::new().create(true).append(true).open(&console_log);
        let log = log.with_context(|| format!("cannot write {}", console_log.display()))?;
        let transcript = Arc::new(Transcript::new(log));
        let console = Console::new(console, Arc::clone(&transcript))?;
        let control = Control::new(control, transcript)?;
        let state = State {
            name: name.to_owned(),
            vmm,
            console,
            control,
            management,
            console_log,
            vmm_log,
            over: false,
        };
        let state = Arc::new(Mutex::new(state));
        let part: Arc<Mutex<dyn Part>> = state.clone();
        watch.add(Arc::downgrade(&part));
        Ok(Self { name: name.to_owned(), id, launched, slowness, state, watch: Arc::clone(watch) })
    }

    /// The VM's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process id of the VMM.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// When the VMM was started.
    #[must_use]
    pub fn launched(&self) -> Instant {
        self.launched
    }

    /// Waits until the guest serves requests.
    ///
    /// # Errors
    ///
    /// Fails as every wait does, and after `deadline`.
    pub fn ready(&self, deadline: Instant) -> Result<Identity> {
        self.lock().ready(deadline, &self.watch)
    }

    /// Waits for a line of the console or of a spawned command; lines of the same kind before it are skipped. The lines
    /// of a command begin with `[NAME] `.
    ///
    /// # Errors
    ///
    /// Fails as every wait does, and after `deadline`.
    pub fn wait_for(&self, pattern: &Regex, deadline: Instant) -> Result<Found> {
        self.wait_for_line(None, pattern, deadline)
    }

    /// Waits as [`Vm::wait_for`] does, for a line that only the spawned command `name` can print.
    ///
    /// # Errors
    ///
    /// Fails as every wait does, when the command has ended without such a line, and after `deadline`.
    pub fn wait_for_line_of(&self, name: &str, pattern: &Regex, deadline: Instant) -> Result<Found> {
        self.wait_for_line(Some(name), pattern, deadline)
    }

    fn wait_for_line(&self, command: Option<&str>, pattern: &Regex, deadline: Instant) -> Result<Found> {
        let mut state = self.lock();
        let State { vmm, console, control, vmm_log, .. } = &mut *state;
        let mut has_ended = false;
        let found = console.wait(pattern, deadline, || {
            alive(vmm, vmm_log)?;
            control.check()?;
            if let Some(name) = command
                && let Some(end) = control.spawned.last_end(name)
            {
                has_ended = true;
                bail!("{name} ended with {} and printed no line that matches /{pattern}/", ending(end));
            }
            self.watch.check()
        });
        // Its last lines are there by now.
        let last = if has_ended { console.said(pattern) } else { None };
        last.unwrap_or(found).map_err(|error| state.explain(&error))
    }

    /// Passes over the lines that the console has so far, so that [`Vm::wait_for`] finds only later ones.
    ///
    /// # Errors
    ///
    /// Fails if the guest has failed.
    pub(crate) fn skip_console(&self) -> Result<()> {
        let mut state = self.lock();
        state.console.skip().map_err(|error| state.explain(&error))
    }

    /// Runs a shell command in the guest, waits for the guest to be ready first, and returns what the command printed
    /// on its standard output.
    ///
    /// # Errors
    ///
    /// Fails as every wait does, if the command ends with another exit code than 0, and if it takes longer than
    /// [`Vm::RUN_LIMIT`], scaled by the lab's slowness.
    pub fn run(&self, command: &str) -> Result<String> {
        let limit = Self::RUN_LIMIT * self.slowness;
        self.ready(Instant::now() + limit)?;
        self.run_until(command, Instant::now() + limit)
    }

    /// Runs a shell command as [`Vm::run`] does, with a deadline of its own.
    ///
    /// # Errors
    ///
    /// Fails as [`Vm::run`] does.
    pub fn run_until(&self, command: &str, deadline: Instant) -> Result<String> {
        let exit = self.exec(command, deadline)?;
        if exit.end != End::Code(0) {
            bail!("{}: `{command}` ended with {}{}", self.name, ending(exit.end), printed(&exit.output));
        }
        Ok(exit.output.stdout)
    }

    /// Runs a shell command in the guest and returns how it ended and what it printed.
    ///
    /// # Errors
    ///
    /// Fails as every wait does, and if the command has not ended by `deadline`.
    pub fn exec(&self, command: &str, deadline: Instant) -> Result<Exit> {
        let mut state = self.lock();
        let limit = deadline.saturating_duration_since(Instant::now());
        let timeout_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let action = Action::Run(Run { command: command.to_owned(), timeout_ms });
        match state.request(action, deadline + ANSWER_GRACE, &self.watch)? {
            Outcome::Exit(exit) => Ok(exit),
            Outcome::Timeout(output) => Err(state.explain(&anyhow!(
                "`{command}` did not end within {} s{}",
                limit.as_secs(),
                printed(&output)
            ))),
            other => Err(state.explain(&anyhow!("unexpected answer {other:?}"))),
        }
    }

    /// Starts a shell command that stays. Its end fails every wait of the lab, unless its exit code is `expected`.
    ///
    /// # Errors
    ///
    /// Fails as every wait does, after `deadline`, and if the guest refuses.
    pub fn spawn(&self, name: &str, command: &str, expected: i32, deadline: Instant) -> Result<()> {
        let mut state = self.lock();
        // Before the request, since the command may end before the answer arrives.
        state.control.spawned.expect(name, expected);
        let action = Action::Spawn(Spawn { name: name.to_owned(), command: command.to_owned() });
        let answer = state.request(action, deadline, &self.watch);
        if answer.is_err() {
            state.control.spawned.forget(name);
        }
        answer.map(drop)
    }

    /// Sends a signal to a spawned command and waits until the command has ended.
    ///
    /// # Errors
    ///
    /// Fails as every wait does, after `deadline`, and if there is no such command.
    pub fn kill(&self, name: &str, signal: i32, deadline: Instant) -> Result<End> {
        let mut state = self.lock();
        state.control.spawned.allow(name);
        let action = Action::Kill(Kill { name: name.to_owned(), signal });
        state.request(action, deadline, &self.watch)?;
        state.wait_for_end(name, deadline, &self.watch)
    }

    /// Waits until a spawned command has ended as expected.
    ///
    /// # Errors
    ///
    /// Fails as every wait does, and after `deadline`.
    pub fn wait_for_end(&self, name: &str, deadline: Instant) -> Result<End> {
        self.lock().wait_for_end(name, deadline, &self.watch)
    }

    /// Reboots the guest from inside and waits until it serves requests again; all spawned commands are gone then.
    ///
    /// # Errors
    ///
    /// Fails as every wait does, and after `deadline`.
    pub fn reboot(&self, deadline: Instant) -> Result<()> {
        let mut state = self.lock();
        state.control.restarting();
        state.request(Action::Reboot(Empty {}), deadline, &self.watch)?;
        state.ready(deadline, &self.watch)?;
        // The guest may have told the end of some commands before it rebooted.
        state.control.spawned.clear();
        Ok(())
    }

    /// Shuts the guest down and waits until the VMM has ended with exit code 0.
    ///
    /// # Errors
    ///
    /// Fails as every wait does, and after `deadline`.
    pub fn power_off(&self, deadline: Instant) -> Result<()> {
        let mut state = self.lock();
        state.check()?;
        // The guest ends its commands.
        state.control.spawned.clear();
        state.request(Action::PowerOff(Empty {}), deadline, &self.watch)?;
        let vmm = &mut state.vmm;
        let ended =
            self.watch.wait(deadline, |limit| vmm.wait_timeout(limit).context("cannot wait for the VMM"));
        let failed = match ended {
            Ok(Some(status)) if status.success() => {
                state.over = true;
                state.console.check().err()
            }
            Ok(Some(status)) => Some(anyhow!("the VMM ended with {status}")),
            Ok(None) => Some(anyhow!("the VMM did not end after the guest was asked to power off")),
            Err(error) => Some(error),
        };
        failed.map_or(Ok(()), |error| Err(state.explain(&error)))
    }

    /// Fails if the VM has failed.
    ///
    /// # Errors
    ///
    /// Fails if the guest or the VMM has failed or a spawned command has ended unexpectedly.
    pub fn check(&self) -> Result<()> {
        self.lock().check()
    }

    /// Kills the VMM, and with it the VM.
    pub fn kill_vmm(&self) {
        let mut state = self.lock();
        state.over = true;
        // The check for leftovers at the end of a run finds a process that cannot be killed.
        let _ = state.vmm.kill();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Another wait of the lab may hold the state for a moment, so dropping the state is not enough.
        self.kill_vmm();
    }
}

impl Part for State {
    fn check(&mut self) -> Result<()> {
        if self.over {
            return Ok(());
        }
        let Self { vmm, console, control, vmm_log, .. } = self;
        let fine = console.check().and_then(|()| alive(vmm, vmm_log)).and_then(|()| control.check());
        fine.map_err(|error| self.explain(&error))
    }
}

impl State {
    fn ready(&mut self, deadline: Instant, watch: &Watch) -> Result<Identity> {
        let Self { vmm, console, control, vmm_log, .. } = self;
        let ready = control.ready(deadline, || {
            console.check()?;
            alive(vmm, vmm_log)?;
            watch.check()
        });
        ready.cloned().map_err(|error| self.explain(&error))
    }

    fn wait_for_end(&mut self, name: &str, deadline: Instant, watch: &Watch) -> Result<End> {
        let Self { vmm, console, control, vmm_log, .. } = self;
        let end = loop {
            match control.spawned.take_end(name) {
                Ok(Some(end)) => break Ok(end),
                Ok(None) => {}
                Err(error) => break Err(error),
            }
            let waited = control.wait(deadline, || {
                console.check()?;
                alive(vmm, vmm_log)?;
                watch.check()
            });
            if let Err(error) = waited {
                let late = Instant::now() >= deadline;
                break Err(if late { error.context(format!("{name} has not ended")) } else { error });
            }
        };
        end.map_err(|error| self.explain(&error))
    }

    fn request(&mut self, action: Action, deadline: Instant, watch: &Watch) -> Result<Outcome> {
        let Self { vmm, console, control, vmm_log, .. } = self;
        let outcome = control.request(action, deadline, || {
            console.check()?;
            alive(vmm, vmm_log)?;
            watch.check()
        });
        outcome.map_err(|error| self.explain(&error))
    }

    /// Adds to `error` what a person needs to understand it.
    fn explain(&mut self, error: &Error) -> Error {
        if interrupt::requested() {
            return anyhow!("{error:#}");
        }
        let mut text = format!("VM {}: {error:#}", self.name);
        // The end of a port is mostly seen before that of the process behind it.
        if let Ok(Some(status)) = self.vmm.wait_timeout(END_LIMIT) {
            text.push_str(&format!("\nthe VMM ended with {status}"));
            let said = self.vmm_log.tail();
            if !said.is_empty() {
                text.push_str(&format!(" and said:\n| {}", said.replace('\n', "\n| ")));
            }
        }
        let lines = self.console.tail();
        if lines.is_empty() {
            text.push_str("\nthe guest printed nothing");
        } else {
            text.push_str(&format!("\nlast lines of its console:\n| {}", lines.join("\n| ")));
        }
        text.push_str(&format!(
            "\nmore in {} and {}",
            self.console_log.display(),
            self.vmm_log.path().display()
        ));
        anyhow!(text)
    }
}

/// Fails if the VMM has ended or says that it cannot go on.
fn alive(vmm: &mut Running, log: &mut VmmLog) -> Result<()> {
    if let Some(status) = vmm.wait_timeout(Duration::ZERO).context("cannot wait for the VMM")? {
        let reset = if status.success() { ": the guest reset itself or powered off" } else { "" };
        bail!("the VMM ended ({status}) before its time{reset}");
    }
    log.check()
}

/// Formats the output of a command as part of a message.
#[must_use]
pub fn printed(output: &Output) -> String {
    let mut text = String::new();
    for (name, content) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
        let content = printable(content.trim_end());
        if !content.is_empty() {
            text.push_str(&format!("\n{name}:\n| {}", content.replace('\n', "\n| ")));
        }
    }
    text
}
