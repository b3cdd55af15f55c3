use std::path::Path;

use serde_json::json;

use super::*;
use crate::format::is_old;

/// A scenario that uses every key of the old format but `file` and `overlay`.
const EVERYTHING: &str = include_str!("../../tests/old/everything.json");
/// A small one, as people wrote them.
const DISK: &str = include_str!("../../tests/old/disk.json");
const MATRIX: &str = include_str!("../../tests/old/matrix.json");

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

#[test]
fn an_old_scenario_becomes_one_of_now() {
    let text = upgraded(DISK).expect("of the old format");
    let want = json!({
        "name": "disk", "description": "A disk with a small ring",
        "vms": {"device": {"memory_mib": 256}, "sibling": {"memory_mib": 192, "vmm": "debian-12"}},
        "vvu": {"vvu": {"frontend": {"block": {"queues": 2, "queue_size": 16, "features": {"indirect_desc": false}}}}},
        "disks": {"disk": {"size_mib": 4}},
        "steps": [
            {"spawn": {"check": "ready", "vm": "device", "name": "spawned", "command": "vvu bind {bdf}"}},
            {"start": {"vm": "sibling"}},
            {"console": {"check": "vda-appears", "vm": "sibling", "line": "\\[vda\\]", "milestone": "disk-visible",
                "timeout_s": 15}},
            {"repeat": {"check": "again", "times": 2, "steps": [{"kill_proxy": {"vvu": "vvu"}},
                {"start_proxy": {"vvu": "vvu"}}]}},
            {"trace": {"check": "asked", "vvu": "vvu", "matches": "\"request\":\"SET_OWNER\""}},
            {"power_off": {"check": "off", "vm": "device"}},
        ],
    });
    assert_eq!(json(&text), want);
    Scenario::parse(&text, Path::new("/")).expect("valid");
    assert!(is_old(&json(DISK)) && !is_old(&json(&text)));
}

#[test]
fn every_key_of_the_old_format_has_its_place() {
    let scenario =
        Scenario::parse(&upgraded(EVERYTHING).expect("of the old format"), Path::new("/")).expect("valid");
    let device = &scenario.vms["device"];
    assert_eq!((device.cpus, device.cpu, device.iommu), (2, Some(CpuLevel::V2), Some(Iommu::Intel)));
    assert_eq!((device.cmdline.as_str(), device.programs.len()), ("debug", 1));
    assert!(scenario.vms["sibling-a"].huge_pages);
    assert!(matches!(&scenario.kernel, KernelSpec::Fragments(names) if names.len() == 1));
    assert_eq!(scenario.kernel_source.as_deref(), Some("6.1"));
    let frontends: Vec<_> =
        scenario.vvu.values().map(|vvu| serde_json::to_value(&vvu.frontend).expect("JSON")).collect();
    let features = json!({"access_platform": true, "event_idx": false});
    assert_eq!(
        frontends,
        [
            json!({"console": {}}),
            json!({"fs": {"tag": "shared", "request_queues": 2, "queue_size": 64}}),
            json!({"net": {"queue_pairs": 2, "features": features, "vmm_properties": {"disable-legacy": "on"}}}),
            json!({"rng": {"features": {"ring_packed": true}}}),
            json!({"vsock": {}}),
        ]
    );
    let actions: Vec<_> =
        scenario.steps.iter().map(|step| serde_json::to_value(step).expect("JSON")).collect();
    let actions: Vec<_> = actions.iter().filter_map(|step| step.as_object()?.keys().next()).collect();
    assert_eq!(
        actions,
        [
            "run",
            "spawn",
            "spawn",
            "kill",
            "wait",
            "console",
            "reboot",
            "start",
            "kill_vm",
            "repeat",
            "power_off"
        ]
    );
}

#[test]
fn the_steps_and_patches_of_an_old_matrix_are_rewritten() {
    let text = upgraded(MATRIX).expect("of the old format");
    let want = json!({
        "scenario": "s",
        "axes": [
            {"name": "vmm", "values": [{"name": "default"},
                {"name": "old", "patch": {"vms": {"sibling": {"vmm": "debian-12"}}}}]},
            {"name": "cpu", "values": [{"name": "default"},
                {"name": "newer", "patch": {"vms": {"device": {"cpu": "x86-64-v3"}}},
                    "steps": [{"run": {"check": "cpu", "vm": "device", "command": "true"}}]}]},
        ],
    });
    assert_eq!(json(&text), want);
    assert!(is_old(&json(MATRIX)) && !is_old(&json(&text)));
}

#[test]
fn what_has_nothing_to_become_is_named() {
    for (from, to, want) in [
        (r#""memory_mib": 256"#, r#""memory": 256"#, "at vms.device.memory"),
        (r#""memory_mib": 256"#, r#""memory_mib": 256, "cpu": "max,+x""#, "x86-64-v2"),
        (r#""vm": "device", "spawn""#, r#""spawn""#, "at steps[0]: vm: missing"),
        (
            r#""vm": "device", "spawn""#,
            r#""vm": "device", "reboot": true, "spawn""#,
            "at steps[0]: want exactly one",
        ),
        (r#""kind": "blk""#, r#""kind": "fs""#, "at vvu.vvu.frontend: properties: want tag"),
        (r#""indirect_desc": "off""#, r#""indirect_desc": "0""#, "properties.indirect_desc"),
        (r#""kill_proxy": "vvu""#, r#""kill_proxy": 1"#, "at steps[3].repeat.steps[0].kill_proxy"),
    ] {
        assert!(DISK.contains(from), "{from}");
        let error = format!("{:#}", upgraded(&DISK.replace(from, to)).expect_err(to));
        assert!(error.contains(want), "{to}: {error}");
    }
    let matrix =
        MATRIX.replace(r#""sibling": {"qemu": "debian-12"}"#, r#""x": {}}, "vvu": {"vvu": {"queues": 2}"#);
    let error = format!("{:#}", upgraded(&matrix).expect_err("by hand"));
    assert!(error.contains("at axes[0].values[1].patch: vvu: rewrite"), "{error}");
}

#[test]
fn an_old_file_is_read_as_it_is() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk.json");
    std::fs::write(&path, DISK).expect("written");
    assert_eq!(Scenario::load(&path).expect("read").steps.len(), 6);
    std::fs::write(&path, DISK.replace("sibling\", \"start", "sib\", \"start")).expect("written");
    let error = format!("{:#}", Scenario::load(&path).expect_err("invalid"));
    assert!(
        error.contains("disk.json") && error.contains("at steps[1]: vm") && error.contains("\"sib\""),
        "{error}"
    );
}
