use std::fs;
use std::path::{Path, PathBuf};

use jsonschema::Validator;
use serde_json::{Value, json};
use vvu_artifacts::workspace;

use super::*;
use crate::format::Step;

fn scenarios() -> PathBuf {
    workspace().join("scenarios")
}

fn json_files(dir: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("readable").path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "json")).collect()
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).expect("readable")).expect("JSON")
}

fn validator(schema: &SchemaFile) -> Validator {
    let schema = serde_json::from_str(&schema.text().expect("a schema")).expect("JSON");
    jsonschema::draft202012::new(&schema).expect("a valid schema")
}

/// What is wrong with `json`, by place.
fn errors(validator: &Validator, json: &Value) -> Vec<String> {
    validator.iter_errors(json).map(|error| format!("{}: {error}", error.instance_path())).collect()
}

#[test]
fn the_checked_in_schemas_are_those_of_the_types() {
    for schema in &SCHEMAS {
        let path = scenarios().join(schema.path);
        let text = fs::read_to_string(&path).unwrap_or_default();
        let want = schema.text().expect("a schema");
        assert!(
            text == want,
            "{} is not that of the types: run `cargo xtask scenario schema` and check in what it writes",
            path.display()
        );
    }
}

#[test]
fn every_file_is_valid_and_names_its_schema() {
    for (dir, schema) in [(scenarios(), &SCHEMAS[0]), (scenarios().join("matrix"), &SCHEMAS[1])] {
        let validator = validator(schema);
        let files = json_files(&dir);
        assert!(!files.is_empty());
        for file in files {
            let json = read(&file);
            let errors = errors(&validator, &json);
            assert!(errors.is_empty(), "{}: {errors:#?}", file.display());
            let named = dir.join(json["$schema"].as_str().expect("a text")).canonicalize().expect("there");
            assert_eq!(
                named,
                scenarios().join(schema.path).canonicalize().expect("there"),
                "{}",
                file.display()
            );
        }
    }
}

#[test]
fn the_schema_refuses_what_the_types_refuse() {
    let validator = validator(&SCHEMAS[0]);
    let scenario = |step: &Value| json!({"name": "s", "description": "", "vms": {"device": {"memory_mib": 64}}, "steps": [step]});
    for step in [
        json!({}),
        json!({"start": {"vm": "device"}, "reboot": {"vm": "device"}}),
        json!({"run": {"vm": "device"}}),
        json!({"run": {"vm": "device", "command": "true", "expect": {"exit": "0"}}}),
        json!({"run": {"vm": "device", "command": "true", "line": "x"}}),
        json!({"run": {"vm": "device", "command": "true", "milestone": "vda-appears"}}),
        json!({"kill": {"vm": "device", "name": "x", "signal": "STOP"}}),
        json!({"trace": {"vvu": "vvu", "expect": [{"has": ["RING_PACKED"]}]}}),
        json!({"walk": {"vm": "device"}}),
    ] {
        assert!(!errors(&validator, &scenario(&step)).is_empty(), "{step} is valid");
        serde_json::from_value::<Step>(step.clone()).expect_err("no step");
    }
    let step = json!({"run": {"vm": "device", "command": "true", "milestone": "disk-visible"}});
    assert_eq!(errors(&validator, &scenario(&step)), Vec::<String>::new());
    for (pointer, value) in [
        ("/vms/device/memory_mib", json!(63)),
        ("/vms/device/cpus", json!(9)),
        ("/vms/device/qemu", json!("debian-12")),
        ("/vms/device/cpu", json!("Nehalem")),
        ("/name", json!("../s")),
        ("/vvu", json!({"vvu": {"addr": "00:1f.0"}})),
        ("/vvu", json!({"vvu": {"frontend": {"kind": "net"}}})),
        ("/vvu", json!({"vvu": {"frontend": {"block": {"queues": 65}}}})),
    ] {
        let mut scenario = scenario(&step);
        let (parent, key) = pointer.rsplit_once('/').expect("a path");
        scenario.pointer_mut(parent).expect("there")[key] = value.clone();
        assert!(!errors(&validator, &scenario).is_empty(), "{pointer} may be {value}");
    }
}
