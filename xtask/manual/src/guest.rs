//! Running the VM of `cargo xtask vm`: in this terminal, or for one command.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use vvu_init::protocol::End;

use vvu_process::children;
use vvu_process::interrupt;
use vvu_testvm::leftover::RUN_VARIABLE;
use vvu_testvm::rundir::RunDir;
use vvu_testvm::setup::{KernelId, Setup};
use vvu_testvm::vm::args::{Config, Guest, Serial, arguments};
use vvu_testvm::vm::proxy::Proxy;
use vvu_testvm::vm::{Logs, Vm};

/// How often to look whether the VM has ended or a signal came.
const LOOK: Duration = Duration::from_millis(100);
/// How long a VM may take to shut down after a command.
const END_LIMIT: Duration = Duration::from_secs(60);

/// A VM that is ready to be started.
pub(super) struct Bench<'a> {
    /// What it needs.
    pub(super) setup: &'a Setup,
    /// Where its logs go.
    pub(super) run: &'a RunDir,
    /// The VM.
    pub(super) config: &'a Config,
    /// Its initramfs.
    pub(super) initramfs: &'a Path,
}

impl Bench<'_> {
    fn guest(&self) -> Result<Guest<'_>> {
        Ok(Guest {
            accelerator: self.setup.accelerator.kind,
            kernel: &self.setup.kernel(&KernelId::default())?.vmlinux,
            initramfs: self.initramfs,
        })
    }

    /// Runs the VM with its console in this terminal, and ends when it does with QEMU's exit code.
    pub(super) fn terminal(&self) -> Result<ExitCode> {
        let mut command = self.setup.qemu.command();
        command.args(arguments(self.config, self.guest()?, Serial::Terminal)?);
        command.env(RUN_VARIABLE, self.run.id());
        eprintln!("a shell follows; `poweroff` or Ctrl-D ends the VM, Ctrl-A X at once, Ctrl-A H helps");
        let _terminal = Terminal::keep();
        let mut qemu = children::spawn_on_terminal(command).context("cannot start QEMU")?;
        let status = loop {
            if let Some(status) = qemu.try_wait().context("cannot wait for QEMU")? {
                break status;
            }
            if children::interrupted() {
                qemu.kill().context("cannot end QEMU")?;
            }
            std::thread::sleep(LOOK);
        };
        Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
    }

    /// Runs the VM for one command and passes its output and exit code on.
    pub(super) fn exec(
        &self,
        command: &str,
        limit: Duration,
        mut proxy: Option<&mut Proxy>,
    ) -> Result<ExitCode> {
        let deadline = Instant::now() + limit;
        let name = &self.config.name;
        let logs = Logs {
            console: self.run.file(&format!("{name}-console.log")),
            qemu: self.run.file(&format!("{name}-qemu.log")),
        };
        let mut qemu = self.setup.qemu.command();
        qemu.args(arguments(self.config, self.guest()?, Serial::Inherited(&logs.console))?);
        qemu.env(RUN_VARIABLE, self.run.id());
        let mut look = || {
            interrupt::check()?;
            proxy.as_mut().map_or(Ok(()), |proxy| proxy.look())
        };
        let mut vm = Vm::launch(name, qemu, logs)?;
        vm.ready(deadline, &mut look)?;
        let exit = vm.run(command, deadline.saturating_duration_since(Instant::now()), &mut look)?;
        vm.power_off(Instant::now() + END_LIMIT, &mut look)?;

        let output = &exit.output;
        std::io::stdout().write_all(output.stdout.as_bytes()).context("cannot write to stdout")?;
        std::io::stderr().write_all(output.stderr.as_bytes()).context("cannot write to stderr")?;
        ensure!(!output.truncated, "the command printed more than can be passed on; redirect it to a file");
        let code = match exit.end {
            End::Code(code) => code,
            // As a shell tells it.
            End::Signal(signal) => 128 + signal,
        };
        Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from))
    }
}

/// The terminal's settings, which come back however QEMU ends.
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
