//! Long commands whose output goes to a log file, with its tail in the error.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{children, interrupt};

const TAIL_LINES: usize = 20;
/// How long to wait for output before looking whether the command ended: something it started and that left its
/// process group may hold the pipe open for ever.
const LOOK: Duration = Duration::from_millis(250);

/// Runs `command` to its end in a process group of its own; every line of its output goes to `log` and `on_line`.
///
/// # Errors
///
/// It cannot be started or ends with anything but success; the message then has the log's last lines and place.
pub fn run(command: Command, log: &Path, mut on_line: impl FnMut(&str)) -> Result<()> {
    run_filtered(command, log, |line| {
        on_line(line);
        true
    })
}

/// Like [`run`]; `belongs` says of each line whether it goes to the log.
///
/// # Errors
///
/// As [`run`].
pub fn run_filtered(mut command: Command, log: &Path, mut belongs: impl FnMut(&str) -> bool) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut file = File::create(log).with_context(|| format!("cannot write the log {}", log.display()))?;
    let (output, input) = std::io::pipe().context("cannot make a pipe")?;
    let errors = input.try_clone().context("cannot make a pipe")?;
    command.stdin(Stdio::null()).stdout(input).stderr(errors);
    let mut running = children::spawn(command).with_context(|| format!("cannot run {name}"))?;

    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
    let mut tail = VecDeque::new();
    loop {
        match lines.recv_timeout(LOOK) {
            Ok(line) => {
                if !belongs(&line) {
                    continue;
                }
                writeln!(file, "{line}")
                    .with_context(|| format!("cannot write the log {}", log.display()))?;
                if tail.len() == TAIL_LINES {
                    tail.pop_front();
                }
                tail.push_back(line);
            }
            Err(RecvTimeoutError::Timeout) => {
                if running
                    .wait_timeout(Duration::ZERO)
                    .with_context(|| format!("cannot wait for {name}"))?
                    .is_some()
                {
                    break;
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let status = running.wait().with_context(|| format!("cannot wait for {name}"))?;
    if status.success() {
        return Ok(());
    }
    if interrupt::requested() {
        bail!("interrupted");
    }
    bail!(failure(status, log, tail.make_contiguous()))
}

/// Runs `command` to its end whatever happens to this process, for what must not stop half-way (the system's apt).
///
/// # Errors
///
/// As [`run`].
pub fn run_undisturbed(mut command: Command, log: &Path) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let file = File::create(log).with_context(|| format!("cannot write the log {}", log.display()))?;
    let errors = file.try_clone().with_context(|| format!("cannot write the log {}", log.display()))?;
    // A process group of its own is out of reach of Ctrl-C; a file, unlike a pipe, outlives its reader.
    let status = command
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(errors)
        .process_group(0)
        .status()
        .with_context(|| format!("cannot run {name}"))?;
    if status.success() {
        return Ok(());
    }
    let text = std::fs::read(log).with_context(|| format!("cannot read the log {}", log.display()))?;
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    bail!(failure(status, log, &lines[lines.len().saturating_sub(TAIL_LINES)..]))
}

fn failure(status: ExitStatus, log: &Path, tail: &[impl AsRef<str>]) -> String {
    let mut text = format!("the command ended with {status}; the last lines of {}:", log.display());
    for line in tail {
        text.push_str("\n  ");
        text.push_str(line.as_ref());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_is_logged_and_seen() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let log = dir.path().join("log");
        let mut lines = Vec::new();
        run_filtered(shell("echo one; echo two >&2; echo three"), &log, |line| {
            lines.push(line.to_owned());
            line != "three"
        })
        .expect("succeeds");
        assert_eq!(lines, ["one", "two", "three"]);
        assert_eq!(std::fs::read_to_string(&log).expect("logged"), "one\ntwo\n");
    }

    #[test]
    fn a_failure_shows_the_end_of_the_log_and_where_it_is() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let log = dir.path().join("log");
        let error = run(shell("seq 1 100; exit 3"), &log, |_| ()).expect_err("fails").to_string();
        let same = run_undisturbed(shell("seq 1 100; exit 3"), &log).expect_err("fails").to_string();
        assert_eq!(error, same);
        assert!(error.contains("exit status: 3") && error.contains(&log.display().to_string()), "{error}");
        assert!(
            error.contains("\n  81\n") && error.ends_with("\n  100") && !error.contains("\n  80\n"),
            "{error}"
        );
    }

    #[test]
    fn a_daemon_that_keeps_the_pipe_does_not_keep_us() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let pid = dir.path().join("pid");
        let script = format!("setsid sh -c 'echo $$ > {}; exec sleep 1000' & echo done", pid.display());
        run(
            shell(&format!("{script}; while [ ! -s {} ]; do :; done", pid.display())),
            &dir.path().join("log"),
            |_| (),
        )
        .expect("succeeds");
        let pid = std::fs::read_to_string(&pid).expect("started").trim().parse().expect("a pid");
        let pid = rustix::process::Pid::from_raw(pid).expect("not zero");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("was alive");
    }
}
