//! A program on the host that takes part in a run: a vvu proxy, or a back-end beside the VMs.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, PipeReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use regex::Regex;
use rustix::process::{Pid, Signal, kill_process};
use vvu_process::children::{self, Running};

use crate::watch::{Part, Watch, lock};

/// How long a program may take to end after SIGTERM.
const END_LIMIT: Duration = Duration::from_secs(10);
/// How long the last output of an ended program may take to its log.
const LOG_LIMIT: Duration = Duration::from_secs(1);
/// How often to look whether the file of [`Ready::File`] exists.
const FILE_PERIOD: Duration = Duration::from_millis(20);
/// How often to look whether a program has another worker.
const WORKER_PERIOD: Duration = Duration::from_millis(2);
/// Bytes of its log that an error shows.
const TAIL: usize = 1500;

/// How a program tells that it is ready.
#[derive(Debug, Clone)]
pub enum Ready {
    /// It prints a line that matches.
    Line(Regex),
    /// It makes this file.
    File(PathBuf),
}

/// How a worker is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerSignal {
    /// SIGKILL to the worker.
    Kill,
    /// SIGUSR2 to the program.
    Upgrade,
}

/// A running program. Dropping it kills its process group.
pub struct Process {
    id: u32,
    state: Arc<Mutex<State>>,
    watch: Arc<Watch>,
}

struct State {
    name: String,
    child: Running,
    file: Option<PathBuf>,
    /// A message arrives for each line that matches; the channel closes with the program's output.
    ready: Receiver<()>,
    log: PathBuf,
    /// The program was stopped or killed on purpose, so its end is no failure.
    over: bool,
}

impl Process {
    /// Starts `command`. What it prints is appended to `log`.
    pub(crate) fn start(
        name: &str,
        mut command: Command,
        log: PathBuf,
        ready: Ready,
        watch: &Arc<Watch>,
    ) -> Result<Self> {
        // A proxy that is started again continues the log of the one before.
        let file = OpenOptions::new().create(true).append(true).open(&log);
        let file = file.with_context(|| format!("cannot write {}", log.display()))?;
        let (output, input) = std::io::pipe().context("cannot make a pipe")?;
        let errors = input.try_clone().context("cannot make a pipe")?;
        command.stdin(Stdio::null()).stdout(input).stderr(errors);
        let child = children::spawn(command).with_context(|| format!("cannot start {name}"))?;
        let (pattern, made) = match ready {
            Ready::Line(pattern) => (Some(pattern), None),
            Ready::File(path) => (None, Some(path)),
        };
        let (sender, ready) = sync_channel(1);
        thread::spawn(move || copy(output, file, pattern.as_ref(), &sender));
        let id = child.id();
        let state = State { name: name.to_owned(), child, file: made, ready, log, over: false };
        let state = Arc::new(Mutex::new(state));
        let part: Arc<Mutex<dyn Part>> = state.clone();
        watch.add(Arc::downgrade(&part));
        Ok(Self { id, state, watch: Arc::clone(watch) })
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Waits until the program is ready.
    ///
    /// # Errors
    ///
    /// Fails if the program ends, another part of the lab fails, or `deadline` passes.
    pub fn ready(&self, deadline: Instant) -> Result<()> {
        let mut state = self.lock();
        match self.watch.wait(deadline, |limit| state.ready_within(limit))? {
            Some(()) => Ok(()),
            None => bail!("{} was not ready in time{}", state.name, state.tail()),
        }
    }

    /// Fails if the program has ended.
    ///
    /// # Errors
    ///
    /// The message tells how it ended and shows the end of its log.
    pub fn check(&self) -> Result<()> {
        self.lock().check()
    }

    /// Asks the program to end (SIGTERM) and waits until it has.
    ///
    /// # Errors
    ///
    /// Fails if it had ended before, ends with an error, or has to be killed.
    pub fn stop(&self) -> Result<()> {
        let mut state = self.lock();
        state.check()?;
        state.over = true;
        state.child.terminate().with_context(|| format!("cannot send SIGTERM to {}", state.name))?;
        let status = state.child.wait_timeout(END_LIMIT);
        let status = status.with_context(|| format!("cannot wait for {}", state.name))?;
        match status {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("{} ended with {status}{}", state.name, state.tail()),
            None => {
                state.kill();
                bail!("{} did not end within {END_LIMIT:?} of SIGTERM{}", state.name, state.tail())
            }
        }
    }

    /// Makes the program replace its worker, the child whose process has the name `worker`, and waits until it has.
    ///
    /// # Errors
    ///
    /// Fails if there is no worker, or no other one before `deadline`.
    pub fn replace_worker(&self, worker: &str, signal: WorkerSignal, deadline: Instant) -> Result<()> {
        let before = self.child_named(worker).with_context(|| format!("there is no process {worker}"))?;
        let (target, signal) = match signal {
            WorkerSignal::Kill => (before, Signal::KILL),
            WorkerSignal::Upgrade => {
                (Pid::from_raw(self.id.cast_signed()).context("no process id")?, Signal::USR2)
            }
        };
        kill_process(target, signal).context("cannot send a signal")?;
        loop {
            self.check()?;
            self.watch.check()?;
            if self.child_named(worker).is_some_and(|now| now != before) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "no other process {worker} in time");
            thread::sleep(WORKER_PERIOD);
        }
    }

