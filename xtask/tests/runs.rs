//! Runs with VMs: side by side, interrupted, and failing.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn e2e(target: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.arg("e2e").args(args).env("VVU_RUNS", target.join("e2e")).stdin(Stdio::null());
    command
}

/// The only run directory under `target`.
fn run_dir(target: &Path) -> PathBuf {
    target.join("e2e/latest").canonicalize().expect("a run directory")
}

fn report(run: &Path) -> Value {
    let bytes = fs::read(run.join("report.json")).expect("a report");
    serde_json::from_slice(&bytes).expect("JSON")
}

/// The exit code and the report of a run in which `steps` are done in the VM `one`.
fn steps_in_one(steps: &str) -> (Option<i32>, Value) {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("s.json");
    let vms = r#"{"one": {"memory_mib": 128}}"#;
    let text = format!(r#"{{"name": "s", "description": "", "vms": {vms}, "steps": [{steps}]}}"#);
    fs::write(&file, text).expect("written");
    let mut run = e2e(dir.path(), &["--scenario-file", file.to_str().expect("UTF-8")]);
    let status = run.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("xtask starts");
    (status.code(), report(&run_dir(dir.path())))
}

/// The living processes of a run.
fn processes(run: &Path) -> Vec<u32> {
    let name = run.file_name().expect("a name").to_str().expect("UTF-8");
    let mark = format!("VVU_RUN={name}");
    let entries = fs::read_dir("/proc").expect("procfs").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let of_run = |pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes())
    };
    pids.filter(of_run).collect()
}

#[test]
fn two_runs_at_once_pass_and_one_of_them_has_a_long_path() {
    let dir = tempfile::tempdir().expect("a directory");
    let targets = [dir.path().join("a"), dir.path().join("b".repeat(100))];
    let runs: Vec<_> = targets
        .iter()
        .map(|target| e2e(target, &["block", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn())
        .collect();
    for (run, target) in runs.into_iter().zip(&targets) {
        let output = run.expect("xtask starts").wait_with_output().expect("ends");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{stderr}");
        let printed: Value = serde_json::from_slice(&output.stdout).expect("only a report on stdout");
        assert_eq!(printed, report(&run_dir(target)));
        assert!(printed["checks"].as_array().expect("a list").iter().all(|check| check["result"] == "pass"));
    }
}

#[test]
fn an_interrupted_run_leaves_nothing_but_its_directory() {
    // In the set-up, while a VM boots, while the back-end serves.
    for stage in ["accelerator", "image", "vda-appears"] {
        let dir = tempfile::tempdir().expect("a directory");
        let mut xtask = e2e(dir.path(), &["block"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("xtask starts");
        let mut lines = BufReader::new(xtask.stderr.take().expect("piped")).lines();
        let seen = lines.find(|line| line.as_ref().is_ok_and(|line| line.starts_with(stage)));
        assert!(seen.is_some(), "no stage {stage}");
        let pid = i32::try_from(xtask.id()).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, Signal::INT).expect("interrupted");
        lines.for_each(drop);
        let status = xtask.wait().expect("ends");
        assert_eq!(status.code(), Some(130), "after {stage}");

        let run = run_dir(dir.path());
        assert_eq!(report(&run)["result"], "interrupted", "after {stage}");
        assert_eq!(processes(&run), Vec::<u32>::new(), "after {stage}");
        let left: Vec<_> = fs::read_dir(&run)
            .expect("listed")
            .map(|entry| entry.expect("listed").path())
            .filter(|path| {
                path.extension().is_some_and(|kind| ["vfio", "vhost", "mem"].iter().any(|name| kind == *name))
            })
            .collect();
        assert_eq!(left, Vec::<PathBuf>::new(), "after {stage}");
    }
}

#[test]
fn a_failed_check_says_what_was_seen_and_ends_with_1() {
    let (code, report) = steps_in_one(
        r#"
        {"run": {"check": "good", "vm": "one", "command": "echo fine"}},
        {"run": {"check": "bad", "vm": "one", "command": "echo seen; exit 3"}},
        {"power_off": {"check": "later", "vm": "one"}}"#,
    );
    assert_eq!(code, Some(1));
    let results: Vec<_> =
        ["good", "bad", "later", "nothing-left"].into_iter().zip(["pass", "fail", "skip", "pass"]).collect();
    let checks = report["checks"].as_array().expect("a list");
    let got: Vec<_> = checks.iter().map(|check| (check["name"].as_str(), check["result"].as_str())).collect();
    let want: Vec<_> = results.into_iter().map(|(name, result)| (Some(name), Some(result))).collect();
    assert_eq!(got, want);
    let evidence = checks[1]["evidence"].as_str().expect("text");
    assert!(evidence.contains("exit code 3, want exit code 0") && evidence.contains("| seen"), "{evidence}");
}

#[test]
fn a_spawned_command_that_ends_fails_the_wait_at_once() {
    let (code, report) = steps_in_one(
        r#"
        {"spawn": {"check": "c", "vm": "one", "name": "backend", "command": "echo no such device >&2; exit 1"}},
        {"console": {"check": "c", "vm": "one", "line": "^ready$", "timeout_s": 10000}}"#,
    );
    assert_eq!(code, Some(1));
    let evidence = report["checks"][0]["evidence"].as_str().expect("text");
    assert!(evidence.contains("backend ended with exit code 1"), "{evidence}");
    assert!(evidence.contains("no such device"), "{evidence}");
}

/// Commands, QEMU and the guest end in every way there is, and come back.
#[test]
fn what_is_taken_away_comes_back_and_is_counted() {
    let (code, report) = steps_in_one(
        r#"
        {"start": {"vm": "one"}},
        {"repeat": {"check": "commands", "times": 2, "steps": [
            {"spawn": {"vm": "one", "name": "job", "command": "trap '' TERM; while :; do sleep 1; done"}},
            {"kill": {"vm": "one", "name": "job", "signal": "KILL"}},
            {"spawn": {"vm": "one", "name": "job", "command": "exit 3", "expect": {"exit": 3}}},
            {"wait": {"vm": "one", "name": "job"}},
            {"run": {"vm": "one", "command": "echo {round}", "expect": {"stdout": "^(\\d)$"}, "save": "rounds", "measure": true}}]}},
        {"spawn": {"check": "guest", "vm": "one", "name": "job", "command": "sleep 1000"}},
        {"run": {"check": "guest", "vm": "one", "command": "touch /mark"}},
        {"reboot": {"check": "guest", "vm": "one"}},
        {"run": {"check": "guest", "vm": "one", "command": "test ! -e /mark"}},
        {"spawn": {"check": "guest", "vm": "one", "name": "job", "command": "sleep 1000"}},
        {"kill_vm": {"check": "qemu", "vm": "one"}},
        {"start": {"check": "qemu", "vm": "one"}},
        {"power_off": {"check": "qemu", "vm": "one"}}"#,
    );
    assert_eq!(code, Some(0), "{report:#}");
    let want = serde_json::json!({"faults_injected": 4.0, "rounds": 3.0});
    assert_eq!(report["measurements"], want);
}

#[test]
fn a_command_that_ends_otherwise_than_expected_fails_the_wait() {
    let (code, report) = steps_in_one(
        r#"
        {"spawn": {"check": "c", "vm": "one", "name": "job", "command": "exit 4", "expect": {"exit": 3}}},
        {"wait": {"check": "c", "vm": "one", "name": "job"}}"#,
    );
    assert_eq!(code, Some(1));
    let evidence = report["checks"][0]["evidence"].as_str().expect("text");
    assert!(evidence.contains("job ended with exit code 4"), "{evidence}");
}
