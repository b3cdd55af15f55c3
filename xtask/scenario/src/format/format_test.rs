use super::step::{ExpectedResult, RunStep};
use super::*;
use anyhow::Result;
use std::path::Path;
use vvu_testvm::{Addr, Slot};

const MINIMAL: &str = r#"{
    "name": "one", "description": "d",
    "vms": {"device": {"memory_mib": 256}, "sibling": {"memory_mib": 256}},
    "vvu": {"vvu": {}},
    "disks": {"disk": {"size_mib": 1}},
    "steps": [{"run": {"vm": "device", "command": "lspci -s {bdf}", "expect": {"stdout": "{bdf} (.*)"}, "save": "line"}},
              {"run": {"vm": "sibling", "command": "echo {line} {disk} {sha256} {capacity_sectors}"}}]
}"#;

/// How the last step begins.
const LAST: &str = r#"{"run": {"vm": "sibling""#;

fn parse(text: &str) -> Result<Scenario> {
    Scenario::parse(text, Path::new("/nonexistent"))
}

/// `MINIMAL` with `from` replaced by `to` must fail with all of `want` in the message.
fn refused(from: &str, to: &str, want: &[&str]) {
    assert!(MINIMAL.contains(from), "{from} is not in the sample");
    let error = format!("{:#}", parse(&MINIMAL.replace(from, to)).expect_err(to));
    for want in want {
        assert!(error.contains(want), "{to}: {error:?} lacks {want:?}");
    }
}

#[test]
fn a_minimal_scenario_gets_its_defaults() {
    let scenario = parse(MINIMAL).expect("valid");
    assert_eq!(scenario.vvu["vvu"].addr, Addr::Fixed(Slot::DEFAULT));
    assert_eq!(scenario.vms["device"].cpus, 1);
    assert_eq!(scenario.memory_mib(), 512);
    let Step::Run(RunStep { command, expect: ExpectedResult { exit, .. }, .. }) = &scenario.steps[0] else {
        panic!("{:?} is no run", scenario.steps[0]);
    };
    assert_eq!((command.as_str(), *exit), ("lspci -s {bdf}", 0));
    assert_eq!(scenario.steps[0].timeout_s(), 20);
}

