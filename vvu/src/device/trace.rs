//! The trace: one line of JSON for every vhost-user message that reaches the device.

use std::fmt::Display;
use std::fs::File;
use std::io::Write;
use std::time::Instant;

use serde_json::{Map, Value, json};
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost::vhost_user::message::{VhostUserConfig, VhostUserVringAddr, VhostUserVringState};

use crate::message_socket::Message;
use crate::spec::vhost_user::{
    Header, InflightArea, MemoryRegion, Payload, Request, VringEventfd, decode, parse_memory_table,
    parse_single_region, parse_u64,
};

/// Writes one JSON object for each message, one a line. The keys of an object:
///
/// - `time_us`: microseconds since the trace began
/// - `from`: `front-end` or `back-end`
/// - `kind`: `request` or `reply`
/// - `channel`: `back-end` for requests of the back-end and the replies to them, else absent
/// - `request` and `code`: name and code of the request
/// - `need_reply`: whether the sender asks for an acknowledgement
/// - `fds`: number of file descriptors
/// - `fields`: the decoded payload, or `payload` in hexadecimal
/// - `did`: `relayed`, `masked` (with bits cleared or a number lowered), `rewritten`, `refused` or `dropped`
/// - `passed`: the fields that were passed on, if the device changed them
/// - `reason`: why the message was refused or dropped
#[derive(Debug)]
pub struct Trace {
    out: File,
    start: Instant,
}

/// The sender of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    Frontend,
    Backend,
}

/// A message as it arrived, before the device took its file descriptors and changed it.
#[derive(Debug)]
pub(super) struct Arrived {
    header: Header,
    payload: Vec<u8>,
    fds: usize,
}

