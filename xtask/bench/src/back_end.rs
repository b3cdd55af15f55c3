//! Back-ends on the host, for the comparison.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use vvu_process::children::{self, Running};
use vvu_process::interrupt;
use vvu_testvm::leftover::RUN_VARIABLE;

/// How often to look whether a back-end listens.
const LOOK: Duration = Duration::from_millis(20);
/// What `vvu device` prints once it listens.
const READY: &str = "ready";

/// A back-end in a process of its own. Dropping it ends it.
pub(super) struct BackEnd {
    process: Running,
    log: PathBuf,
    /// There once it listens, and removed with it.
    pid_file: Option<PathBuf>,
    socket: PathBuf,
}

impl BackEnd {
    /// Our own back-end, which these words start but for its socket.
    pub(super) fn vvu(
        program: &Path,
        words: &[String],
        socket: &Path,
        run: &str,
        log: PathBuf,
    ) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(words).arg("--socket").arg(socket);
        Self::start(command, socket, None, run, log)
    }

    /// QEMU's storage daemon.
    pub(super) fn storage_daemon(
        program: &Path,
        disk: &Path,
        socket: &Path,
        run: &str,
        log: PathBuf,
    ) -> Result<Self> {
        let node =
            json!({"driver": "raw", "node-name": "disk", "file": {"driver": "file", "filename": disk}});
        let export = json!({
            "type": "vhost-user-blk", "id": "disk", "node-name": "disk", "writable": true,
            "addr": {"type": "unix", "path": socket},
        });
        let pid_file = socket.with_extension("pid");
        let mut command = Command::new(program);
        command.args(["--blockdev", &node.to_string(), "--export", &export.to_string(), "--pidfile"]);
        command.arg(&pid_file);
        Self::start(command, socket, Some(pid_file), run, log)
    }

    fn start(
        mut command: Command,
        socket: &Path,
        pid_file: Option<PathBuf>,
        run: &str,
        log: PathBuf,
    ) -> Result<Self> {
        let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let errors = output.try_clone().context("no file descriptor is left")?;
        command.stdin(Stdio::null()).stdout(output).stderr(errors).env(RUN_VARIABLE, run);
        let process = children::spawn(command).context("cannot start a back-end")?;
        Ok(Self { process, log, pid_file, socket: socket.to_owned() })
    }

    /// Waits until it listens.
    pub(super) fn ready(&mut self, deadline: Instant) -> Result<()> {
        loop {
            interrupt::check()?;
            let listens = match &self.pid_file {
                // The storage daemon writes it after its exports were made.
                Some(file) => file.exists(),
                None => self.said().contains(READY),
            };
            if listens {
                return Ok(());
            }
            // Returns early if it ends, which is the only other thing to happen.
            if let Some(status) = self.process.wait_timeout(LOOK).context("cannot look at the back-end")? {
                bail!("the back-end ended ({status}):\n{}", self.said());
            }
            if Instant::now() >= deadline {
                bail!("the back-end does not listen in time:\n{}", self.said());
            }
        }
    }

    /// Its process id.
    pub(super) fn id(&self) -> u32 {
        self.process.id()
    }

    fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        // What cannot be killed shows when the run is checked for what it left.
        let _ = self.process.kill();
        for path in self.pid_file.iter().chain([&self.socket]) {
            let _ = fs::remove_file(path);
        }
    }
}
