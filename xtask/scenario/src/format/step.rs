//! The steps of a scenario: each is an object with one key, its action, whose value has that action's own fields.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::step_host::{AttachStep, DetachStep, ProxyStep, QmpStep, TamperStep, TraceStep};

/// One step of a scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Start a VM and go on without waiting for it. A VM without such a step starts before the first step.
    Start(VmStep),
    /// Run a shell command in a VM to its end.
    Run(RunStep),
    /// Start a shell command in a VM that stays; its output goes to the VM's console, each line behind `[NAME] `.
    Spawn(SpawnStep),
    /// Send a signal to a spawned command and wait until it has ended.
    Kill(KillStep),
    /// Wait until a spawned command has ended by itself.
    Wait(WaitStep),
    /// Wait for a line on a VM's serial console.
    Console(ConsoleStep),
    /// Shut a VM down and wait until its VMM has ended with exit code 0.
    PowerOff(VmWaitStep),
    /// Reboot a VM from inside and wait until it serves commands again. Its VMM stays.
    Reboot(VmWaitStep),
    /// Kill the VMM of a VM with SIGKILL. A `start` may follow.
    KillVm(VmStep),
    /// Kill the proxy of a vvu device with SIGKILL.
    KillProxy(ProxyStep),
    /// Start the proxy of a vvu device again and wait until it listens.
    StartProxy(ProxyStep),
    /// Attach the front-end of a vvu device to its sibling VM while that runs; of a disk, wait until the guest can open
    /// it. A vvu device with such a step is not there when the VM starts.
    Attach(AttachStep),
    /// Detach the front-end of a vvu device from its sibling VM, and wait until the guest has let go of it.
    Detach(DetachStep),
    /// Send a command to a VM's QEMU over QEMU's own protocol (QMP), and compare the answer.
    Qmp(QmpStep),
    /// Kill the worker of the supervised proxy of a vvu device with SIGKILL, and wait until there is another one.
    KillWorker(ProxyStep),
    /// Tell the supervised proxy of a vvu device to run its program anew, with SIGUSR2, and wait until there is another
    /// worker.
    UpgradeProxy(ProxyStep),
    /// Do to the sibling memory file what a hostile VMM of the sibling VM could do.
    Tamper(TamperStep),
    /// Look for messages among the vhost-user messages that a vvu device has carried so far.
    Trace(TraceStep),
    /// Carry out steps several times.
    Repeat(RepeatStep),
}

/// An action on a whole VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmStep {
    /// The check that this step belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    /// The VM.
    pub vm: String,
}

/// An action on a whole VM that takes time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmWaitStep {
    /// The check that this step belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    /// The VM.
    pub vm: String,
    /// Seconds allowed at native speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub timeout_s: Option<u64>,
}

/// A command that runs to its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunStep {
    /// The check that this step belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    /// The VM.
    pub vm: String,
    /// The shell command.
    pub command: String,
    /// What the command must give.
    #[serde(default, skip_serializing_if = "ExpectedResult::is_default")]
    pub expect: ExpectedResult,
    /// Keeps the first capture group of `expect.stdout` (without a group, the whole match) as a placeholder of this
    /// name for later steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub save: Option<String>,
    /// Adds the saved number to the report's measurement of the same name.
    #[serde(default, skip_serializing_if = "is_false")]
    pub measure: bool,
    /// What the scenario has reached once this step is done; the report gives its time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub milestone: Option<Milestone>,
    /// Seconds allowed at native speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub timeout_s: Option<u64>,
}

/// A command that stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SpawnStep {
    /// The check that this step belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    /// The VM.
    pub vm: String,
    /// Name of the command, for `kill` and `wait` and before its lines on the console.
    pub name: String,
    /// The shell command.
    pub command: String,
    /// How it must end. From now on, its end with another exit code fails the step that is carried out then.
    #[serde(default, skip_serializing_if = "ExpectedExit::is_default")]
    pub expect: ExpectedExit,
    /// Seconds allowed at native speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub timeout_s: Option<u64>,
}

/// A signal to a spawned command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KillStep {
    /// The check that this step belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    /// The VM.
    pub vm: String,
    /// Name of the spawned command.
    pub name: String,
    /// The signal.
    #[serde(default, skip_serializing_if = "Signal::is_default")]
    pub signal: Signal,
    /// Seconds allowed at native speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub timeout_s: Option<u64>,
}

