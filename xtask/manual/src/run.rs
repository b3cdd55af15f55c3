//! Runs the VM of `cargo xtask vm` in this terminal, or for one command.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use vvu_init::protocol::End;
use vvu_process::interrupt;
use vvu_testvm::{Boot, Lab, VmConfig};

/// How often to check whether the VM has ended or a signal has arrived.
const PERIOD: Duration = Duration::from_millis(100);
/// How long a VM may take to shut down after a command, at native speed.
const END_LIMIT: Duration = Duration::from_secs(20);

/// Runs the VM with its console in this terminal until the VM ends; returns QEMU's exit code.
pub(super) fn terminal(lab: &Lab<'_>, config: &VmConfig, boot: Boot<'_>) -> Result<ExitCode> {
    eprintln!("a shell follows; `poweroff` or Ctrl-D ends the VM, Ctrl-A X at once, Ctrl-A H helps");
    let _terminal = Terminal::keep();
    let mut qemu = lab.vm_on_terminal(config, boot)?;
    let status = loop {
        if let Some(status) = qemu.try_wait().context("cannot wait for QEMU")? {
            break status;
        }
        if interrupt::requested() {
            qemu.kill().context("cannot end QEMU")?;
        }
        std::thread::sleep(PERIOD);
    };
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Runs the VM for one command, whose output and exit code it passes on.
pub(super) fn exec(
    lab: &Lab<'_>,
    config: &VmConfig,
    boot: Boot<'_>,
    command: &str,
    deadline: Instant,
) -> Result<ExitCode> {
    let vm = lab.vm_with(config, boot)?;
    vm.ready(deadline)?;
    let exit = vm.exec(command, deadline)?;
    vm.power_off(lab.deadline(END_LIMIT))?;

    let output = &exit.output;
    std::io::stdout().write_all(output.stdout.as_bytes()).context("cannot write to stdout")?;
    std::io::stderr().write_all(output.stderr.as_bytes()).context("cannot write to stderr")?;
    ensure!(!output.truncated, "the command printed more than can be passed on; redirect it to a file");
    let code = match exit.end {
        End::Code(code) => code,
        // As a shell reports it.
        End::Signal(signal) => 128 + signal,
    };
    Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Restores the terminal's settings however QEMU ends.
struct Terminal(Option<Termios>);

impl Terminal {
    fn keep() -> Self {
        let stdin = std::io::stdin();
        Self(stdin.is_terminal().then(|| tcgetattr(&stdin).ok()).flatten())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(settings) = &self.0 {
            // A terminal that is gone needs none.
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, settings);
        }
    }
}
