//! `replay.sh` of a run, as a person uses it: each part in a terminal of its own.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rexpect::ReadUntil;
use rexpect::session::{PtySession, spawn_command};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Milliseconds that a wait for a terminal's output may take.
const LIMIT_MS: u64 = 60_000;
/// A pattern that no healthy guest prints.
const FAILURE: &str = "Kernel panic|Oops: |vvu-init: failed|not found|No such";

/// A part of the run in a pseudo-terminal.
struct Terminal(PtySession);

impl Terminal {
    fn open(script: &Path, part: &str) -> Self {
        let mut command = Command::new(script);
        command.arg(part);
        Self(spawn_command(command, Some(LIMIT_MS)).expect("a terminal"))
    }

    /// Waits for `pattern`.
    fn sees(&mut self, pattern: &str) {
        let patterns =
            [pattern, FAILURE].map(|pattern| ReadUntil::Regex(pattern.parse().expect("a pattern")));
        let (before, seen) = self.0.exp_any(patterns.into()).unwrap_or_else(|error| panic!("{error}"));
        let right: regex::Regex = pattern.parse().expect("a pattern");
        assert!(right.is_match(&seen), "{before}{seen}");
    }

    fn types(&mut self, line: &str) {
        self.0.send_line(line).expect("typed");
    }

    /// Waits until the process has ended by itself.
    fn ends(mut self) {
        self.0.exp_eof().expect("the end");
    }
}

/// The proxy, once it listens. It ends with its handle.
struct Proxy(Child);

impl Proxy {
    fn open(script: &Path) -> Self {
        let mut command = Command::new(script);
        let mut proxy = Self(command.arg("vvu").stdout(Stdio::piped()).spawn().expect("the script starts"));
        let lines = BufReader::new(proxy.0.stdout.take().expect("piped")).lines();
        let ready = lines.map_while(Result::ok).any(|line| line == "vvu: proxy ready");
        assert!(ready, "the proxy does not listen");
        proxy
    }

    fn ends(mut self) -> Option<i32> {
        let pid = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, Signal::TERM).expect("asked to end");
        self.0.wait().expect("ended").code()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Mostly it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn passed_run(target: &Path) -> PathBuf {
    let status = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["e2e", "block"])
        .env("VVU_RUNS", target.join("e2e"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(status.expect("xtask starts").success());
    target.join("e2e/latest").canonicalize().expect("a run directory")
}

#[test]
fn a_run_can_be_done_again_by_hand() {
    let dir = tempfile::tempdir().expect("a directory");
    let run = passed_run(dir.path());
    let script = run.join("replay.sh");
    let report = std::fs::read(run.join("report.json")).expect("a report");
    let report: Value = serde_json::from_slice(&report).expect("JSON");
    let checks = report["checks"].as_array().expect("a list");
    let content = checks.iter().find(|check| check["name"] == "content-matches").expect("checked");
    let digest = content["evidence"].as_str().and_then(|text| text.split(' ').next()).expect("a digest");
    assert_eq!(digest.len(), 64);

    let help = Command::new(&script).output().expect("the script starts");
    let help = String::from_utf8(help.stdout).expect("UTF-8");
    for line in ["replay.sh vvu\n", "replay.sh device\n", "replay.sh sibling\n"] {
        assert!(help.contains(line), "{help}");
    }

    let proxy = Proxy::open(&script);
    let mut device = Terminal::open(&script, "device");
    device.sees("vvu-init: ready");
    device.types("vvu bind 0000:00:10.0 && vvu device block --vfio 0000:00:10.0 --file /disk.img");
    device.sees("block back-end ready on");
    let mut sibling = Terminal::open(&script, "sibling");
    sibling.sees(r"\[vda\] \d+ 512-byte logical blocks");
    sibling.sees("vvu-init: ready");
    sibling.types("sha256sum /dev/vda");
    sibling.sees(&format!("{digest}  /dev/vda"));
    sibling.types("poweroff");
    sibling.ends();
    // Ctrl-C ends the back-end.
    device.0.send_control('c').expect("typed");
    device.types("poweroff");
    device.ends();
    assert_eq!(proxy.ends(), Some(0));
    for name in ["vvu.vfio", "vvu.vhost", "vvu.mem"] {
        assert!(!run.join(name).exists(), "{name} is left");
    }
}