/// A wait for the end of a spawned command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WaitStep {
    /// The check that this step belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    /// The VM.
    pub vm: String,
    /// Name of the spawned command.
    pub name: String,
    /// Seconds allowed at native speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub timeout_s: Option<u64>,
}

/// A wait for a line on a console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsoleStep {
    /// The check that this step belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    /// The VM.
    pub vm: String,
    /// Regular expression that the line must match. The search begins after the line that the last one found.
    pub line: String,
    /// Keeps the first capture group of `line` (without a group, the whole match) as a placeholder of this name for
    /// later steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub save: Option<String>,
    /// Adds the saved number to the report's measurement of the same name.
    #[serde(default, skip_serializing_if = "is_false")]
    pub measure: bool,
    /// What the scenario has reached once this step is done; the report gives its time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub milestone: Option<Milestone>,
    /// Seconds allowed at native speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub timeout_s: Option<u64>,
}

/// Steps that are carried out several times.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RepeatStep {
    /// The check that those of the steps belong to that name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
    /// How often.
    #[schemars(range(min = 1, max = 1000))]
    pub times: u32,
    /// The steps of a round; none of them is a `repeat`.
    #[schemars(length(min = 1))]
    pub steps: Vec<Step>,
}

/// What a command must give.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExpectedResult {
    /// Exit code.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub exit: i32,
    /// Regular expression that must match somewhere in its standard output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout: Option<String>,
}

/// How a spawned command must end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExpectedExit {
    /// Exit code.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub exit: i32,
}

/// A signal that ends a process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Signal {
    /// SIGTERM, which asks the process to end.
    #[default]
    Term,
    /// SIGKILL, which ends the process at once.
    Kill,
}

/// Something that scenarios reach and whose time, counted from the launch of the first VM, the report gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Milestone {
    /// The sibling VM sees its disk.
    DiskVisible,
}

impl ExpectedResult {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl ExpectedExit {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Signal {
    /// The number on Linux.
    #[must_use]
    pub fn number(self) -> i32 {
        match self {
            Self::Term => 15,
            Self::Kill => 9,
        }
    }

    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Term => "SIGTERM",
            Self::Kill => "SIGKILL",
        })
    }
}

impl Step {
    /// The check that the step belongs to, if it names one.
    #[must_use]
    pub fn check(&self) -> Option<&str> {
        match self {
            Step::Start(VmStep { check, .. })
            | Step::Run(RunStep { check, .. })
            | Step::Spawn(SpawnStep { check, .. })
            | Step::Kill(KillStep { check, .. })
            | Step::Wait(WaitStep { check, .. })
            | Step::Console(ConsoleStep { check, .. })
            | Step::PowerOff(VmWaitStep { check, .. })
            | Step::Reboot(VmWaitStep { check, .. })
            | Step::KillVm(VmStep { check, .. })
            | Step::KillProxy(ProxyStep { check, .. })
            | Step::StartProxy(ProxyStep { check, .. })
            | Step::Attach(AttachStep { check, .. })
            | Step::Detach(DetachStep { check, .. })
            | Step::Qmp(QmpStep { check, .. })
            | Step::KillWorker(ProxyStep { check, .. })
            | Step::UpgradeProxy(ProxyStep { check, .. })
            | Step::Tamper(TamperStep { check, .. })
            | Step::Trace(TraceStep { check, .. })
            | Step::Repeat(RepeatStep { check, .. }) => check.as_deref(),
        }
    }

    /// The VM that the step is about; none if it happens on the host, or is a repeat.
    #[must_use]
    pub fn vm(&self) -> Option<&str> {
        match self {
            Step::Start(VmStep { vm, .. })
            | Step::Run(RunStep { vm, .. })
            | Step::Spawn(SpawnStep { vm, .. })
            | Step::Kill(KillStep { vm, .. })
            | Step::Wait(WaitStep { vm, .. })
            | Step::Console(ConsoleStep { vm, .. })
            | Step::PowerOff(VmWaitStep { vm, .. })
            | Step::Reboot(VmWaitStep { vm, .. })
            | Step::Qmp(QmpStep { vm, .. })
            | Step::KillVm(VmStep { vm, .. }) => Some(vm),
            Step::KillProxy(_)
            | Step::StartProxy(_)
            | Step::Attach(_)
            | Step::Detach(_)
            | Step::KillWorker(_)
            | Step::UpgradeProxy(_)
            | Step::Tamper(_)
            | Step::Trace(_)
            | Step::Repeat(_) => None,
        }
    }

