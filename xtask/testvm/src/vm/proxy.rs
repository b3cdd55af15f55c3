//! The proxy of a vvu device: the process between a device VM and a sibling VM.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, PipeReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use vvu_process::children::{self, Running};

/// What it prints once both sockets listen.
const READY_LINE: &str = "vvu: proxy ready";
/// How long it may take to end when asked to.
const END_LIMIT: Duration = Duration::from_secs(10);
/// How long its last words may take to its log.
const LOG_LIMIT: Duration = Duration::from_secs(1);
/// Bytes of its log that an error shows.
const TAIL: usize = 1500;

/// A running proxy. Dropping it ends it.
pub struct Proxy {
    name: String,
    process: Running,
    ready: Receiver<()>,
    log: PathBuf,
}

impl Proxy {
    /// Starts `command`; all that it prints goes to `log`.
    ///
    /// # Errors
    ///
    /// It cannot be started, or the log not be written.
    pub fn start(name: &str, mut command: Command, log: PathBuf) -> Result<Self> {
        // One that is started again goes on in the log of the one before.
        let file = OpenOptions::new().create(true).append(true).open(&log);
        let file = file.with_context(|| format!("cannot write {}", log.display()))?;
        let (output, input) = std::io::pipe().context("cannot make a pipe")?;
        let errors = input.try_clone().context("cannot make a pipe")?;
        command.stdin(Stdio::null()).stdout(input).stderr(errors);
        let process = children::spawn(command).with_context(|| format!("cannot start the proxy {name}"))?;
        let (sender, ready) = sync_channel(1);
        thread::spawn(move || keep(output, file, &sender));
        Ok(Self { name: name.to_owned(), process, ready, log })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Waits until it listens.
    ///
    /// # Errors
    ///
    /// It ended, or `deadline` passed.
    pub fn ready(&mut self, deadline: Instant) -> Result<()> {
        let limit = deadline.saturating_duration_since(Instant::now());
        match self.ready.recv_timeout(limit) {
            Ok(()) => Ok(()),
            Err(RecvTimeoutError::Timeout) => {
                bail!("the proxy {} was not ready in time{}", self.name, self.said())
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.process.wait().context("cannot wait for the proxy")?;
                bail!("the proxy {} ended ({status}) before it was ready{}", self.name, self.said())
            }
        }
    }

    /// Fails if it has ended.
    ///
    /// # Errors
    ///
    /// How it ended, and the end of its log.
    pub fn look(&mut self) -> Result<()> {
        if let Some(status) = self.process.wait_timeout(Duration::ZERO).context("cannot look at the proxy")? {
            bail!("the proxy {} ended ({status}) before its time{}", self.name, self.said());
        }
        Ok(())
    }

    /// Asks it to end and waits until it has.
    ///
    /// # Errors
    ///
    /// It ended with an error or had to be killed.
    pub fn stop(&mut self) -> Result<()> {
        self.look()?;
        let pid =
            i32::try_from(self.process.id()).ok().and_then(Pid::from_raw).context("a process has an id")?;
        kill_process(pid, Signal::TERM).context("cannot send SIGTERM to the proxy")?;
        let status = self.process.wait_timeout(END_LIMIT).context("cannot wait for the proxy")?;
        match status {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("the proxy {} ended with {status}{}", self.name, self.said()),
            None => {
                self.end();
                bail!("the proxy {} did not end within {END_LIMIT:?} of SIGTERM{}", self.name, self.said())
            }
        }
    }

    /// Ends it at once.
    pub fn end(&mut self) {
        // What cannot be killed shows when the run is checked for what it left.
        let _ = self.process.kill();
    }

    fn said(&self) -> String {
        // The log is complete when its writer has dropped the sender, soon after the proxy's end.
        while self.ready.recv_timeout(LOG_LIMIT).is_ok() {}
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(TAIL)..]).trim().to_owned();
        format!("; the end of {}:\n| {}", self.log.display(), text.replace('\n', "\n| "))
    }
}

/// Copies what the proxy prints into its log and tells when the line comes that says it listens.
fn keep(output: PipeReader, mut log: File, ready: &SyncSender<()>) {
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    // A log that cannot be written must not stop the proxy, which blocks when nobody reads.
    while output.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
        let _ = log.write_all(&line);
        if line.trim_ascii() == READY_LINE.as_bytes() {
            let _ = ready.try_send(());
        }
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(script: &str, log: PathBuf) -> Proxy {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Proxy::start("p", command, log).expect("sh starts")
    }

    #[test]
    fn an_end_before_its_time_is_told_with_its_last_words() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("log");
        let far = Instant::now() + Duration::from_secs(20);
        let mut proxy = proxy("echo vvu: proxy ready; echo out of order >&2; kill -9 $$", log);
        proxy.ready(far).expect("ready");
        let error = loop {
            if let Err(error) = proxy.look() {
                break error.to_string();
            }
            assert!(Instant::now() < far, "it did not end");
            thread::yield_now();
        };
        assert!(error.contains("the proxy p ended (signal: 9 (SIGKILL)) before its time"), "{error}");
        assert!(error.ends_with("| out of order"), "{error}");
    }

    #[test]
    fn one_that_ends_before_it_is_ready_is_told() {
        let dir = tempfile::tempdir().expect("a directory");
        let far = Instant::now() + Duration::from_secs(20);
        let mut proxy = proxy("echo no socket >&2; exit 1", dir.path().join("log"));
        let error = proxy.ready(far).expect_err("ended").to_string();
        assert!(error.contains("exit status: 1) before it was ready"), "{error}");
        assert!(error.contains("| no socket"), "{error}");
    }
}
