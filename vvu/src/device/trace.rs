//! The trace: one line of JSON for every vhost-user message that reaches the device.
//!
//! The file may be on a disk that is slow, or that does not answer. So a thread writes the lines, and those that find no
//! place in its queue are dropped and counted.

use std::fmt::Display;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, channel, sync_channel};
use std::time::{Duration, Instant};

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
///
/// Where lines are missing, an object has `time_us` and `lost`, their number, instead.
#[derive(Debug)]
pub struct Trace {
    /// Of the thread that writes; `None` once it has ended.
    lines: Option<SyncSender<String>>,
    /// Is closed when the thread ends.
    written: Receiver<()>,
    start: Instant,
    /// Lines that found no place in the queue since the last one that did.
    lost: u64,
}

/// Lines that wait to be written.
const QUEUE_SIZE: usize = 1024;
/// Time that the last lines have to be written.
const LAST_LINES: Duration = Duration::from_secs(1);
const THREAD_NAME: &str = "vvu-trace";

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
    /// A trace that writes to `out`, in a thread; its times count from now.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn new(out: impl Write + Send + 'static) -> io::Result<Self> {
        Self::since(Instant::now(), out)
    }

    /// As [`new`](Self::new), for a trace that another process began at `start`.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn since(start: Instant, out: impl Write + Send + 'static) -> io::Result<Self> {
        let (lines, queue) = sync_channel(QUEUE_SIZE);
        let (ends, written) = channel();
        let (running, is_running) = channel::<()>();
        std::thread::Builder::new().name(THREAD_NAME.to_owned()).stack_size(64 << 10).spawn(move || {
            drop(running);
            write_all(out, &queue);
            drop(ends);
        })?;
        // The end of the channel is the signal. What a thread does at its start, the sandbox of the proxy forbids.
        let _ = is_running.recv();
        Ok(Self { lines: Some(lines), written, start, lost: 0 })
    }

    /// Copies a message before the device treats it; `None` if there is no trace.
    pub(super) fn arrived(trace: &Option<Self>, message: &Message) -> Option<Arrived> {
        trace.as_ref().map(|_| Arrived {
            header: message.header,
            payload: message.payload().to_vec(),
            fds: message.fds.len(),
        })
    }

    /// Writes the line of a message.
    pub(super) fn record(trace: &mut Option<Self>, from: From, arrived: Option<Arrived>, did: Did<'_>) {
        let (Some(this), Some(arrived)) = (trace, arrived) else { return };
        let time_us = this.start.elapsed().as_micros();
        if this.lost > 0 && this.put(&json!({"time_us": microseconds(time_us), "lost": this.lost})) {
            this.lost = 0;
        }
        if this.lost > 0 || !this.put(&line(time_us, from, &arrived, &did)) {
            this.lost += 1;
        }
    }

    /// Gives a line to the thread; false if there is no room.
    fn put(&mut self, line: &Value) -> bool {
        let Some(lines) = &self.lines else { return true };
        match lines.try_send(format!("{line}\n")) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => false,
            Err(TrySendError::Disconnected(_)) => {
                self.lines = None;
                true
            }
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        if self.lost > 0 {
            let time_us = microseconds(self.start.elapsed().as_micros());
            self.put(&json!({"time_us": time_us, "lost": self.lost}));
        }
        self.lines = None;
        // Both outcomes are fine: all is written, or the disk does not answer.
        let _ = self.written.recv_timeout(LAST_LINES);
    }
}

/// Writes lines until there is an error, or nobody has more.
fn write_all(mut out: impl Write, lines: &Receiver<String>) {
    for line in lines {
        if let Err(error) = out.write_all(line.as_bytes()) {
            log::warn!("cannot write the trace, which ends here: {error}");
            return;
        }
    }
}

fn microseconds(time_us: u128) -> u64 {
    u64::try_from(time_us).unwrap_or(u64::MAX)
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
        "time_us": microseconds(time_us),
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

    /// A file whose disk does not answer until the sender at the other end is dropped.
    struct Stalled {
        released: Receiver<()>,
        out: std::fs::File,
    }

    impl Write for Stalled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.released.recv();
            self.out.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            self.out.flush()
        }
    }

    #[test]
    fn a_disk_that_does_not_answer_stalls_nobody_and_what_is_lost_is_counted() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("trace");
        let (release, released) = channel::<()>();
        let out = std::fs::File::create(&path).expect("file");
        let mut trace = Some(Trace::new(Stalled { released, out }).expect("thread"));
        let messages = 3 * QUEUE_SIZE;
        let record = |trace: &mut Option<Trace>| {
            let message = arrived(FrontendReq::SET_OWNER, 1, &[]);
            Trace::record(trace, From::Frontend, Some(message), Did::Passed(&[]));
        };
        (0..messages).for_each(|_| record(&mut trace));
        drop(release);
        let deadline = Instant::now() + Duration::from_secs(20);
        while trace.as_ref().is_some_and(|trace| trace.lost > 0) {
            record(&mut trace);
            assert!(Instant::now() < deadline, "the trace does not go on");
        }
        record(&mut trace);
        drop(trace);
        let text = std::fs::read_to_string(path).expect("trace");
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        let lost: u64 = lines.iter().filter_map(|line| line["lost"].as_u64()).sum();
        assert!(lost >= (messages - QUEUE_SIZE - 1) as u64, "{lost}");
        assert_eq!(lines.last().expect("a line")["request"], "SET_OWNER", "the trace goes on");
    }

    #[test]
    fn a_refusal_says_why() {
        let log = arrived(FrontendReq::SET_LOG_BASE, 9, &[]);
        let line = line(0, From::Frontend, &log, &Did::Refused(&"not carried"));
        assert_eq!((&line["did"], &line["reason"]), (&json!("refused"), &json!("not carried")));
        assert_eq!(line["need_reply"], true);
    }
}
