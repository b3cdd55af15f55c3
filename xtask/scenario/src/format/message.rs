//! Expectations on the vhost-user messages that a vvu device has carried.

use anyhow::{Context, Result, bail, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Names of feature bits by number, without `VIRTIO_F_` and the like (virtio 1.2, 5 and 6; for 26 and 30, vhost-user).
/// Devices give their own meaning to the bits below 24, so that the names of those begin with the device's.
const FEATURES: [(&str, u32); 31] = [
    ("BLK_SIZE_MAX", 1),
    ("BLK_SEG_MAX", 2),
    ("BLK_GEOMETRY", 4),
    ("BLK_RO", 5),
    ("BLK_BLK_SIZE", 6),
    ("BLK_FLUSH", 9),
    ("BLK_TOPOLOGY", 10),
    ("BLK_CONFIG_WCE", 11),
    ("BLK_MQ", 12),
    ("BLK_DISCARD", 13),
    ("BLK_WRITE_ZEROES", 14),
    ("NET_CSUM", 0),
    ("NET_GUEST_CSUM", 1),
    ("NET_MRG_RXBUF", 15),
    ("NET_CTRL_VQ", 17),
    ("NET_MQ", 22),
    ("NOTIFY_ON_EMPTY", 24),
    ("LOG_ALL", 26),
    ("ANY_LAYOUT", 27),
    ("INDIRECT_DESC", 28),
    ("EVENT_IDX", 29),
    ("PROTOCOL_FEATURES", 30),
    ("VERSION_1", 32),
    ("ACCESS_PLATFORM", 33),
    ("RING_PACKED", 34),
    ("IN_ORDER", 35),
    ("ORDER_PLATFORM", 36),
    ("SR_IOV", 37),
    ("NOTIFICATION_DATA", 38),
    ("NOTIF_CONFIG_DATA", 39),
    ("RING_RESET", 40),
];

/// The bits of vhost-user's protocol features that `vvu proxy` names in its trace (vhost-user, "Protocol features").
const PROTOCOL_FEATURES: [&str; 20] = [
    "MQ",
    "LOG_SHMFD",
    "RARP",
    "REPLY_ACK",
    "MTU",
    "BACKEND_REQ",
    "CROSS_ENDIAN",
    "CRYPTO_SESSION",
    "PAGEFAULT",
    "CONFIG",
    "BACKEND_SEND_FD",
    "HOST_NOTIFIER",
    "INFLIGHT_SHMFD",
    "RESET_DEVICE",
    "INBAND_NOTIFICATIONS",
    "CONFIGURE_MEM_SLOTS",
    "STATUS",
    "XEN_MMAP",
    "SHARED_OBJECT",
    "DEVICE_STATE",
];

/// A message that must be in a trace: all that is given must be so.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExpectedMessage {
    /// Name of the request as in the vhost-user specification, without `VHOST_USER_`; of a reply, that of the request
    /// it answers.
    #[schemars(regex(pattern = "^[A-Z0-9_]+$"))]
    pub request: String,
    /// Who sent it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Sender>,
    /// Whether it asks or answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<MessageKind>,
    /// What the proxy did with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub did: Option<Treatment>,
    /// Names of feature bits that it has: virtio's for GET_FEATURES and SET_FEATURES, such as `RING_PACKED`, and
    /// vhost-user's for the protocol features, such as `REPLY_ACK`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub has: Vec<String>,
    /// Names of feature bits that it has not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lacks: Vec<String>,
    /// Fields of its payload as in the trace, such as `{"queue": 1, "value": 256}`. Of an object the given keys count,
    /// of a list the given elements in their order.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub fields: Map<String, Value>,
}

/// A side of a vvu device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Sender {
    /// The sibling VM's VMM.
    FrontEnd,
    /// The back-end in the device VM.
    BackEnd,
}

/// Whether a message asks or answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MessageKind {
    /// A request.
    Request,
    /// The reply to a request.
    Reply,
}

/// What the proxy did with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Treatment {
    /// Passed it on as it was.
    Relayed,
    /// Passed it on with another payload.
    Rewritten,
    /// Passed it on without feature bits, or with fewer queues.
    Masked,
    /// Told the sender that it will not be passed on.
    Refused,
    /// Threw it away.
    Dropped,
}