#[test]
fn a_vm_may_name_its_vmm_and_a_scenario_its_kernels_source() {
    let text = MINIMAL
        .replace(r#""sibling": {"#, r#""sibling": {"vmm": "debian-12", "#)
        .replace(r#""device": {"#, r#""device": {"vmm": "debian-14", "#)
        .replace(r#""name": "one""#, r#""name": "one", "kernel_source": "6.1""#);
    let scenario = parse(&text).expect("valid");
    assert_eq!(scenario.vms["sibling"].vmm.as_deref(), Some("debian-12"));
    assert_eq!(scenario.kernel_source.as_deref(), Some("6.1"));
}

#[test]
fn a_variable_may_use_placeholders_and_other_variables_and_get_another_text() {
    let variables = r#""name": "one", "variables": {"all": "{program} {disk} {{socket}}", "program": "p"}"#;
    let mut scenario = parse(&MINIMAL.replace(r#""name": "one""#, variables)).expect("valid");
    let all = |scenario: &Scenario| {
        let values = scenario.values(|_| VvuFacts::default(), |_| DiskFacts::default()).expect("known");
        values.fill("{all}").expect("a placeholder")
    };
    assert_eq!(all(&scenario), "p /disk.img {socket}");
    scenario.set_variable("program", "q --file={disk}").expect("a variable");
    assert_eq!(all(&scenario), "q --file=/disk.img /disk.img {socket}");
    for (name, text, want) in [
        ("other", "", "no variable \"other\": known are all, program"),
        ("program", "{all}", "variables.all: it uses itself"),
        ("program", "{nothing}", "unknown placeholder {nothing}"),
    ] {
        let error = format!("{:#}", scenario.clone().set_variable(name, text).expect_err(text));
        assert!(error.contains(want), "{error:?} lacks {want:?}");
    }
    let refused_name = |name: &str, want| {
        refused(r#""name": "one""#, &format!(r#""name": "one", "variables": {{"{name}": "x"}}"#), &[want]);
    };
    refused_name("disk", "variables.disk: a placeholder has this name");
    refused_name("Program", "variables: \"Program\" is not a name");
}

#[test]
fn errors_name_the_json_path_and_what_is_wanted() {
    refused(r#""size_mib": 1"#, r#""size_mib": "1""#, &["disks.disk.size_mib"]);
    refused(r#""memory_mib": 256}, "s"#, r#""memory": 256}, "s"#, &["vms.device", "memory_mib"]);
    refused(r#""vvu": {}"#, r#""vvu": {"addr": "10.0"}"#, &["vvu.vvu.addr", "00:10.0"]);
    refused(r#""vvu": {}"#, r#""vvu": {"addr": "00:1f.0"}"#, &["vvu.vvu.addr", "01 to 1e"]);
    refused(r#""vvu": {}"#, r#""vvu": {"queues": 0}"#, &["vvu.vvu.queues"]);
    refused(r#""vvu": {}"#, r#""vvu": {"device_vm": "x"}"#, &["vvu.vvu", "\"x\"", "device, sibling"]);
    refused(r#""vvu": {}"#, r#""vvu": {}, "b": {}"#, &["vvu.vvu.addr", "00:10.0"]);
    let frontend = |frontend: &str, want: &[&str]| {
        refused(r#""vvu": {}"#, &format!(r#""vvu": {{"frontend": {frontend}}}"#), want);
    };
    frontend(r#"{"x": {}}"#, &["vvu.vvu.frontend", "`x`", "console"]);
    frontend(r#"{"fs": {}}"#, &["vvu.vvu.frontend.fs", "tag"]);
    frontend(r#"{"rng": {"queues": 2}}"#, &["vvu.vvu.frontend.rng.queues", "vmm_properties"]);
    frontend(r#"{"block": {"queue_size": "16"}}"#, &["vvu.vvu.frontend.block.queue_size"]);
    frontend(r#"{"block": {"queue_size": 17}}"#, &["at vvu.vvu.frontend", "power of two"]);
    frontend(
        r#"{"block": {"features": {"packed": true}}}"#,
        &["frontend.block.features.packed", "ring_packed"],
    );
    frontend(r#"{"rng": {"vmm_properties": {"a": "b,c"}}}"#, &["at vvu.vvu.frontend", "\"b,c\""]);
    refused(
        r#""memory_mib": 256}, "s"#,
        r#""memory_mib": 256, "programs": ["x"]}, "s"#,
        &["vms.device", "\"x\""],
    );
    let vmm = |name: &str| format!(r#""memory_mib": 256, "vmm": "{name}"}}, "s"#);
    refused(r#""memory_mib": 256}, "s"#, &vmm("x"), &["vms.device.vmm", "\"x\"", "debian-12"]);
    let old = vmm("debian-12");
    refused(r#""memory_mib": 256}, "s"#, &old, &["vms.device.vmm", "vfio-user-pci", "debian-14"]);
    refused(r#""name": "one""#, r#""kernel_source": "x", "name": "one""#, &["kernel_source", "newest"]);
    refused(r#""name": "one""#, r#""kernel": ["../x"], "name": "one""#, &["at kernel", "../x"]);
    refused(r#""size_mib": 1"#, r#""size_mib": 0"#, &["disks.disk", "size_mib"]);
    refused(r#""size_mib": 1"#, r#""file": "no.img""#, &["disks.disk", "/nonexistent/no.img"]);
    refused(r#""lspci -s {bdf}""#, r#""lspci {bfd}""#, &["at steps[0]: command", "{bfd}", "{bdf}"]);
    refused(r#""command": "lspci"#, r#""comand": "lspci"#, &["at steps[0].run.comand", "`command`"]);
    refused(r#""vm": "sibling""#, r#""vm": "sib""#, &["at steps[1]", "\"sib\"", "device, sibling"]);
    refused(r#""vm": "sibling", "#, "", &["at steps[1].run", "missing field `vm`"]);
    refused(r#""save": "line""#, r#""save": "line", "timeout_s": -1"#, &["steps[0].run.timeout_s"]);
    refused(r#""save": "line""#, r#""save": "line", "timeout_s": 0"#, &["at steps[0]: timeout_s: 0"]);
    refused(r#""save": "line""#, r#""measure": true"#, &["at steps[0]: measure", "`save`"]);
    refused(r#""save": "line""#, r#""milestone": "x""#, &["steps[0].run.milestone", "disk-visible"]);
    refused(r#""expect": {"stdout": "{bdf} (.*)"}, "#, "", &["at steps[0]: save: want `expect.stdout`"]);
    refused("{bdf} (.*)", "(", &["at steps[0]: expect.stdout"]);
    refused("{line}", "{later}", &["at steps[1]", "{later}", "{line}"]);
    refused(r#""name": "one""#, r#""name": "../one""#, &["at name"]);
    refused("]\n}", "]\n} x", &["trailing characters"]);
    refused(r#""memory_mib": 256"#, r#""memory_mib": 256, "cpu": "max""#, &["vms.device.cpu", "x86-64-v2"]);
    // Each of these comes before the last step.
    for (steps, want) in [
        (r#"{}"#, &["at steps[1]: an empty step", "exactly one"][..]),
        (r#"{"run": {}, "start": {}}"#, &["at steps[1]: `run`, `start`", "exactly one"]),
        (r#"{"runn": {"vm": "device"}}"#, &["at steps[1]", "`runn`", "`run`", "`power_off`"]),
        (r#"{"kill_proxy": {"vvu": "x"}}"#, &["at steps[1]", "\"x\"", "`vvu` has vvu"]),
        (r#"{"start_proxy": {"vvu": "vvu"}}"#, &["at steps[1]", "runs already"]),
        (r#"{"kill_worker": {"vvu": "vvu"}}"#, &["at steps[1]", "is not `supervised`"]),
        (r#"{"start_proxy": {"vvu": "vvu", "vm": "device"}}"#, &["at steps[1].start_proxy.vm"]),
        (r#"{"trace": {"vvu": "x", "matches": "y"}}"#, &["at steps[1]", "no vvu device is called \"x\""]),
        (r#"{"trace": {"vvu": "vvu"}}"#, &["at steps[1]", "want `expect`, `matches` or both"]),
        (r#"{"trace": {"vvu": "vvu", "vm": "device", "matches": "y"}}"#, &["at steps[1].trace.vm"]),
        (r#"{"trace": {"vvu": "vvu", "matches": "("}}"#, &["at steps[1]: matches"]),
        (
            r#"{"trace": {"vvu": "vvu", "expect": [{"request": "SET_FEATURES", "has": ["PACKED"]}]}}"#,
            &["at steps[1]: expect[0]: has", "\"PACKED\"", "RING_PACKED"],
        ),
        (r#"{"trace": {"vvu": "vvu", "expect": [{"requst": "x"}]}}"#, &["steps[1].trace.expect[0].requst"]),
        (r#"{"kill_vm": {"vm": "sibling"}}"#, &["at steps[2]", "does not run"]),
        (r#"{"start": {"vm": "sibling"}}, {"start": {"vm": "sibling"}}"#, &["at steps[2]", "runs already"]),
        (r#"{"kill": {"vm": "sibling", "name": "x", "signal": "STOP"}}"#, &["steps[1].kill.signal", "TERM"]),
        (r#"{"spawn": {"vm": "sibling", "command": "x"}}"#, &["at steps[1].spawn", "`name`"]),
    ] {
        refused(LAST, &format!("{steps}, {LAST}"), want);
    }
}

/// `MINIMAL` with a repeat before its last step.
fn with_repeat(times: u32, steps: &str) -> String {
    let repeat = format!(r#"{{"repeat": {{"check": "c", "times": {times}, "steps": [{steps}]}}}}"#);
    MINIMAL.replace(LAST, &format!("{repeat}, {LAST}"))
}

#[test]
fn a_repeat_is_unrolled() {
    let text = with_repeat(
        3,
        r#"{"run": {"vm": "sibling", "command": "echo {round}"}}, {"run": {"check": "d", "vm": "device", "command": "x"}}"#,
    );
    let scenario = parse(&text).expect("valid");
    let steps = scenario.unrolled(u32::MAX);
    let shape: Vec<_> =
        steps.iter().map(|placed| (placed.path.as_str(), placed.check, placed.round)).collect();
    let (one, two) = ("steps[1].repeat.steps[0]", "steps[1].repeat.steps[1]");
    let rounds = (1..=3).flat_map(|round| [(one, Some("c"), Some(round)), (two, Some("d"), Some(round))]);
    let mut want = vec![("steps[0]", None, None)];
    want.extend(rounds);
    want.push(("steps[2]", None, None));
    assert_eq!(shape, want);
    assert_eq!(scenario.unrolled(1).len(), 4);
}

#[test]
fn every_round_of_a_repeat_must_be_possible() {
    let refused = |times, steps: &str, want: &str| {
        let error = format!("{:#}", parse(&with_repeat(times, steps)).expect_err(steps));
        assert!(error.contains(want), "{error:?} lacks {want:?}");
    };
    parse(&with_repeat(2, r#"{"kill_vm": {"vm": "device"}}, {"start": {"vm": "device"}}"#))
        .expect_err("a VM with a start does not run before");
    refused(2, r#"{"kill_proxy": {"vvu": "vvu"}}"#, "at steps[1].repeat.steps[0], round 2");
    parse(&with_repeat(1, r#"{"kill_proxy": {"vvu": "vvu"}}"#)).expect("once");
    parse(&with_repeat(2, r#"{"kill_proxy": {"vvu": "vvu"}}, {"start_proxy": {"vvu": "vvu"}}"#))
        .expect("and again");
    refused(0, r#"{"run": {"vm": "device", "command": "x"}}"#, "steps[1].repeat: times: 0");
    refused(1, "", "steps: want at least one");
    refused(1, r#"{"repeat": {"times": 1, "steps": []}}"#, "a repeat cannot hold another");
    let text = MINIMAL.replace("{line} {disk}", "{round}");
    assert!(format!("{:#}", parse(&text).expect_err("no round")).contains("{round}"));
}

/// Nothing would end such a wait but its deadline.
#[test]
fn what_can_never_come_is_not_waited_for() {
    let spawn = r#"{"spawn": {"vm": "device", "name": "x", "command": "true"}}"#;
    let (kill, wait) =
        (r#"{"kill": {"vm": "device", "name": "x"}}"#, r#"{"wait": {"vm": "device", "name": "x"}}"#);
    let (reboot, elsewhere) =
        (r#"{"reboot": {"vm": "device"}}"#, r#"{"wait": {"vm": "sibling", "name": "x"}}"#);
    let start = r#"{"start": {"vm": "sibling"}}"#;
    let kill_proxy = r#"{"kill_proxy": {"vvu": "vvu"}}"#;
    let with = |steps: &[&str]| parse(&MINIMAL.replace(LAST, &format!("{}, {LAST}", steps.join(", "))));
    for steps in [&[spawn, wait, spawn, kill][..], &[spawn, reboot, spawn, kill]] {
        with(steps).unwrap_or_else(|error| panic!("{steps:?}: {error:#}"));
    }
    for steps in [&[wait][..], &[spawn, wait, wait], &[spawn, kill, wait], &[spawn, reboot, wait]] {
        let error = format!("{:#}", with(steps).expect_err("it does not run"));
        assert!(error.contains("no spawned command \"x\" runs in \"device\""), "{error}");
    }
    let error = format!("{:#}", with(&[spawn, start, elsewhere]).expect_err("another VM"));
    assert!(error.contains("runs in \"sibling\""), "{error}");
    let error = format!("{:#}", with(&[kill_proxy, start]).expect_err("nobody listens"));
    assert!(error.contains("a `start_proxy` step must come before"), "{error}");
}

#[test]
fn a_disk_file_must_be_a_whole_number_of_sectors() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("odd.img");
    std::fs::write(&path, [0; 700]).expect("written");
    let text = MINIMAL.replace(r#""size_mib": 1"#, r#""file": "odd.img""#);
    let error = format!("{:#}", Scenario::parse(&text, dir.path()).expect_err("odd size"));
    assert!(error.contains("700 bytes") && error.contains("multiple of 512"), "{error}");

    std::fs::write(&path, [0; 1024]).expect("written");
    Scenario::parse(&text, dir.path()).expect("two sectors");

    let text = MINIMAL.replace(r#""size_mib": 1"#, r#""file": ".""#);
    let error = format!("{:#}", Scenario::parse(&text, dir.path()).expect_err("a directory"));
    assert!(error.contains("not a regular file"), "{error}");
}

#[test]
fn disks_that_do_not_fit_into_the_ram_of_their_vm_are_refused() {
    refused(r#""size_mib": 1"#, r#""size_mib": 65"#, &["at disks.disk: 65 MiB", "\"device\"", "259 or more"]);
    parse(&MINIMAL.replace(r#""size_mib": 1"#, r#""size_mib": 64"#)).expect("fits");
    let two = r#""disk": {"size_mib": 1}, "large": {"size_mib": 64}"#;
    refused(r#""disk": {"size_mib": 1}"#, two, &["at disks.large: 65 MiB of disks"]);
    let dir = tempfile::tempdir().expect("a directory");
    let file = std::fs::File::create(dir.path().join("a.img")).expect("made");
    file.set_len(65 << 20).expect("sparse");
    let text = MINIMAL.replace(r#""size_mib": 1"#, r#""file": "a.img""#);
    let error = format!("{:#}", Scenario::parse(&text, dir.path()).expect_err("too large"));
    assert!(error.contains("at disks.disk: 65 MiB"), "{error}");
}

#[test]
fn an_unknown_scenario_is_answered_with_those_there_are() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("one.json"), MINIMAL).expect("written");
    assert_eq!(find(dir.path(), "one").expect("there").name, "one");
    let error = find(dir.path(), "two").expect_err("not there").to_string();
    assert!(error.contains("\"two\"") && error.contains("known are one"), "{error}");

    std::fs::write(dir.path().join("other.json"), MINIMAL).expect("written");
    let error = list(dir.path()).expect_err("misnamed").to_string();
    assert!(error.contains("other.json") && error.contains("\"one\""), "{error}");
}

#[test]
fn every_scenario_is_the_same_after_it_is_written_and_read() {
    let dir = vvu_artifacts::workspace().join("scenarios");
    let scenarios = list(&dir).expect("valid");
    assert!(scenarios.len() >= 24, "{} scenarios", scenarios.len());
    for (name, scenario) in scenarios {
        let text = to_text(&scenario).expect("JSON");
        assert_eq!(Scenario::parse(&text, &dir).expect(&name), scenario);
    }
}

#[test]
fn what_is_attached_and_detached_is_followed_through_the_steps() {
    let with = |steps: &str| MINIMAL.replace(LAST, &format!("{steps}, {LAST}"));
    let attach = r#"{"attach": {"vvu": "vvu", "milestone": "disk-visible"}}"#;
    let detach = r#"{"detach": {"vvu": "vvu"}}"#;
    let restart = r#"{"kill_vm": {"vm": "sibling"}}, {"start": {"vm": "sibling"}}"#;
    let start = r#"{"start": {"vm": "sibling"}}"#;
    let valid = with(&[start, attach, detach, attach, restart, attach].join(", "));
    let scenario = parse(&valid).expect("valid");
    assert!(scenario.attaches("vvu") && scenario.manages("sibling") && !scenario.manages("device"));
    assert_eq!(scenario.steps[2].milestone(), Some(Milestone::DiskVisible));
    for (steps, want) in [
        (vec![attach, attach], "\"vvu\" is attached already"),
        (vec![detach], "an `attach` step must come before"),
        (vec![start, attach, restart, detach], "an `attach` step must come before"),
        (vec![attach, r#"{"power_off": {"vm": "sibling"}}"#, detach], "\"sibling\", does not run"),
        (vec![r#"{"attach": {"vvu": "x"}}"#], "no vvu device is called \"x\""),
    ] {
        let error = format!("{:#}", parse(&with(&steps.join(", "))).expect_err(want));
        assert!(error.contains(want), "{error}");
    }
}

#[test]
fn a_qmp_command_has_known_placeholders_and_one_expectation() {
    let with = |fields: &str| {
        let step = format!(r#"{{"qmp": {{"vm": "sibling", "execute": "x", {fields}}}}}, {LAST}"#);
        parse(&MINIMAL.replace(LAST, &step))
    };
    let scenario = with(r#""arguments": {"a": [{"b": "{memory}"}]}, "event": "E""#).expect("valid");
    assert!(scenario.manages("sibling") && !scenario.manages("device"));
    for (fields, want) in [
        (r#""arguments": {"a": [{"b": "{disc}"}]}"#, &["arguments.a", "{disc}"][..]),
        (r#""expect": {"result": "a", "error": "b"}"#, &["one of `result` and `error`"]),
        (r#""expect": {"error": "("}"#, &["expect.error"]),
    ] {
        let error = format!("{:#}", with(fields).expect_err(fields));
        assert!(want.iter().all(|want| error.contains(want)), "{error}");
    }
}

#[test]
fn ram_that_can_be_added_counts_and_is_no_less_than_there_is() {
    let sibling = r#""sibling": {"memory_mib": 256"#;
    refused(sibling, &format!("{sibling}, \"max_memory_mib\": 128"), &["max_memory_mib: 128", "256"]);
    refused(sibling, &format!("{sibling}, \"numa_nodes\": 3"), &["numa_nodes: 3", "256 MiB"]);
    let more = MINIMAL.replace(sibling, &format!("{sibling}, \"max_memory_mib\": 1024"));
    assert_eq!(parse(&more).expect("valid").memory_mib(), 256 + 1024);
}
