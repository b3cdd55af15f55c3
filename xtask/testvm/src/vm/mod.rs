//! A running VM: QEMU, its console and its control port.

mod addr;
pub mod args;
mod cpu;
mod frontend;
mod iommu;
pub mod proxy;
mod proxy_plan;

pub use addr::{Addr, Slot};
pub use cpu::{Cpu, CpuLevel};
pub use frontend::{BlockFrontend, Features, Frontend, FsFrontend, MAX_QUEUES, NetFrontend, PlainFrontend};
pub use iommu::Iommu;
pub use proxy_plan::ProxyPlan;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use regex::Regex;
use vvu_init::protocol::{Action, Empty, End, Exit, Identity, Kill, Outcome, Output, Run, Spawn};

use crate::console::{Console, Found};
use crate::control::Control;
use vvu_process::children::{self, Running};

/// What QEMU prints when it cannot go on, although its process does.
const QEMU_FAILURES: [&str; 3] = ["emulation failure", "KVM internal error", "terminating on signal"];
/// Bytes of QEMU's own output that an error shows.
const QEMU_TAIL: usize = 1500;
/// How much longer than a command's own limit its answer may take.
const ANSWER_GRACE: Duration = Duration::from_secs(10);

/// Where a VM's output goes.
#[derive(Debug, Clone)]
pub struct Logs {
    /// The console, written by QEMU.
    pub console: PathBuf,
    /// What QEMU itself prints.
    pub qemu: PathBuf,
}

/// A running VM. Dropping it ends it.
pub struct Vm {
    name: String,
    qemu: Running,
    console: Console,
    control: Control,
    logs: Logs,
    launched: Instant,
    spawned: Spawned,
}

/// The spawned commands of a VM.
#[derive(Default)]
struct Spawned {
    /// The exit code that each of them is to end with. One that is killed is not in it: it may end as it likes.
    expected: BTreeMap<String, i32>,
    /// How those that have ended did, until somebody has waited for it.
    ended: BTreeMap<String, End>,
}

impl Spawned {
    /// Notes which have ended; an error if one of them was not to end so.
    fn look(&mut self, control: &mut Control) -> Result<()> {
        for (name, end) in control.ended()? {
            let expected = self.expected.remove(&name);
            if expected.is_some_and(|code| end != End::Code(code)) {
                bail!("the spawned command {name} ended with {}", ending(end));
            }
            self.ended.insert(name, end);
        }
        Ok(())
    }
}

/// Something else to look at while waiting: the other VMs, the proxies, Ctrl-C.
pub type Look<'a> = &'a mut dyn FnMut() -> Result<()>;