impl ExpectedMessage {
    /// Checks the names.
    pub(super) fn check(&self) -> Result<()> {
        let plain = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
        ensure!(
            !self.request.is_empty() && self.request.bytes().all(plain),
            "request: {:?}: want a name of the vhost-user specification, such as SET_FEATURES",
            self.request
        );
        let protocol = self.request.ends_with("_PROTOCOL_FEATURES");
        for (key, names) in [("has", &self.has), ("lacks", &self.lacks)] {
            ensure!(
                names.is_empty() || self.request.ends_with("_FEATURES"),
                "{key}: {} has no feature bits",
                self.request
            );
            for name in names {
                let known: Vec<&str> = match protocol {
                    true => PROTOCOL_FEATURES.to_vec(),
                    false => FEATURES.iter().map(|(name, _)| *name).collect(),
                };
                ensure!(
                    known.contains(&name.as_str()),
                    "{key}: no feature is called {name:?}: want {}",
                    known.join(", ")
                );
            }
        }
        Ok(())
    }

    /// Returns true if `message`, a line of a trace, is as expected.
    fn matches(&self, message: &Value) -> bool {
        let is = |key: &str, want: Value| want.is_null() || message[key] == want;
        let named = |name: &str, features: &Value| match features["names"].as_array() {
            Some(names) => Some(names.iter().any(|known| known == name)),
            None => bit(name).zip(number(&features["features"])).map(|(bit, bits)| bits >> bit & 1 == 1),
        };
        let fields = &message["fields"];
        is("request", Value::from(self.request.as_str()))
            && is("from", serde_json::to_value(self.from).unwrap_or_default())
            && is("kind", serde_json::to_value(self.kind).unwrap_or_default())
            && is("did", serde_json::to_value(self.did).unwrap_or_default())
            && self.has.iter().all(|name| named(name, fields) == Some(true))
            && self.lacks.iter().all(|name| named(name, fields) == Some(false))
            && self.fields.iter().all(|(key, want)| fields.get(key).is_some_and(|got| within(want, got)))
    }
}

/// Finds the expected messages in their order in `trace`, a line of JSON for each message, and returns the line of the
/// last of them.
///
/// # Errors
///
/// A line is no JSON, or a message is not there; the error has the last message with the same name, if there is one.
pub fn find_in_order<'a>(expected: &[ExpectedMessage], trace: &'a str) -> Result<&'a str> {
    let messages = trace
        .lines()
        .map(|line| Ok((line, serde_json::from_str(line).context("a line of the trace is no JSON")?)))
        .collect::<Result<Vec<(&str, Value)>>>()?;
    let mut next = 0;
    let mut found = "";
    for (index, want) in expected.iter().enumerate() {
        let Some(at) = messages[next..].iter().position(|(_, message)| want.matches(message)) else {
            let after = if next > 0 { format!(" after message {next}") } else { String::new() };
            let same = messages[next..].iter().rev().find(|(_, message)| message["request"] == want.request);
            let same = same.map_or_else(
                || format!("none of the {} messages there is a {}", messages.len() - next, want.request),
                |(line, _)| format!("the last {} there is {line}", want.request),
            );
            let want = serde_json::to_string(want).unwrap_or_default();
            bail!("expect[{index}]: no message{after} is {want}; {same}; `vvu trace` prints them all");
        };
        found = messages[next + at].0;
        next += at + 1;
    }
    Ok(found)
}

fn bit(name: &str) -> Option<u32> {
    FEATURES.iter().find(|(known, _)| *known == name).map(|(_, bit)| *bit)
}

/// A number that the trace writes in hexadecimal.
fn number(value: &Value) -> Option<u64> {
    u64::from_str_radix(value.as_str()?.strip_prefix("0x")?, 16).ok()
}

