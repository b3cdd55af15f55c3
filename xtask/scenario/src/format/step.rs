//! The steps of a scenario.

use std::fmt;

use serde::Deserialize;

/// One step: where, one action, and what must come of it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// The check this step belongs to. A check passes when all its steps do.
    #[serde(default)]
    pub check: Option<String>,
    /// The VM it happens in; none for what happens on the host.
    #[serde(default)]
    pub vm: Option<String>,
    /// Start the VM and go on without waiting for it. A VM without such a step starts before the first step.
    #[serde(default)]
    pub start: bool,
    /// Run a shell command to its end.
    #[serde(default)]
    pub run: Option<String>,
    /// Start a shell command that stays; its output goes to the VM's console.
    #[serde(default)]
    pub spawn: Option<String>,
    /// Name of the spawned command, for `kill` and `wait`; `spawned` unless given.
    #[serde(default, rename = "as")]
    pub name: Option<String>,
    /// End the spawned command of this name with a signal and wait until it has ended.
    #[serde(default)]
    pub kill: Option<String>,
    /// The signal of a `kill`.
    #[serde(default)]
    pub signal: Signal,
    /// Wait until the spawned command of this name has ended by itself.
    #[serde(default)]
    pub wait: Option<String>,
    /// Wait until a line of the VM's console matches this regular expression.
    #[serde(default)]
    pub console: Option<String>,
    /// Shut the VM down and wait for its end.
    #[serde(default)]
    pub power_off: bool,
    /// Reboot the VM from inside and wait until it serves requests again.
    #[serde(default)]
    pub reboot: bool,
    /// End the VM's QEMU with SIGKILL.
    #[serde(default)]
    pub kill_vm: bool,
    /// End the proxy of this vvu device with SIGKILL.
    #[serde(default)]
    pub kill_proxy: Option<String>,
    /// Start the proxy of this vvu device again and wait until it listens.
    #[serde(default)]
    pub start_proxy: Option<String>,
    /// Look at the messages of this vvu device so far.
    #[serde(default)]
    pub trace: Option<String>,
    /// Carry out steps several times.
    #[serde(default)]
    pub repeat: Option<Repeat>,
    /// What a `run` must give, what a `trace` must show, and how a `spawn` is to end.
    #[serde(default)]
    pub expect: Expect,
    /// Keep the first capture group of `expect.stdout` or `console` (without a group, the whole match) under this
    /// name, as a placeholder for later steps.
    #[serde(default)]
    pub save: Option<String>,
    /// Add the number that is saved to the report's measurement of the same name.
    #[serde(default)]
    pub measure: bool,
    /// Seconds allowed at native speed; scaled for slower accelerators.
    #[serde(default)]
    pub timeout_s: Option<u64>,
}

/// Steps that are carried out several times.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repeat {
    /// How often.
    pub times: u32,
    /// The steps of a round.
    pub steps: Vec<Step>,
}

/// What a command must give.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// Exit code, 0 unless given.
    #[serde(default)]
    pub exit: i32,
    /// Regular expression that must match somewhere in its standard output, or in the trace.
    #[serde(default)]
    pub stdout: Option<String>,
}

/// A signal that ends a process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Signal {
    /// Asks it to end.
    #[default]
    Term,
    /// Ends it at once.
    Kill,
}

