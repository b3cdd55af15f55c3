use super::*;

fn evidence(findings: &[Finding]) -> Evidence {
    Evidence::of(findings.iter().cloned(), "hung for 3 s")
}

fn trying(step: &str) -> Finding {
    Finding::Trying(step.into())
}

#[test]
fn a_fast_kvm_is_usable_and_a_slow_one_is_not() {
    let fast = evidence(&[trying("a"), Finding::Speed(0.97), trying("b"), Finding::Passed]);
    assert!(fast.usable);
    assert_eq!(fast.steps_passed, ["a", "b"]);
    assert_eq!(fast.verdict(), "KVM runs kernel code at 0.97 of the host's speed");
    let slow = evidence(&[trying("a"), Finding::Speed(0.0012), Finding::Passed]);
    assert!(!slow.usable);
    assert_eq!(slow.verdict(), "KVM runs kernel code at 0.00120 of the host's speed: it is emulated");
}

#[test]
fn a_probe_that_hangs_or_dies_says_where() {
    let hung = evidence(&[trying("a"), trying("b")]);
    assert!(!hung.usable);
    assert_eq!(hung.steps_passed, ["a"]);
    assert_eq!(hung.verdict(), "KVM cannot run an ordinary kernel: b: the probe hung for 3 s");
    let at_once = evidence(&[]);
    assert_eq!(at_once.failure.as_deref(), Some("setting a VM up: the probe hung for 3 s"));
}

#[test]
fn fast_code_is_no_use_if_a_step_fails() {
    let findings = [trying("a"), Finding::Speed(1.0), trying("b"), Finding::Failed("b: triple fault".into())];
    let failed = evidence(&findings);
    assert_eq!((failed.usable, failed.steps_passed.as_slice()), (false, ["a".to_owned()].as_slice()));
    assert_eq!(
        failed.verdict(),
        "KVM cannot run an ordinary kernel: b: triple fault; it runs kernel code at 1.00 of the host's speed"
    );
    assert!(!evidence(&[trying("a"), Finding::Passed]).usable);
}

#[test]
fn findings_are_lines_both_sides_read() {
    for finding in [trying("a"), Finding::Speed(0.5), Finding::Passed, Finding::Failed("x".into())] {
        let line = serde_json::to_string(&finding).expect("writes");
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Finding>(&line).expect("reads"), finding);
    }
}

#[test]
fn a_probing_process_that_hangs_is_killed_and_one_that_dies_is_noticed() {
    let probe = |script: &str, deadline| {
        let mut shell = Command::new("sh");
        shell.args(["-c", script]);
        examine(shell, deadline).expect("sh runs").failure.expect("no verdict")
    };
    let said = r#"echo '{"trying":"x"}';"#;
    let deadline = Duration::from_millis(200);
    assert_eq!(probe(&format!("{said} sleep 1000"), deadline), "x: the probe hung for 200ms");
    let failure = probe(&format!("{said} kill -SEGV $$"), Duration::from_secs(60));
    assert!(failure.starts_with("x: the probe ended early (signal: 11"), "{failure}");
}

#[test]
fn tcg_needs_no_proof() {
    let accelerator = choose(Request::Tcg).expect("no probe");
    assert_eq!((accelerator.kind, accelerator.evidence), (Kind::Tcg, None));
}