/// What the device did with a message.
pub(super) enum Did<'a> {
    /// Passed it on with this payload.
    Passed(&'a [u8]),
    /// Refused it, for this reason: answered with a failure, or disconnected the sender.
    Refused(&'a dyn Display),
    /// Dropped it, for this reason.
    Dropped(&'a dyn Display),
}

impl Trace {
    /// A trace that writes to `out`; its times count from now.
    #[must_use]
    pub fn new(out: File) -> Self {
        Self { out, start: Instant::now() }
    }

    /// Makes a second handle of the same trace.
    ///
    /// # Errors
    /// When there is no file descriptor left.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self { out: self.out.try_clone()?, start: self.start })
    }

    /// Copies a message before the device treats it; `None` if there is no trace.
    pub(super) fn arrived(trace: &Option<Self>, message: &Message) -> Option<Arrived> {
        trace.as_ref().map(|_| Arrived {
            header: message.header,
            payload: message.payload().to_vec(),
            fds: message.fds.len(),
        })
    }

    /// Writes the line of a message. If that fails, there is no trace from then on.
    pub(super) fn record(trace: &mut Option<Self>, from: From, arrived: Option<Arrived>, did: Did<'_>) {
        let (Some(this), Some(arrived)) = (&mut *trace, arrived) else { return };
        let mut line = line(this.start.elapsed().as_micros(), from, &arrived, &did).to_string();
        line.push('\n');
        if let Err(error) = this.out.write_all(line.as_bytes()) {
            log::warn!("cannot write the trace, which ends here: {error}");
            *trace = None;
        }
    }
}

fn line(time_us: u128, from: From, arrived: &Arrived, did: &Did<'_>) -> Value {
    let Header { request, .. } = arrived.header;
    let reply = arrived.header.is_reply();
    // Requests of the back-end, and the replies to them, have a channel of their own.
    let channel = (from == From::Backend) != reply;
    let row = if channel { Request::of_backend(request) } else { Request::of_frontend(request) };
    let kind = match row {
        None => Payload::Other("unknown"),
        Some(row) if reply => row.reply_payload(),
        Some(row) => row.payload,
    };
    let fields = |payload: &[u8]| fields(kind, payload);
    let mut line = json!({
        "time_us": u64::try_from(time_us).unwrap_or(u64::MAX),
        "from": if from == From::Frontend { "front-end" } else { "back-end" },
        "kind": if reply { "reply" } else { "request" },
        "request": row.map_or_else(|| format!("unknown {request}"), |row| row.name.to_owned()),
        "code": request,
        "need_reply": arrived.header.needs_reply(),
        "fds": arrived.fds,
        "fields": fields(&arrived.payload),
    });
    if channel {
        line["channel"] = json!("back-end");
    }
    let (did, reason) = match did {
        Did::Passed(payload) if **payload == arrived.payload => ("relayed", None),
        Did::Passed(payload) => {
            line["passed"] = fields(payload);
            (if arrived.payload.len() == 8 { "masked" } else { "rewritten" }, None)
        }
        Did::Refused(reason) => ("refused", Some(reason)),
        Did::Dropped(reason) => ("dropped", Some(reason)),
    };
    line["did"] = json!(did);
    if let Some(reason) = reason {
        line["reason"] = json!(reason.to_string());
    }
    line
}

/// Decodes a payload. A payload that is malformed, or that a device does not look into, is returned in
/// hexadecimal.
fn fields(kind: Payload, payload: &[u8]) -> Value {
    decoded(kind, payload).unwrap_or_else(|| raw(payload))
}

fn decoded(kind: Payload, payload: &[u8]) -> Option<Value> {
    // The code would only appear in an error, which is not shown.
    const CODE: u32 = 0;
    Some(match kind {
        Payload::Features => json!({"features": hex(parse_u64(CODE, payload).ok()?)}),
        Payload::ProtocolFeatures => {
            let bits = parse_u64(CODE, payload).ok()?;
            let known = VhostUserProtocolFeatures::from_bits_truncate(bits);
            let names: Vec<&str> = known.iter_names().map(|(name, _)| name).collect();
            json!({"features": hex(bits), "names": names})
        }
        Payload::VringState => {
            let VhostUserVringState { index, num } = decode(CODE, payload).ok()?;
            json!({"queue": index, "value": num})
        }
        Payload::VringAddr => {
            let VhostUserVringAddr { index, flags, descriptor, used, available, log } =
                decode(CODE, payload).ok()?;
            json!({
                "queue": index, "flags": flags, "descriptors": hex(descriptor), "used": hex(used),
                "available": hex(available), "log": hex(log),
            })
        }
        Payload::VringEventfd => {
            let VringEventfd { queue, attached } = VringEventfd::parse(CODE, payload).ok()?;
            json!({"queue": queue, "eventfd": attached})
        }
        Payload::MemoryTable => {
            let regions = parse_memory_table(payload).ok()?;
            json!({"regions": regions.iter().map(region).collect::<Vec<_>>()})
        }
        Payload::SingleRegion => region(&parse_single_region(CODE, payload).ok()?),
        Payload::Inflight => {
            let InflightArea { size, offset } = InflightArea::parse(CODE, payload).ok()?;
            json!({"size": size, "offset": offset.to_string()})
        }
        Payload::Config => {
            let (start, bytes) = payload.split_at_checked(size_of::<VhostUserConfig>())?;
            let VhostUserConfig { offset, size, flags } = decode(CODE, start).ok()?;
            let mut fields = raw(bytes);
            fields["offset"] = json!(offset);
            fields["size"] = json!(size);
            fields["flags"] = json!(flags);
            fields
        }
        Payload::U64 | Payload::QueueCount => json!({"value": parse_u64(CODE, payload).ok()?}),
        Payload::Empty | Payload::Iotlb | Payload::Other(_) => return None,
    })
}

fn region(region: &MemoryRegion) -> Value {
    json!({
        "guest_address": region.gpa.to_string(), "size": region.size,
        "front_end_address": region.va.to_string(), "offset": region.offset.to_string(),
    })
}

fn hex(value: u64) -> String {
    format!("{value:#x}")
}

fn raw(payload: &[u8]) -> Value {
    let mut fields = Map::new();
    if !payload.is_empty() {
        let text: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
        fields.insert("payload".to_owned(), Value::String(text));
    }
    Value::Object(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::vhost_user::FrontendReq;

    fn arrived(request: FrontendReq, flags: u32, payload: &[u8]) -> Arrived {
        let size = u32::try_from(payload.len()).expect("small");
        Arrived { header: Header { request: request as u32, flags, size }, payload: payload.to_vec(), fds: 0 }
    }

    #[test]
    fn what_was_masked_shows_before_and_after() {
        let offered = arrived(FrontendReq::GET_PROTOCOL_FEATURES, 5, &0x8u64.to_le_bytes());
        let line = line(7, From::Backend, &offered, &Did::Passed(&0u64.to_le_bytes()));
        assert_eq!(line["request"], "GET_PROTOCOL_FEATURES");
        assert_eq!((&line["kind"], &line["did"]), (&json!("reply"), &json!("masked")));
        assert_eq!(line["fields"], json!({"features": "0x8", "names": ["REPLY_ACK"]}));
        assert_eq!(line["passed"], json!({"features": "0x0", "names": []}));
        assert_eq!(line.get("channel"), None);
    }

    #[test]
    fn payloads_are_decoded_or_shown_as_they_are() {
        let decoded = |request: FrontendReq, payload: &[u8]| {
            line(0, From::Frontend, &arrived(request, 1, payload), &Did::Passed(payload))["fields"].clone()
        };
        let kick = decoded(FrontendReq::SET_VRING_KICK, &0x102u64.to_le_bytes());
        assert_eq!(kick, json!({"queue": 2, "eventfd": false}));
        let base = decoded(FrontendReq::SET_VRING_BASE, &[1, 0, 0, 0, 9, 0, 0, 0]);
        assert_eq!(base, json!({"queue": 1, "value": 9}));
        let mut addresses = [0; 40];
        addresses[0] = 3;
        addresses[16] = 5;
        addresses[23] = 1;
        assert_eq!(decoded(FrontendReq::SET_VRING_ADDR, &addresses)["used"], "0x100000000000005");
        assert_eq!(decoded(FrontendReq::GET_CONFIG, &[0xab; 3]), json!({"payload": "ababab"}));
        assert_eq!(decoded(FrontendReq::SET_MEM_TABLE, &[1]), json!({"payload": "01"}));
        assert_eq!(decoded(FrontendReq::SET_OWNER, &[]), json!({}));
    }

    #[test]
    fn a_refusal_says_why() {
        let log = arrived(FrontendReq::SET_LOG_BASE, 9, &[]);
        let line = line(0, From::Frontend, &log, &Did::Refused(&"not carried"));
        assert_eq!((&line["did"], &line["reason"]), (&json!("refused"), &json!("not carried")));
        assert_eq!(line["need_reply"], true);
    }
}
