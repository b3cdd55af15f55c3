//! `vvu trace`: prints the file that `vvu proxy --trace` writes.

use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::path::PathBuf;

use anyhow::Context;
use serde_json::Value;

/// Options of `vvu trace`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// File that vvu proxy --trace wrote
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Prints one line for each message.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let context = || format!("cannot read {}", args.file.display());
    let lines = BufReader::new(File::open(&args.file).with_context(context)?).lines();
    let mut out = io::stdout().lock();
    for (index, line) in lines.enumerate() {
        let line = line.with_context(context)?;
        let message: Value = serde_json::from_str(&line).with_context(|| {
            format!("{}, line {}: not a trace of vvu proxy", args.file.display(), index + 1)
        })?;
        match writeln!(out, "{}", describe(&message)) {
            // The reader, for example `head`, has closed the pipe.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            result => result.context("cannot write to standard output")?,
        }
    }
    Ok(())
}

/// Formats a message as `     0.001234  front-end > SET_OWNER  relayed`.
fn describe(message: &Value) -> String {
    let text = |key: &str| message[key].as_str().unwrap_or_default();
    let time = message["time_us"].as_u64().unwrap_or_default();
    if let Some(lost) = message["lost"].as_u64() {
        let (seconds, rest) = (time / 1_000_000, time % 1_000_000);
        return format!(
            "{seconds:>6}.{rest:06}  {lost} messages are missing: the disk of the trace was too slow"
        );
    }
    let arrow = if text("from") == "back-end" { "< back-end " } else { "front-end >" };
    let mut line = format!("{:>6}.{:06}  {arrow}  {}", time / 1_000_000, time % 1_000_000, text("request"));
    if text("kind") == "reply" {
        line.push_str(" reply");
    }
    if message.get("channel").is_some() {
        line.push_str(" (back-end's channel)");
    }
    let fields = values(&message["fields"]);
    if !fields.is_empty() {
        line.push_str(&format!("  {fields}"));
    }
    if let Some(count @ 1..) = message["fds"].as_u64() {
        line.push_str(&format!("  +{count} fd"));
    }
    line.push_str(&format!("  {}", text("did")));
    if let Some(passed) = message.get("passed") {
        line.push_str(&format!(" to {}", values(passed)));
    }
    if !text("reason").is_empty() {
        line.push_str(&format!(": {}", text("reason")));
    }
    line
}

/// Formats JSON as `key=value key=[a, b]`, without quotation marks.
fn values(fields: &Value) -> String {
    match fields {
        Value::Object(fields) => {
            let fields = fields.iter().map(|(key, value)| format!("{key}={}", values(value)));
            fields.collect::<Vec<_>>().join(" ")
        }
        Value::Array(items) => format!("[{}]", items.iter().map(values).collect::<Vec<_>>().join(", ")),
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_message_is_one_readable_line() {
        let message = json!({
            "time_us": 1_000_020, "from": "back-end", "kind": "reply", "request": "GET_PROTOCOL_FEATURES",
            "code": 15, "need_reply": false, "fds": 0, "fields": {"features": "0x3", "names": ["MQ", "LOG"]},
            "did": "masked", "passed": {"features": "0x1"}
        });
        assert_eq!(
            describe(&message),
            "     1.000020  < back-end   GET_PROTOCOL_FEATURES reply  features=0x3 names=[MQ, LOG]  masked to features=0x1"
        );
        let lost = describe(&json!({"time_us": 5, "lost": 3}));
        assert!(lost.starts_with("     0.000005  3 messages are missing"), "{lost}");
        let refused = json!({"from": "front-end", "request": "SET_LOG_BASE", "fds": 1, "did": "refused", "reason": "x"});
        assert_eq!(describe(&refused), "     0.000000  front-end >  SET_LOG_BASE  +1 fd  refused: x");
    }
}