    /// The milestone that the scenario has reached once the step is done.
    #[must_use]
    pub fn milestone(&self) -> Option<Milestone> {
        match self {
            Step::Run(RunStep { milestone, .. })
            | Step::Console(ConsoleStep { milestone, .. })
            | Step::Attach(AttachStep { milestone, .. }) => *milestone,
            _ => None,
        }
    }

    /// Seconds that the step may take at native speed.
    #[must_use]
    pub fn timeout_s(&self) -> u64 {
        let (given, default) = self.timeouts();
        given.unwrap_or(default)
    }

    /// Returns true if the scenario allows the step no time at all.
    pub(super) fn has_no_time(&self) -> bool {
        self.timeouts().0 == Some(0)
    }

    /// Seconds that the scenario allows, and the default.
    fn timeouts(&self) -> (Option<u64>, u64) {
        let (given, default) = match self {
            Step::Run(RunStep { timeout_s, .. }) | Step::PowerOff(VmWaitStep { timeout_s, .. }) => {
                (timeout_s, 20)
            }
            Step::Console(ConsoleStep { timeout_s, .. })
            | Step::Reboot(VmWaitStep { timeout_s, .. })
            | Step::Wait(WaitStep { timeout_s, .. }) => (timeout_s, 30),
            Step::Spawn(SpawnStep { timeout_s, .. })
            | Step::Kill(KillStep { timeout_s, .. })
            | Step::Attach(AttachStep { timeout_s, .. })
            | Step::Detach(DetachStep { timeout_s, .. })
            | Step::Qmp(QmpStep { timeout_s, .. }) => (timeout_s, 10),
            _ => (&None, 10),
        };
        (*given, default)
    }

    /// Returns true if the step kills a process on which others rely.
    #[must_use]
    pub fn is_fault(&self) -> bool {
        matches!(
            self,
            Step::Kill(_) | Step::Reboot(_) | Step::KillVm(_) | Step::KillProxy(_) | Step::KillWorker(_)
        )
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Start(_) => f.write_str("start"),
            Step::Run(RunStep { command, .. }) => write!(f, "`{command}`"),
            Step::Spawn(SpawnStep { name, command, .. }) => write!(f, "`{command}` as {name}"),
            Step::Kill(KillStep { name, signal, .. }) => write!(f, "{signal} to {name}"),
            Step::Wait(WaitStep { name, .. }) => write!(f, "end of {name}"),
            Step::Console(ConsoleStep { line, .. }) => write!(f, "console line /{line}/"),
            Step::PowerOff(_) => f.write_str("power off"),
            Step::Reboot(_) => f.write_str("reboot"),
            Step::KillVm(_) => f.write_str("SIGKILL to the VMM"),
            Step::KillProxy(ProxyStep { vvu, .. }) => write!(f, "SIGKILL to the proxy {vvu}"),
            Step::StartProxy(ProxyStep { vvu, .. }) => write!(f, "start of the proxy {vvu}"),
            Step::Attach(AttachStep { vvu, .. }) => write!(f, "attach {vvu}"),
            Step::Detach(DetachStep { vvu, .. }) => write!(f, "detach {vvu}"),
            Step::Qmp(QmpStep { execute, .. }) => write!(f, "QMP {execute}"),
            Step::KillWorker(ProxyStep { vvu, .. }) => write!(f, "SIGKILL to the worker of {vvu}"),
            Step::UpgradeProxy(ProxyStep { vvu, .. }) => write!(f, "SIGUSR2 to the proxy {vvu}"),
            Step::Tamper(TamperStep { vvu, attack, .. }) => write!(f, "{attack:?} in the memory of {vvu}"),
            Step::Trace(TraceStep { vvu, .. }) => write!(f, "messages of {vvu}"),
            Step::Repeat(RepeatStep { times, .. }) => write!(f, "{times} rounds"),
        }
    }
}

pub(super) fn is_false(flag: &bool) -> bool {
    !flag
}

fn is_zero(code: &i32) -> bool {
    *code == 0
}