impl Signal {
    /// Its number on Linux.
    pub fn number(self) -> i32 {
        match self {
            Self::Term => 15,
            Self::Kill => 9,
        }
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

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action<'a> {
    /// Start the VM.
    Start,
    /// Run a command to its end.
    Run(&'a str),
    /// Start a command that stays.
    Spawn {
        /// Its name.
        name: &'a str,
        /// The shell command.
        command: &'a str,
    },
    /// End a spawned command.
    Kill {
        /// Its name.
        name: &'a str,
        /// How.
        signal: Signal,
    },
    /// Wait for the end of a spawned command.
    Wait(&'a str),
    /// Wait for a line on the console.
    Console(&'a str),
    /// Shut the VM down.
    PowerOff,
    /// Reboot the VM from inside.
    Reboot,
    /// End the VM's QEMU.
    KillVm,
    /// End the proxy of a vvu device.
    KillProxy(&'a str),
    /// Start the proxy of a vvu device again.
    StartProxy(&'a str),
    /// Look at the messages of a vvu device.
    Trace(&'a str),
}

/// The keys of the actions, for messages.
pub(super) const ACTIONS: &str = "start, run, spawn, kill, wait, console, power_off, reboot, kill_vm, kill_proxy, \
                                  start_proxy, trace and repeat";

impl Action<'_> {
    /// Whether it takes away by force what others rely on.
    pub fn is_fault(self) -> bool {
        matches!(self, Self::Kill { .. } | Self::Reboot | Self::KillVm | Self::KillProxy(_))
    }

    /// Whether it happens on the host rather than in a VM.
    pub fn is_on_host(self) -> bool {
        matches!(self, Self::KillProxy(_) | Self::StartProxy(_) | Self::Trace(_))
    }
}

impl fmt::Display for Action<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start => f.write_str("start"),
            Self::Run(command) => write!(f, "`{command}`"),
            Self::Spawn { name, command } => write!(f, "`{command}` as {name}"),
            Self::Kill { name, signal } => write!(f, "{signal} to {name}"),
            Self::Wait(name) => write!(f, "end of {name}"),
            Self::Console(pattern) => write!(f, "console line /{pattern}/"),
            Self::PowerOff => f.write_str("power off"),
            Self::Reboot => f.write_str("reboot"),
            Self::KillVm => f.write_str("SIGKILL to QEMU"),
            Self::KillProxy(name) => write!(f, "SIGKILL to the proxy {name}"),
            Self::StartProxy(name) => write!(f, "start of the proxy {name}"),
            Self::Trace(name) => write!(f, "messages of {name}"),
        }
    }
}

impl Step {
    /// The one action of the step, or `None` if it has none or several, or is a `repeat`.
    pub fn action(&self) -> Option<Action<'_>> {
        let name = self.name.as_deref().unwrap_or("spawned");
        let signal = self.signal;
        let mut actions = [
            self.start.then_some(Action::Start),
            self.run.as_deref().map(Action::Run),
            self.spawn.as_deref().map(|command| Action::Spawn { name, command }),
            self.kill.as_deref().map(|name| Action::Kill { name, signal }),
            self.wait.as_deref().map(Action::Wait),
            self.console.as_deref().map(Action::Console),
            self.power_off.then_some(Action::PowerOff),
            self.reboot.then_some(Action::Reboot),
            self.kill_vm.then_some(Action::KillVm),
            self.kill_proxy.as_deref().map(Action::KillProxy),
            self.start_proxy.as_deref().map(Action::StartProxy),
            self.trace.as_deref().map(Action::Trace),
        ]
        .into_iter()
        .flatten();
        let action = actions.next()?;
        actions.next().is_none().then_some(action)
    }
}

/// A step in its place: repeats are gone.
#[derive(Debug, Clone)]
pub struct Placed<'a> {
    /// JSON path of the step.
    pub path: String,
    /// The check it belongs to.
    pub check: Option<&'a str>,
    /// Which round of a repeat it is in, from 1.
    pub round: Option<u32>,
    /// The step.
    pub step: &'a Step,
}

impl<'a> Placed<'a> {
    /// `step` itself, or at most `rounds` rounds of it if it is a repeat.
    pub(super) fn unroll(step: &'a Step, path: String, rounds: u32) -> Vec<Self> {
        let outer = step.check.as_deref();
        let Some(repeat) = &step.repeat else {
            return vec![Self { path, check: outer, round: None, step }];
        };
        let round = |round: u32| {
            let path = &path;
            repeat.steps.iter().enumerate().map(move |(index, step)| Self {
                path: format!("{path}.repeat.steps[{index}]"),
                check: step.check.as_deref().or(outer),
                round: Some(round),
                step,
            })
        };
        (1..=repeat.times.min(rounds)).flat_map(round).collect()
    }
}
