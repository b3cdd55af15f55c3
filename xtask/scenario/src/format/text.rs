//! Placeholders in the texts of a scenario: `{bdf}` stands for a value that is known only when the scenario runs.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::LazyLock;

use anyhow::{Result, bail};
use regex::{Captures, Regex};
use serde_json::Value;

/// Matches a shell's `${...}`, which stays as it is; `{{name}}`, which stands for the text `{name}`; or a placeholder.
static PLACEHOLDER: LazyLock<Regex> =
    LazyLock::new(|| compiled(r"\$\{[^}]*\}|\{(\{[a-z_][a-z0-9_.-]*\})\}|\{([a-z_][a-z0-9_.-]*)\}"));

fn compiled(pattern: &str) -> Regex {
    Regex::new(pattern).unwrap_or_else(|error| unreachable!("{pattern} is constant: {error}"))
}

/// The values of placeholders by name.
#[derive(Debug, Clone, Default)]
pub struct Values(BTreeMap<String, String>);

impl Values {
    /// Sets the value of the placeholder `name`.
    pub fn set(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.0.insert(name.into(), value.into());
    }

    /// Whether there is a placeholder `name`.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Removes the placeholder `name`.
    pub fn unset(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Replaces the placeholders in `text` with their values.
    ///
    /// # Errors
    ///
    /// A placeholder is unknown; the message lists the known ones.
    pub fn fill(&self, text: &str) -> Result<String> {
        self.replace(text, |value| Cow::Borrowed(value))
    }

    /// Replaces the placeholders in every text of `value`, except in keys.
    ///
    /// # Errors
    ///
    /// A placeholder is unknown; the message lists the known ones.
    pub fn fill_json(&self, value: &Value) -> Result<Value> {
        Ok(match value {
            Value::String(text) => Value::String(self.fill(text)?),
            Value::Array(values) => {
                Value::Array(values.iter().map(|value| self.fill_json(value)).collect::<Result<_>>()?)
            }
            Value::Object(fields) => {
                let filled = fields.iter().map(|(key, value)| Ok((key.clone(), self.fill_json(value)?)));
                Value::Object(filled.collect::<Result<_>>()?)
            }
            other => other.clone(),
        })
    }

    /// Compiles the regular expression `text`, whose placeholders match exactly their values. `^` and `$` match at lines.
    ///
    /// # Errors
    ///
    /// A placeholder is unknown, or the text is no regular expression.
    pub fn pattern(&self, text: &str) -> Result<Regex> {
        let filled = self.replace(text, |value| Cow::Owned(regex::escape(value)))?;
        Ok(Regex::new(&format!("(?mR:{filled})"))?)
    }

    fn replace(&self, text: &str, quote: impl Fn(&str) -> Cow<'_, str>) -> Result<String> {
        let mut unknown = None;
        let filled = PLACEHOLDER.replace_all(text, |captures: &Captures<'_>| {
            if let Some(name) = captures.get(2) {
                if let Some(value) = self.0.get(name.as_str()) {
                    return quote(value).into_owned();
                }
                unknown.get_or_insert_with(|| captures[0].to_owned());
            }
            captures.get(1).map_or(&captures[0], |literal| literal.as_str()).to_owned()
        });
        if let Some(unknown) = unknown {
            let known: Vec<_> = self.0.keys().map(|name| format!("{{{name}}}")).collect();
            bail!(
                "unknown placeholder {unknown}: known here are {}; write {{{unknown}}} for the text itself",
                known.join(", ")
            );
        }
        Ok(filled.into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values() -> Values {
        let mut values = Values::default();
        values.set("bdf", "0000:00:10.0");
        values.set("disk.sha256", "abc");
        values
    }

    #[test]
    fn placeholders_are_filled_and_the_shell_keeps_its_braces() {
        let filled =
            values().fill("lspci -s {bdf} ${x} {{a}} {disk.sha256} awk '{print $1}' {1,2}").expect("known");
        assert_eq!(filled, "lspci -s 0000:00:10.0 ${x} {a} abc awk '{print $1}' {1,2}");
    }

    #[test]
    fn an_unknown_placeholder_is_named_with_those_known() {
        let error = values().fill("lspci {bfd}").expect_err("unknown").to_string();
        assert!(error.contains("{bfd}") && error.contains("{bdf}, {disk.sha256}"), "{error}");
    }

    #[test]
    fn a_value_in_a_pattern_stands_for_itself() {
        let pattern = values().pattern("^{bdf} x{2}$").expect("a pattern");
        assert!(pattern.is_match("a\r\n0000:00:10.0 xx\r\nb"));
        assert!(!pattern.is_match("0000:00:10_0 xx"));
    }
}