impl Vm {
    /// Starts `command`, a QEMU with `Serial::Inherited` among its arguments.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn launch(name: &str, mut command: Command, logs: Logs) -> Result<Self> {
        let (console, console_end) = std::io::pipe().context("cannot make a pipe")?;
        let (control, control_end) = UnixStream::pair().context("cannot make a socket pair")?;
        // A VM that is started again goes on in the logs of the one before.
        let errors = OpenOptions::new().create(true).append(true).open(&logs.qemu);
        let errors = errors.with_context(|| format!("cannot write {}", logs.qemu.display()))?;
        command.stdin(OwnedFd::from(control_end)).stdout(console_end).stderr(Stdio::from(errors));
        let launched = Instant::now();
        let qemu = children::spawn(command).with_context(|| format!("cannot start the VM {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            qemu,
            console: Console::new(console)?,
            control: Control::new(control)?,
            logs,
            launched,
            spawned: Spawned::default(),
        })
    }

    /// Its name in the scenario.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// QEMU's process id.
    pub fn id(&self) -> u32 {
        self.qemu.id()
    }

    /// When QEMU was started.
    pub fn launched(&self) -> Instant {
        self.launched
    }

    /// Waits until the guest serves requests.
    ///
    /// # Errors
    ///
    /// The guest or QEMU failed, or `deadline` passed; the message has the end of the console.
    pub fn ready(&mut self, deadline: Instant, look: Look<'_>) -> Result<Identity> {
        let Self { qemu, console, control, logs, .. } = self;
        let ready = control.ready(deadline, || {
            console.check()?;
            alive(qemu, logs)?;
            look()
        });
        ready.cloned().map_err(|error| self.explain(error))
    }

    /// Waits for a line on the console.
    ///
    /// # Errors
    ///
    /// The guest or QEMU failed, a spawned command ended, or `deadline` passed.
    pub fn wait_for(&mut self, pattern: &Regex, deadline: Instant, look: Look<'_>) -> Result<Found> {
        let Self { qemu, console, control, logs, spawned, .. } = self;
        let found = console.wait(pattern, deadline, || {
            alive(qemu, logs)?;
            spawned.look(control)?;
            look()
        });
        found.map_err(|error| self.explain(error))
    }

    /// Runs a shell command to its end, which must come within `limit`.
    ///
    /// # Errors
    ///
    /// The guest or QEMU failed, or the command was not done in time.
    pub fn run(&mut self, command: &str, limit: Duration, look: Look<'_>) -> Result<Exit> {
        let timeout_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let action = Action::Run(Run { command: command.to_owned(), timeout_ms });
        match self.request(action, Instant::now() + limit + ANSWER_GRACE, look)? {
            Outcome::Exit(exit) => Ok(exit),
            Outcome::Timeout(output) => Err(self.explain(anyhow!(
                "`{command}` did not end within {} s{}",
                limit.as_secs(),
                printed(&output)
            ))),
            other => Err(self.explain(anyhow!("unexpected answer {other:?}"))),
        }
    }

    /// Starts a shell command that stays. From now on its end is an error, unless it ends with the exit code `expected`.
    ///
    /// # Errors
    ///
    /// The guest or QEMU failed, or refused.
    pub fn spawn(
        &mut self,
        name: &str,
        command: &str,
        expected: i32,
        deadline: Instant,
        look: Look<'_>,
    ) -> Result<()> {
        self.spawned.ended.remove(name);
        let action = Action::Spawn(Spawn { name: name.to_owned(), command: command.to_owned() });
        self.request(action, deadline, look)?;
        self.spawned.expected.insert(name.to_owned(), expected);
        Ok(())
    }

    /// Sends a signal to a spawned command and waits until it has ended.
    ///
    /// # Errors
    ///
    /// The guest or QEMU failed, there is no such command, or it did not end before `deadline`.
    pub fn kill(&mut self, name: &str, signal: i32, deadline: Instant, look: Look<'_>) -> Result<End> {
        self.spawned.expected.remove(name);
        let action = Action::Kill(Kill { name: name.to_owned(), signal });
        self.request(action, deadline, look)?;
        self.wait_for_end(name, deadline, look)
    }

    /// Waits until a spawned command has ended; an end other than expected is an error.
    ///
    /// # Errors
    ///
    /// The guest or QEMU failed, or the command did not end before `deadline`.
    pub fn wait_for_end(&mut self, name: &str, deadline: Instant, look: Look<'_>) -> Result<End> {
        let Self { qemu, console, control, logs, spawned, .. } = self;
        let end = loop {
            if let Err(error) = spawned.look(control) {
                break Err(error);
            }
            if let Some(end) = spawned.ended.remove(name) {
                break Ok(end);
            }
            let waited = control.wait(deadline, || {
                console.check()?;
                alive(qemu, logs)?;
                look()
            });
            if let Err(error) = waited {
                break Err(error.context(format!("{name} has not ended")));
            }
        };
        end.map_err(|error| self.explain(error))
    }

    /// Reboots the guest from inside and waits until it serves requests again; all that was spawned in it is gone.
    ///
    /// # Errors
    ///
    /// The guest or QEMU failed, or the guest was not ready before `deadline`.
    pub fn reboot(&mut self, deadline: Instant, look: Look<'_>) -> Result<()> {
        self.spawned.expected.clear();
        self.control.restarting();
        self.request(Action::Reboot(Empty {}), deadline, look)?;
        self.ready(deadline, look)?;
        // Those whose end was still told are as gone as the others.
        self.spawned = Spawned::default();
        Ok(())
    }

    /// Shuts the guest down and waits until QEMU has ended, which must be without complaint.
    ///
    /// # Errors
    ///
    /// The guest or QEMU failed, or did not end before `deadline`.
    pub fn power_off(&mut self, deadline: Instant, look: Look<'_>) -> Result<()> {
        self.request(Action::PowerOff(Empty {}), deadline, look)?;
        let limit = deadline.saturating_duration_since(Instant::now());
        let status = self.qemu.wait_timeout(limit).context("cannot wait for QEMU")?;
        let failed = match status {
            Some(status) if status.success() => self.console.check().err(),
            Some(status) => Some(anyhow!("QEMU ended with {status}")),
            None => Some(anyhow!("QEMU did not end after the guest was asked to power off")),
        };
        failed.map_or(Ok(()), |error| Err(self.explain(error)))
    }

    /// Fails if something is wrong with the VM.
    ///
    /// # Errors
    ///
    /// The guest or QEMU failed, or a spawned command ended.
    pub fn look(&mut self) -> Result<()> {
        let Self { qemu, console, control, logs, spawned, .. } = self;
        let fine = console.check().and_then(|()| alive(qemu, logs)).and_then(|()| spawned.look(control));
        fine.map_err(|error| self.explain(error))
    }

    /// Ends the VM at once.
    pub fn end(&mut self) {
        // What cannot be killed shows when the run is checked for what it left.
        let _ = self.qemu.kill();
    }

    fn request(&mut self, action: Action, deadline: Instant, look: Look<'_>) -> Result<Outcome> {
        let Self { qemu, console, control, logs, .. } = self;
        let outcome = control.request(action, deadline, || {
            console.check()?;
            alive(qemu, logs)?;
            look()
        });
        outcome.map_err(|error| self.explain(error))
    }

    /// Adds to `error` what a person needs to understand it.
    fn explain(&mut self, error: Error) -> Error {
        if children::interrupted() {
            return error;
        }
        let mut text = format!("VM {}: {error:#}", self.name);
        // The end of a port is mostly seen before that of the process behind it.
        if let Ok(Some(status)) = self.qemu.wait_timeout(Duration::from_millis(500)) {
            text.push_str(&format!("\nQEMU ended with {status}"));
            let said = tail(&self.logs.qemu);
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
        text.push_str(&format!("\nmore in {} and {}", self.logs.console.display(), self.logs.qemu.display()));
        anyhow!(text)
    }
}