/// Returns true if `got` has everything that `want` names.
fn within(want: &Value, got: &Value) -> bool {
    match (want, got) {
        (Value::Object(want), Value::Object(got)) => {
            want.iter().all(|(key, want)| got.get(key).is_some_and(|got| within(want, got)))
        }
        (Value::Array(want), Value::Array(got)) => {
            let mut rest = got.iter();
            want.iter().all(|want| rest.any(|got| within(want, got)))
        }
        (want, got) => want == got,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = r#"{"did":"masked","fields":{"features":"0x18","names":["REPLY_ACK","MTU"]},"from":"back-end","kind":"reply","request":"GET_PROTOCOL_FEATURES"}
{"did":"relayed","fields":{"features":"0x540000000"},"from":"front-end","kind":"request","request":"SET_FEATURES"}
{"did":"relayed","fields":{"regions":[{"offset":"0x0","size":1},{"offset":"0x1","size":2},{"offset":"0x3","size":3}]},"from":"front-end","kind":"request","request":"SET_MEM_TABLE"}
{"did":"relayed","fields":{"queue":1,"value":256},"from":"front-end","kind":"request","request":"SET_VRING_NUM"}
"#;

    fn expected(text: &str) -> Vec<ExpectedMessage> {
        let expected: Vec<ExpectedMessage> = serde_json::from_str(text).expect("messages");
        expected.iter().for_each(|message| message.check().expect("valid"));
        expected
    }

    fn look(text: &str) -> Result<&'static str> {
        find_in_order(&expected(text), TRACE)
    }

    #[test]
    fn features_fields_and_the_proxys_treatment_are_looked_at() {
        for text in [
            r#"[{"request": "SET_FEATURES", "has": ["RING_PACKED", "VERSION_1", "PROTOCOL_FEATURES"], "lacks": ["IN_ORDER"]}]"#,
            r#"[{"request": "GET_PROTOCOL_FEATURES", "kind": "reply", "from": "back-end", "did": "masked", "has": ["MTU"], "lacks": ["MQ"]}]"#,
            r#"[{"request": "SET_VRING_NUM", "fields": {"queue": 1}}]"#,
            r#"[{"request": "SET_MEM_TABLE", "fields": {"regions": [{"size": 1}, {"offset": "0x3"}]}}]"#,
        ] {
            look(text).unwrap_or_else(|error| panic!("{text}: {error:#}"));
        }
        for text in [
            r#"[{"request": "SET_FEATURES", "lacks": ["RING_PACKED"]}]"#,
            r#"[{"request": "SET_FEATURES", "has": ["IN_ORDER"]}]"#,
            r#"[{"request": "SET_FEATURES", "from": "back-end"}]"#,
            r#"[{"request": "GET_PROTOCOL_FEATURES", "kind": "request"}]"#,
            r#"[{"request": "GET_PROTOCOL_FEATURES", "did": "relayed"}]"#,
            r#"[{"request": "SET_VRING_NUM", "fields": {"queue": 2}}]"#,
            r#"[{"request": "SET_VRING_NUM", "fields": {"size": 1}}]"#,
            r#"[{"request": "SET_MEM_TABLE", "fields": {"regions": [{"offset": "0x3"}, {"size": 1}]}}]"#,
        ] {
            look(text).expect_err(text);
        }
    }

    #[test]
    fn messages_are_sought_in_their_order_and_the_missing_one_is_named() {
        let line = look(r#"[{"request": "SET_FEATURES"}, {"request": "SET_VRING_NUM"}]"#).expect("there");
        assert!(line.contains("\"value\":256"), "{line}");
        let error =
            look(r#"[{"request": "SET_VRING_NUM"}, {"request": "SET_FEATURES"}]"#).expect_err("order");
        let error = error.to_string();
        assert!(error.contains("expect[1]") && error.contains("none of the 0 messages"), "{error}");
        let error = look(r#"[{"request": "SET_VRING_NUM", "fields": {"value": 1}}]"#).expect_err("other");
        assert!(error.to_string().contains("the last SET_VRING_NUM there is {\"did\""), "{error:#}");
        find_in_order(&[ExpectedMessage::default()], "no JSON").expect_err("malformed");
    }

    #[test]
    fn names_that_there_are_not_are_refused() {
        for (text, want) in [
            (r#"{"request": "set"}"#, "SET_FEATURES"),
            (r#"{"request": "SET_FEATURES", "has": ["PACKED"]}"#, "RING_PACKED"),
            (r#"{"request": "SET_PROTOCOL_FEATURES", "lacks": ["RING_PACKED"]}"#, "REPLY_ACK"),
            (r#"{"request": "SET_VRING_NUM", "has": ["RING_PACKED"]}"#, "has no feature bits"),
        ] {
            let message: ExpectedMessage = serde_json::from_str(text).expect("JSON");
            let error = message.check().expect_err(text).to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
    }
}
