//! Scenario files come from anybody: any text is a scenario or an error, never a panic.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use vvu_artifacts::workspace;

use super::{Scenario, is_old, upgraded};

/// The texts of the scenarios of this repository, and of old ones.
fn texts() -> Vec<String> {
    let files = |dir: PathBuf| std::fs::read_dir(dir).expect("scenarios").flatten().map(|entry| entry.path());
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let paths = files(workspace().join("scenarios")).chain(files(own.join("tests/old")));
    let json = paths.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    json.map(|path| std::fs::read_to_string(path).expect("a text")).collect()
}

/// One of `texts` in which pieces are replaced by others.
fn changed(texts: Vec<String>) -> impl Strategy<Value = String> {
    let pieces = [
        "",
        "{",
        "}",
        "[",
        "]",
        "\"",
        ",",
        ":",
        "null",
        "-1",
        "18446744073709551616",
        "1e999",
        "\\u0000",
        "{bdf",
        "{}",
        "\u{fffd}",
        "(?",
        "\"vms\"",
        "\"repeat\"",
        "\"matrix\"",
        "\"$ref\"",
        "../",
        "//",
        "{\"vms\":{",
        "[[[[[[[[",
    ];
    let edit = (any::<prop::sample::Index>(), 0..24usize, prop::sample::select(pieces.to_vec()));
    (prop::sample::select(texts), prop::collection::vec(edit, 1..8)).prop_map(|(text, edits)| {
        let mut chars: Vec<char> = text.chars().collect();
        for (at, len, piece) in edits {
            let start = at.index(chars.len() + 1);
            let end = (start + len).min(chars.len());
            chars.splice(start..end, piece.chars());
        }
        chars.into_iter().collect()
    })
}

fn read(text: &str) -> bool {
    if let Ok(value) = serde_json::from_str(text) {
        let _ = is_old(&value);
    }
    let upgraded = upgraded(text);
    if let Ok(text) = &upgraded {
        let _ = Scenario::parse(text, Path::new("."));
    }
    Scenario::parse(text, Path::new(".")).is_ok() || upgraded.is_ok()
}

#[test]
fn the_texts_to_change_are_scenarios() {
    let readable = texts().iter().filter(|text| read(text)).count();
    assert!(readable > 10, "{readable}");
}

proptest! {
    #[test]
    fn any_text_is_a_scenario_or_an_error(text in prop_oneof![changed(texts()), ".{0,200}"]) {
        read(&text);
    }
}
