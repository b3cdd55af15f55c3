//! Bad input ends with exit code 2 and a message that names the remedy, before anything expensive is done.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

/// A valid scenario without VMs' devices; `TEXT` is replaced.
const SCENARIO: &str = r#"{"name": "s", "description": "", "vms": {"device": {"memory_mib": 128 EXTRA}},
    "disks": {DISKS}, "steps": [{"run": {"check": "c", "vm": "device", "command": "true"}}]}"#;

fn xtask(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(args)
        .current_dir(dir)
        .env("VVU_RUNS", dir.join("target/e2e"))
        .output()
        .expect("xtask starts")
}

/// Runs xtask and wants exit code 2 and all of `want` on stderr, and nothing on stdout.
fn refused(dir: &Path, args: &[&str], want: &[&str]) {
    let output = xtask(dir, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    for want in want {
        assert!(stderr.contains(want), "{args:?}: {stderr:?} lacks {want:?}");
    }
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{args:?}");
}

fn scenario(dir: &Path, extra: &str, disks: &str) {
    let text = SCENARIO.replace("EXTRA", extra).replace("DISKS", disks);
    fs::write(dir.join("s.json"), text).expect("written");
}

#[test]
fn an_unknown_scenario() {
    let dir = tempfile::tempdir().expect("a directory");
    refused(dir.path(), &["e2e", "blok"], &["\"blok\"", "known are", "block", "--scenario-file"]);
    assert!(!dir.path().join("target").exists(), "a run directory was made");
}

#[test]
fn a_malformed_scenario() {
    let dir = tempfile::tempdir().expect("a directory");
    let args = ["e2e", "--scenario-file", "s.json"];
    refused(dir.path(), &args, &["cannot read the scenario s.json"]);
    scenario(dir.path(), r#", "iommu": "smmu""#, "");
    refused(dir.path(), &args, &["s.json", "vms.device.iommu", "virtio-iommu"]);
    fs::write(dir.path().join("s.json"), "{\"name\": ").expect("written");
    refused(dir.path(), &args, &["s.json", "line 1"]);
}

#[test]
fn a_disk_that_is_none() {
    let dir = tempfile::tempdir().expect("a directory");
    let args = ["e2e", "--scenario-file", "s.json"];
    scenario(dir.path(), "", r#""d": {"file": "d.img"}"#);
    refused(dir.path(), &args, &["disks.d", "d.img", "No such file"]);
    fs::create_dir(dir.path().join("d.img")).expect("made");
    refused(dir.path(), &args, &["disks.d", "not a regular file"]);
    fs::remove_dir(dir.path().join("d.img")).expect("removed");
    fs::write(dir.path().join("d.img"), [0; 1000]).expect("written");
    refused(dir.path(), &args, &["disks.d", "1000 bytes", "multiple of 512", "truncate"]);
}

#[test]
fn more_memory_than_there_is() {
    let dir = tempfile::tempdir().expect("a directory");
    let text = SCENARIO.replace("128 EXTRA", "1048576").replace("DISKS", "");
    fs::write(dir.path().join("s.json"), text).expect("written");
    let want = ["too little memory", "1048576 MiB", "memory_mib"];
    refused(dir.path(), &["e2e", "--scenario-file", "s.json"], &want);
    assert!(!dir.path().join("target").exists(), "a run directory was made");
}

#[test]
fn a_qemu_without_vfio_user() {
    let dir = tempfile::tempdir().expect("a directory");
    let qemu = dir.path().join("qemu");
    let script = "#!/bin/sh\n[ \"$1\" = --version ] && echo 'QEMU emulator version 7.2.0' && exit\nexit 1\n";
    fs::write(&qemu, script).expect("written");
    fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).expect("executable");
    scenario(dir.path(), "", "");
    let args = ["e2e", "--scenario-file", "s.json", "--qemu"];
    refused_with_report(dir.path(), &[&args[..], &["qemu"]].concat(), &["vfio-user-pci", "7.2.0", "10.1"]);
    refused_with_report(dir.path(), &[&args[..], &["none"]].concat(), &["none: no such file"]);
}

#[test]
fn a_kernel_that_is_none() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("vmlinux"), "not a kernel").expect("written");
    scenario(dir.path(), "", "");
    let args = ["e2e", "--scenario-file", "s.json", "--kernel", "vmlinux"];
    refused_with_report(dir.path(), &args, &["vmlinux"]);
}

/// As [`refused`], after the run began: there is a report that says the same.
fn refused_with_report(dir: &Path, args: &[&str], want: &[&str]) {
    let output = xtask(dir, &[args, &["--json"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("only a report on stdout");
    assert_eq!(report["result"], "error", "{report}");
    let error = report["error"].as_str().expect("a message");
    for want in want {
        assert!(error.contains(want) && stderr.contains(want), "{args:?}: {error:?} lacks {want:?}");
    }
    let kept = fs::read(dir.join("target/e2e/latest/report.json")).expect("a report");
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&kept).expect("JSON"), report);
}
