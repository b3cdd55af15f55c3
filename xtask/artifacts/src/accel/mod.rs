//! Chooses the accelerator of the VMs.
//!
//! That /dev/kvm opens proves nothing: there are hosts whose KVM creates VMs, runs firmware and then hangs in an
//! ordinary kernel. So KVM counts only if it takes a piece of 64-bit kernel code through its steps at the speed of
//! the host.

mod finding;
mod guest;
mod probe;

use std::fmt;
use std::io::{self, Read, Seek};
use std::mem;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

use vvu_process::children;

use finding::{Finding, LEAST_SPEED};

/// First argument of the process in which the probe runs; see [`serve_probe`].
pub const PROBE_COMMAND: &str = "accel-probe";

/// A usable KVM answers within a fraction of this.
const DEADLINE: Duration = Duration::from_secs(3);

/// Time that a killed probe has to exit; after it the probe is left to the kernel.
const DYING: Duration = Duration::from_secs(1);

/// Start of the reason for a KVM that is used without proof.
pub const UNPROVEN: &str = "asked for by --accel kvm, although";

/// The accelerator that a user asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Request {
    /// KVM if it is proven, else TCG.
    #[default]
    Auto,
    /// KVM, whatever the proof says.
    Kvm,
    /// QEMU's own emulation.
    Tcg,
}

/// An accelerator as QEMU names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's own emulation.
    Tcg,
}

/// The accelerator to use, and why.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Accelerator {
    /// The accelerator.
    pub kind: Kind,
    /// The reason for it, in a sentence.
    pub reason: String,
    /// Findings of the probe; `None` if the probe did not run.
    pub evidence: Option<Evidence>,
}

/// Findings of the probe about KVM.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Evidence {
    /// KVM runs ordinary kernels at the host's speed.
    pub usable: bool,
    /// Steps that the guest code did without a fault.
    pub steps_passed: Vec<String>,
    /// Speed of ring 0 code as a fraction of the host's.
    pub speed: Option<f64>,
    /// The fault, if there was one.
    pub failure: Option<String>,
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// Chooses the accelerator.
///
/// # Errors
///
/// The probe cannot be run, which says nothing about KVM.
pub fn choose(request: Request) -> Result<Accelerator> {
    if request == Request::Tcg {
        let reason = "asked for by --accel tcg".to_owned();
        return Ok(Accelerator { kind: Kind::Tcg, reason, evidence: None });
    }
    let program = std::env::current_exe().context("cannot find this program to run the KVM probe with")?;
    let mut probe = Command::new(program);
    probe.arg(PROBE_COMMAND);
    let evidence = examine(probe, DEADLINE)?;
    let verdict = evidence.verdict();
    let (kind, reason) = match (request, evidence.usable) {
        (_, true) => (Kind::Kvm, verdict),
        (Request::Kvm, false) => (Kind::Kvm, format!("{UNPROVEN} {verdict}")),
        (_, false) => (Kind::Tcg, verdict),
    };
    Ok(Accelerator { kind, reason, evidence: Some(evidence) })
}

/// Runs the probe for [`choose`], in the process of `xtask accel-probe`.
///
/// # Errors
///
/// Standard output is closed.
pub fn serve_probe() -> Result<()> {
    probe::run(&mut io::stdout().lock())
}

/// Runs the probe in a process of its own, since only killing it interrupts a KVM that hangs.
fn examine(mut command: Command, deadline: Duration) -> Result<Evidence> {
    // A file rather than a pipe: reading it never waits for a process that cannot be killed.
    let mut output = tempfile::tempfile().context("cannot create a temporary file")?;
    command.stdin(Stdio::null()).stderr(Stdio::null()).stdout(output.try_clone()?);
    let mut running = children::spawn(command).context("cannot start the KVM probe")?;
    let end = match running.wait_timeout(deadline)? {
        Some(status) => format!("ended early ({status})"),
        None => {
            if let Some(group) = i32::try_from(running.id()).ok().and_then(Pid::from_raw) {
                // It is not reaped yet, so the group's number is still its own.
                let _ = rustix::process::kill_process_group(group, Signal::KILL);
            }
            let dead = running.wait_timeout(DYING)?.is_some();
            if !dead {
                // Dropping it would wait for ever; it goes away when KVM lets it.
                mem::forget(running);
            }
            format!("hung for {deadline:?}{}", if dead { "" } else { " and cannot be killed" })
        }
    };
    let mut text = String::new();
    output.rewind()?;
    output.read_to_string(&mut text).context("cannot read what the KVM probe found")?;
    Ok(Evidence::of(text.lines().map_while(|line| serde_json::from_str(line).ok()), &end))
}

impl Evidence {
    /// The sum of the findings. Where they break off, `end` says how the probe ended.
    fn of(findings: impl Iterator<Item = Finding>, end: &str) -> Self {
        let mut evidence = Self::default();
        let mut trying: Option<String> = None;
        for finding in findings {
            match finding {
                Finding::Trying(step) => evidence.steps_passed.extend(trying.replace(step)),
                Finding::Speed(speed) => evidence.speed = Some(speed),
                Finding::Passed => {
                    evidence.steps_passed.extend(trying.take());
                    evidence.usable = evidence.speed.is_some_and(|speed| speed >= LEAST_SPEED);
                    return evidence;
                }
                Finding::Failed(failure) => {
                    evidence.failure = Some(failure);
                    return evidence;
                }
            }
        }
        let step = trying.as_deref().unwrap_or("setting a VM up");
        evidence.failure = Some(format!("{step}: the probe {end}"));
        evidence
    }

    fn verdict(&self) -> String {
        let speed = self.speed.map(|speed| {
            let digits = if speed < 0.01 { 5 } else { 2 };
            format!("runs kernel code at {speed:.digits$} of the host's speed")
        });
        match (speed, &self.failure) {
            (Some(speed), None) if self.usable => format!("KVM {speed}"),
            (Some(speed), None) => format!("KVM {speed}: it is emulated"),
            (Some(speed), Some(failure)) => {
                format!("KVM cannot run an ordinary kernel: {failure}; it {speed}")
            }
            (None, failure) => {
                let failure = failure.as_deref().unwrap_or("its speed is unknown");
                format!("KVM cannot run an ordinary kernel: {failure}")
            }
        }
    }
}

#[cfg(test)]
#[path = "accel_test.rs"]
mod tests;