/// Fails if QEMU has ended or says that it cannot go on.
fn alive(qemu: &mut Running, logs: &Logs) -> Result<()> {
    if let Some(status) = qemu.wait_timeout(Duration::ZERO).context("cannot look at QEMU")? {
        bail!("QEMU ended ({status}) before its time");
    }
    let said = tail(&logs.qemu);
    let failure = QEMU_FAILURES.iter().find_map(|failure| said.lines().find(|line| line.contains(failure)));
    ensure!(failure.is_none(), "QEMU cannot go on: {}", failure.unwrap_or_default());
    Ok(())
}

/// How a process ended, in words.
pub fn ending(end: End) -> String {
    match end {
        End::Code(code) => format!("exit code {code}"),
        End::Signal(signal) => format!("signal {signal}"),
    }
}

/// What a command printed, as part of a message.
pub fn printed(output: &Output) -> String {
    let mut text = String::new();
    for (name, content) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
        let content = content.trim_end();
        if !content.is_empty() {
            text.push_str(&format!("\n{name}:\n| {}", content.replace('\n', "\n| ")));
        }
    }
    text
}

/// The end of a small log; nothing if it cannot be read.
fn tail(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let start = bytes.len().saturating_sub(QEMU_TAIL);
    String::from_utf8_lossy(&bytes[start..]).trim().to_owned()
}