    /// The child of the program whose process has this name.
    fn child_named(&self, name: &str) -> Option<Pid> {
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.id)).ok()?;
        let has_name = |id: &i32| {
            std::fs::read_to_string(format!("/proc/{id}/comm")).is_ok_and(|found| found.trim_end() == name)
        };
        children.split_whitespace().filter_map(|id| id.parse().ok()).find(has_name).and_then(Pid::from_raw)
    }

    /// Kills the program.
    pub fn kill(&self) {
        self.lock().kill();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Another wait of the lab may hold the state for a moment, so dropping the state is not enough.
        self.kill();
    }
}

impl Part for State {
    fn check(&mut self) -> Result<()> {
        if self.over {
            return Ok(());
        }
        let status = self.child.wait_timeout(Duration::ZERO);
        if let Some(status) = status.with_context(|| format!("cannot wait for {}", self.name))? {
            bail!("{} ended ({status}) before its time{}", self.name, self.tail());
        }
        Ok(())
    }
}

impl State {
    fn ready_within(&mut self, limit: Duration) -> Result<Option<()>> {
        let limit = if self.file.is_some() { limit.min(FILE_PERIOD) } else { limit };
        let received = self.ready.recv_timeout(limit);
        if received.is_ok() || self.file.as_deref().is_some_and(Path::exists) {
            return Ok(Some(()));
        }
        if received == Err(RecvTimeoutError::Disconnected) {
            let status = self.child.wait_timeout(limit);
            if let Some(status) = status.with_context(|| format!("cannot wait for {}", self.name))? {
                bail!("{} ended ({status}) before it was ready{}", self.name, self.tail());
            }
        }
        Ok(None)
    }

    fn kill(&mut self) {
        self.over = true;
        // The check for leftovers at the end of a run finds a process that cannot be killed.
        let _ = self.child.kill();
    }

    /// The end of the log, as part of a message.
    fn tail(&self) -> String {
        // The log is complete when its writer has dropped the sender, soon after the program's end.
        while self.ready.recv_timeout(LOG_LIMIT).is_ok() {}
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(TAIL)..]).trim().to_owned();
        format!("; the end of {}:\n| {}", self.log.display(), text.replace('\n', "\n| "))
    }
}

/// Copies the program's output into its log and sends a message for each line that matches `pattern`.
fn copy(output: PipeReader, mut log: File, pattern: Option<&Regex>, ready: &SyncSender<()>) {
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    // The program blocks when nobody reads, so a log that cannot be written does not end the loop.
    while output.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
        let _ = log.write_all(&line);
        let text = String::from_utf8_lossy(line.trim_ascii());
        if pattern.is_some_and(|pattern| pattern.is_match(&text)) {
            let _ = ready.try_send(());
        }
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(script: &str, log: PathBuf) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let ready = Ready::Line(Regex::new("^ready$").expect("a pattern"));
        Process::start("the program p", command, log, ready, &Arc::default()).expect("sh starts")
    }

    #[test]
    fn an_end_before_its_time_is_told_with_its_last_words() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("log");
        let far = Instant::now() + Duration::from_secs(20);
        let process = start("echo ready; echo out of order >&2; kill -9 $$", log);
        process.ready(far).expect("ready");
        let error = loop {
            if let Err(error) = process.check() {
                break error.to_string();
            }
            assert!(Instant::now() < far, "it did not end");
            thread::yield_now();
        };
        assert!(error.contains("the program p ended (signal: 9 (SIGKILL)) before its time"), "{error}");
        assert!(error.ends_with("| out of order"), "{error}");
    }

    #[test]
    fn one_that_ends_before_it_is_ready_is_told() {
        let dir = tempfile::tempdir().expect("a directory");
        let far = Instant::now() + Duration::from_secs(20);
        let process = start("echo no socket >&2; exit 1", dir.path().join("log"));
        let error = process.ready(far).expect_err("ended").to_string();
        assert!(error.contains("exit status: 1) before it was ready"), "{error}");
        assert!(error.contains("| no socket"), "{error}");
    }

    #[test]
    fn a_file_tells_readiness_as_well() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("pid");
        let mut command = Command::new("sh");
        command.args(["-c", "touch \"$0\"; read x"]).arg(&file);
        let ready = Ready::File(file.clone());
        let log = dir.path().join("log");
        let process = Process::start("the program p", command, log, ready, &Arc::default());
        let process = process.expect("sh starts");
        process.ready(Instant::now() + Duration::from_secs(20)).expect("ready");
        assert!(file.exists());
    }
}
