use std::collections::BTreeMap;

use serde_json::{Value, json};
use vvu_process::progress::StageTime;
use vvu_testvm::facts::{Accelerator, Kernel, Outcome, Qemu};

use super::*;

fn report() -> Report {
    Report {
        scenario: "block".into(),
        result: Outcome::Pass,
        error: None,
        accelerator: Some(Accelerator { used: "tcg".into(), reason: "no /dev/kvm".into() }),
        qemu: Some(Qemu { path: "/usr/bin/qemu-system-x86_64".into(), version: "11.1.3".into() }),
        qemus: BTreeMap::new(),
        kernels: BTreeMap::new(),
        kernel: Some(Kernel { version: "6.12.117".into(), config_digest: "ab".into() }),
        stages: vec![StageTime { name: "image".into(), began: 2.5, seconds: 1.5 }],
        checks: vec![Check { name: "capacity".into(), result: CheckResult::Pass, evidence: "131072".into() }],
        measurements: BTreeMap::from([("bad_blocks".into(), 0.0)]),
        totals: Totals {
            seconds: 9.5,
            launch_to_vda_seconds: Some(3.0),
            bare_boot_seconds: Some(1.0),
            ratio_to_bare_boot: Some(3.0),
        },
        outer: None,
    }
}

#[test]
fn the_keys_are_stable() {
    let want = json!({
        "scenario": "block",
        "result": "pass",
        "error": null,
        "accelerator": {"used": "tcg", "reason": "no /dev/kvm"},
        "qemu": {"path": "/usr/bin/qemu-system-x86_64", "version": "11.1.3"},
        "kernel": {"version": "6.12.117", "config_digest": "ab"},
        "stages": [{"name": "image", "began": 2.5, "seconds": 1.5}],
        "checks": [{"name": "capacity", "result": "pass", "evidence": "131072"}],
        "measurements": {"bad_blocks": 0.0},
        "totals": {"seconds": 9.5, "launch_to_vda_seconds": 3.0, "bare_boot_seconds": 1.0, "ratio_to_bare_boot": 3.0},
    });
    assert_eq!(serde_json::to_value(report()).expect("JSON"), want);
    assert_eq!(serde_json::from_value::<Report>(want).expect("a report"), report());
}

#[test]
fn the_bare_boot_is_there_only_when_measured() {
    let totals = Totals { seconds: 1.0, ..Totals::default() };
    let want = json!({"seconds": 1.0, "launch_to_vda_seconds": null});
    assert_eq!(serde_json::to_value(totals).expect("JSON"), want);
}

#[test]
fn several_reports_are_under_one_key() {
    let value = serde_json::to_value(Reports { scenarios: vec![report()] }).expect("JSON");
    assert_eq!(value["scenarios"][0]["scenario"], Value::from("block"));
}

#[test]
fn a_run_passes_only_if_all_its_checks_do() {
    let mut report = report();
    assert_eq!(report.judge(), Outcome::Pass);
    report.checks.push(Check::default());
    assert_eq!(report.judge(), Outcome::Fail);
    report.checks.clear();
    assert_eq!(report.judge(), Outcome::Fail);
}

#[test]
fn the_table_shows_failures_whole_and_successes_in_a_line() {
    let mut report = report();
    report.checks.push(Check {
        name: "backend-ready".into(),
        result: CheckResult::Fail,
        evidence: "no line\nlast lines:\n| x".into(),
    });
    report.checks[0].evidence = "a\nb".into();
    let want = "  ok    capacity       b
  FAIL  backend-ready  no line
        last lines:
        | x
stages of 1 s or more, partly side by side: image 2 s
block passed in 9.5 s, launch to /dev/vda 3.0 s = 3.0 bare boots of 1.00 s, tcg, bad_blocks 0
";
    assert_eq!(table(&report), want);
}

#[test]
fn the_summary_has_a_line_for_each_scenario() {
    let failed = Report { scenario: "longer-name".into(), result: Outcome::Fail, ..report() };
    let want = "
block        passed            9.5 s
longer-name  FAILED            9.5 s
1 of 2 passed in 19.0 s
";
    assert_eq!(summary(&[report(), failed]), want);
}
