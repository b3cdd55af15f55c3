//! `cargo xtask doctor` as a process: on this machine, and on one with nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Exit code, findings by id, and stderr.
fn doctor(dir: &Path, change: impl FnOnce(&mut Command)) -> (Option<i32>, Value) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.args(["doctor", "--json"]).env("VVU_RUNS", dir.join("target/e2e"));
    change(&mut command);
    let output = command.output().expect("xtask starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    let findings = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {stderr}"));
    (output.status.code(), findings)
}

fn status<'a>(findings: &'a Value, id: &str) -> &'a str {
    let all = findings["requirements"].as_array().expect("a list");
    let found = all.iter().find(|requirement| requirement["id"] == id);
    found.unwrap_or_else(|| panic!("no {id}"))["status"].as_str().expect("text")
}

#[test]
fn this_machine_can_build_and_nothing_is_changed() {
    let dir = tempfile::tempdir().expect("a directory");
    let (code, findings) = doctor(dir.path(), |_| ());
    assert!(matches!(code, Some(0 | 1 | 3)), "{code:?}: {findings}");
    assert_eq!(status(&findings, "rust"), "ok");
    assert!(!dir.path().join("target").exists(), "a run directory was made");
}

#[test]
fn a_bare_machine_is_told_what_it_lacks() {
    let dir = tempfile::tempdir().expect("a directory");
    let (bin, cache) = (dir.path().join("bin"), dir.path().join("cache"));
    fs::create_dir(&bin).expect("made");
    let (code, findings) = doctor(dir.path(), |command| {
        command
            .env("PATH", &bin)
            .env("HOME", dir.path())
            .env("XDG_CACHE_HOME", &cache)
            .env_remove("CARGO_HOME");
    });
    assert_eq!(code, Some(3), "{findings}");
    assert_eq!(findings["status"], "missing");
    for id in ["rust", "package-gcc", "package-flex", "libc-static", "qemu", "kernel", "guest-tools"] {
        assert_eq!(status(&findings, id), "missing", "{id}");
    }
    for id in ["apt", "nextest"] {
        assert_eq!(status(&findings, id), "worse", "{id}");
    }
    assert_eq!(status(&findings, "cache"), "ok");
    for requirement in findings["requirements"].as_array().expect("a list") {
        let met = requirement["status"] == "ok";
        assert_eq!(requirement["consequence"].is_null(), met, "{requirement}");
        assert!(!requirement["evidence"].as_str().expect("text").is_empty());
    }
    assert!(!cache.exists(), "the cache was made");
}
