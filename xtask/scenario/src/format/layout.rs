//! JSON laid out for people: an object or a list goes into one line if it fits.

use anyhow::{Context, Result};
use serde::Serialize;

/// Longest line, in characters, that holds more than one value.
const WIDTH: usize = 110;

/// `value` as JSON for people. Keys keep the order in which `value` gives them.
///
/// # Errors
///
/// `value` cannot be JSON, such as a map whose keys are no texts.
pub fn to_text(value: &impl Serialize) -> Result<String> {
    Ok(laid_out(&serde_json::to_string(value).context("cannot write JSON")?))
}

/// Lays out `json`, which must be valid and without white space between its values.
#[must_use]
pub fn laid_out(json: &str) -> String {
    let mut out = String::new();
    value(json, 0, 0, &mut out);
    out.push('\n');
    out
}

/// Writes one value at nesting `depth`; `used` characters of its line are before it.
fn value(json: &str, depth: usize, used: usize, out: &mut String) {
    let Some(parts) = parts(json).filter(|parts| !parts.is_empty()) else {
        return out.push_str(json);
    };
    let (open, close) = (&json[..1], &json[json.len() - 1..]);
    let inline = inline(json);
    if 4 * depth + used + inline.chars().count() < WIDTH {
        return out.push_str(&inline);
    }
    out.push_str(open);
    for (index, part) in parts.iter().enumerate() {
        out.push_str(if index > 0 { ",\n" } else { "\n" });
        out.push_str(&"    ".repeat(depth + 1));
        let (key, rest) = keyed(part);
        out.push_str(key);
        if !key.is_empty() {
            out.push_str(": ");
        }
        value(rest, depth + 1, key.chars().count() + 2, out);
    }
    out.push('\n');
    out.push_str(&"    ".repeat(depth));
    out.push_str(close);
}

/// A value in one line, with spaces.
fn inline(json: &str) -> String {
    let Some(parts) = parts(json).filter(|parts| !parts.is_empty()) else { return json.to_owned() };
    let parts = parts.into_iter().map(|part| match keyed(part) {
        ("", rest) => inline(rest),
        (key, rest) => format!("{key}: {}", inline(rest)),
    });
    let parts = parts.collect::<Vec<_>>().join(", ");
    if json.starts_with('{') { format!("{{ {parts} }}") } else { format!("[{parts}]") }
}

/// The parts of an object or a list between its commas; `None` for another value.
fn parts(json: &str) -> Option<Vec<&str>> {
    if !json.starts_with(['{', '[']) {
        return None;
    }
    let inside = &json[1..json.len() - 1];
    let mut parts = Vec::new();
    let mut start = 0;
    for (at, byte) in outside(inside) {
        if byte == b',' {
            parts.push(&inside[start..at]);
            start = at + 1;
        }
    }
    if !inside.is_empty() {
        parts.push(&inside[start..]);
    }
    Some(parts)
}

/// The key of an object's part, with its quotes, and the value; a list's part has an empty key.
fn keyed(part: &str) -> (&str, &str) {
    let colon = outside(part).find(|(_, byte)| *byte == b':');
    colon.map_or(("", part), |(at, _)| (&part[..at], &part[at + 1..]))
}

/// The bytes of `json` that are in no text and no nested value, by position.
fn outside(json: &str) -> impl Iterator<Item = (usize, u8)> {
    let (mut depth, mut text, mut escaped) = (0_usize, false, false);
    json.bytes().enumerate().filter(move |(_, byte)| {
        let plain = depth == 0 && !text;
        match byte {
            _ if escaped => escaped = false,
            b'\\' if text => escaped = true,
            b'"' => text = !text,
            b'{' | b'[' if !text => depth += 1,
            b'}' | b']' if !text => depth = depth.saturating_sub(1),
            _ => {}
        }
        plain
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 64, 8, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..8).prop_map(Value::from),
                prop::collection::btree_map(".*", inner, 0..8).prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn json_that_is_laid_out_is_the_same_json(value in any_json()) {
            let text = to_text(&value).expect("JSON");
            prop_assert_eq!(serde_json::from_str::<Value>(&text).expect("still JSON"), value);
        }
    }

    #[test]
    fn what_fits_is_in_one_line_and_the_rest_is_broken() {
        let long = "x".repeat(120);
        let value = json!({"a": [1, 2, {}], "b": {"c": long, "d": [[], "e, {\"f\": \\"]}});
        let text = to_text(&value).expect("JSON");
        let want = format!(
            "{{\n    \"a\": [1, 2, {{}}],\n    \"b\": {{\n        \"c\": \"{long}\",\n        \"d\": [[], \"e, {{\\\"f\\\": \\\\\"]\n    }}\n}}\n"
        );
        assert_eq!(text, want);
        assert_eq!(serde_json::from_str::<Value>(&text).expect("still JSON"), value);
    }
}
