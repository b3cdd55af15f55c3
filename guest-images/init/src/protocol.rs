//! The control protocol between the host and PID 1: one JSON object a line, over the serial
//! port that `vvu.control=` on the kernel command line names.
//!
//! ```text
//! host    {"id":1,"run":{"command":"lspci -s 00:10.0","timeout_ms":10000}}
//! guest   {"id":1,"exit":{"code":0,"stdout":"00:10.0 ...\n","stderr":"","truncated":false}}
//! guest   {"event":"line","name":"backend","text":"vvu: ready"}
//! guest   {"event":"exited","name":"backend","signal":9}
//! ```
//!
//! Every request gets exactly one answer with its `id`; answers may come in another order than the requests.
//! Events come on their own.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest request line in bytes, without the newline.
pub const MAX_REQUEST: usize = 64 << 10;

/// Most bytes of each of stdout and stderr that an answer carries; the rest is read and dropped.
pub const MAX_CAPTURE: usize = 1 << 20;

/// Longest line in bytes that the guest may send: two full captures of which every byte needs a six-byte escape.
pub const MAX_ANSWER: usize = 2 * 6 * MAX_CAPTURE + (4 << 10);

/// First line of PID 1 on the console: user space runs.
pub const READY_LINE: &str = "vvu-init: ready";

/// Beginning of the line in which PID 1 repeats on the console the command of a [`Run`].
pub const RUN_ECHO: &str = "vvu-init: run ";

/// Beginning of the line in which PID 1 repeats on the console the name and the command of a [`Spawn`].
pub const SPAWN_ECHO: &str = "vvu-init: spawn ";

/// Names of [`Action`] for people.
const ACTIONS: &str = "run, spawn, kill, hello, power_off, reboot";

/// A line from the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the host, repeated in the answer.
    pub id: u64,
    /// The action.
    #[serde(flatten)]
    pub action: Action,
}

/// An action that the host can ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Run a command to its end and answer with its output: `exit`, or `timeout`.
    Run(Run),
    /// Start a command that stays: `spawned`, then a `line` event for each line that it prints.
    Spawn(Spawn),
    /// Send a signal to the process group of a spawned command: `killed`.
    Kill(Kill),
    /// Ask for the versions in the guest, if the host was too late for the `ready` event: `hello`.
    Hello(Empty),
    /// End the guest: `powering_off`, then the machine goes away.
    PowerOff(Empty),
    /// End the guest and start it again: `rebooting`, later a `ready` event.
    Reboot(Empty),
}

/// A command to run to its end, by `/bin/sh -c`, stdin empty, in a process group of its own.
///
/// The answer comes when the shell ends, even if a background process still holds its output open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// The shell command.
    pub command: String,
    /// Milliseconds after which the whole process group is killed.
    pub timeout_ms: u64,
}

/// A command that stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spawn {
    /// Name of the command, in its events and for `kill`. Free again once it has ended.
    pub name: String,
    /// The shell command.
    pub command: String,
}

/// A signal to a spawned command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kill {
    /// Name given to `spawn`.
    pub name: String,
    /// Signal number, such as 15.
    pub signal: i32,
}

/// No parameters, written `{}`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Empty {}

/// A line from the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Message {
    /// The answer to a request.
    Answer(Answer),
    /// Something that happened.
    Event(Event),
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The request's id.
    pub id: u64,
    /// The outcome.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// The outcome of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The command ended by itself.
    Exit(Exit),
    /// The command was killed at its timeout; this is its output until then.
    Timeout(Output),
    /// The command was started.
    Spawned {
        /// The process id, which is also the process group.
        pid: i32,
    },
    /// The signal was sent.
    Killed(Empty),
    /// The answer to `hello`.
    Hello(Identity),
    /// The guest is about to end.
    PoweringOff(Empty),
    /// The guest is about to restart.
    Rebooting(Empty),
    /// The request could not be carried out, for this reason.
    Error(String),
}

/// The end of a command and its output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// `"code": 0` or `"signal": 9`.
    #[serde(flatten)]
    pub end: End,
    /// The output.
    #[serde(flatten)]
    pub output: Output,
}

/// The end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// It exited with this code.
    Code(i32),
    /// A signal of this number killed it.
    Signal(i32),
}

impl fmt::Display for End {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(formatter, "exit code {code}"),
            Self::Signal(signal) => write!(formatter, "signal {signal}"),
        }
    }
}

/// The output of a command. Bytes that are not UTF-8 are replaced.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// One of them was cut off at [`MAX_CAPTURE`].
    pub truncated: bool,
}

/// The versions of the programs in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Kernel release, such as `6.12.117`.
    pub kernel: String,
    /// Version of this program.
    pub init: String,
}

/// Something that happened in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// PID 1 serves requests. Sent once.
    Ready(Identity),
    /// A spawned command printed a line, on its standard output or standard error.
    Line {
        /// Name given to `spawn`.
        name: String,
        /// The line without its end. Bytes that are not UTF-8 are replaced.
        text: String,
    },
    /// A spawned command ended; its lines have come before.
    Exited {
        /// Name given to `spawn`.
        name: String,
        /// `"code": 1` or `"signal": 11`.
        #[serde(flatten)]
        end: End,
    },
    /// A line that is no request and has no readable `id`.
    BadRequest {
        /// The error.
        error: String,
    },
}

impl Request {
    /// Reads a line of the host. The error is the message to send back.
    pub fn parse(line: &[u8]) -> Result<Self, Message> {
        let bad = |error: String| Message::Event(Event::BadRequest { error });
        let value: serde_json::Value =
            serde_json::from_slice(line).map_err(|error| bad(format!("not JSON: {error}")))?;
        let id = value.get("id").and_then(serde_json::Value::as_u64);
        serde_json::from_value(value).map_err(|error| {
            let error = format!("{error}; want an `id` and one of {ACTIONS}");
            match id {
                Some(id) => Message::Answer(Answer { id, outcome: Outcome::Error(error) }),
                None => bad(error),
            }
        })
    }
}

impl Message {
    /// Reads a line of the guest.
    pub fn parse(line: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(line)
    }
}

/// The line that carries a request or a message, newline included.
pub fn line(message: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).unwrap_or_else(|error| {
        // Only a map with keys that are no strings fails, and there is none.
        unreachable!("protocol types serialise: {error}")
    });
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(text: &str) -> Request {
        Request::parse(text.as_bytes()).expect(text)
    }

    fn refused(text: &str) -> Message {
        Request::parse(text.as_bytes()).expect_err(text)
    }

    #[test]
    fn requests_read_as_documented() {
        let run = Run { command: "lspci".into(), timeout_ms: 10 };
        assert_eq!(
            request(r#"{"id":1,"run":{"command":"lspci","timeout_ms":10}}"#),
            Request { id: 1, action: Action::Run(run) }
        );
        let spawn = Spawn { name: "backend".into(), command: "vvu device".into() };
        assert_eq!(
            request(r#"{"id":2,"spawn":{"name":"backend","command":"vvu device"}}"#),
            Request { id: 2, action: Action::Spawn(spawn) }
        );
        assert_eq!(
            request(r#"{"id":3,"kill":{"name":"backend","signal":9}}"#),
            Request { id: 3, action: Action::Kill(Kill { name: "backend".into(), signal: 9 }) }
        );
        assert_eq!(
            request(r#"{"id":4,"power_off":{}}"#),
            Request { id: 4, action: Action::PowerOff(Empty {}) }
        );
        assert_eq!(request(r#"{"id":5,"reboot":{}}"#), Request { id: 5, action: Action::Reboot(Empty {}) });
    }

    #[test]
    fn answers_and_events_write_as_documented() {
        let text = |message: &Message| String::from_utf8(line(message)).expect("JSON is UTF-8");
        let output = Output { stdout: "a\n".into(), stderr: String::new(), truncated: false };
        let exit = Exit { end: End::Code(0), output };
        assert_eq!(
            text(&Message::Answer(Answer { id: 1, outcome: Outcome::Exit(exit) })),
            "{\"id\":1,\"exit\":{\"code\":0,\"stdout\":\"a\\n\",\"stderr\":\"\",\"truncated\":false}}\n"
        );
        assert_eq!(
            text(&Message::Event(Event::Exited { name: "backend".into(), end: End::Signal(9) })),
            "{\"event\":\"exited\",\"name\":\"backend\",\"signal\":9}\n"
        );
        assert_eq!(
            text(&Message::Event(Event::Line { name: "backend".into(), text: "\"ready\"".into() })),
            "{\"event\":\"line\",\"name\":\"backend\",\"text\":\"\\\"ready\\\"\"}\n"
        );
        let identity = Identity { kernel: "6.12".into(), init: "0.1.0".into() };
        assert_eq!(
            text(&Message::Event(Event::Ready(identity))),
            "{\"event\":\"ready\",\"kernel\":\"6.12\",\"init\":\"0.1.0\"}\n"
        );
    }

    #[test]
    fn both_ends_understand_each_other() {
        let identity = Identity { kernel: "6.12".into(), init: "0.1.0".into() };
        let outcomes = [
            Outcome::Exit(Exit { end: End::Signal(6), output: Output::default() }),
            Outcome::Timeout(Output { truncated: true, ..Output::default() }),
            Outcome::Spawned { pid: 12 },
            Outcome::Killed(Empty {}),
            Outcome::Hello(identity.clone()),
            Outcome::PoweringOff(Empty {}),
            Outcome::Rebooting(Empty {}),
            Outcome::Error("no".into()),
        ];
        let answers = outcomes.into_iter().map(|outcome| Message::Answer(Answer { id: 7, outcome }));
        let events = [
            Event::Ready(identity),
            Event::Line { name: "x".into(), text: "y".into() },
            Event::Exited { name: "x".into(), end: End::Code(1) },
            Event::BadRequest { error: "?".into() },
        ];
        for message in answers.chain(events.map(Message::Event)) {
            assert_eq!(Message::parse(&line(&message)).expect("own line"), message);
        }
    }

    #[test]
    fn what_is_no_request_is_refused_with_its_id() {
        for text in [
            r#"{"id":5,"dance":{}}"#,
            r#"{"id":5}"#,
            r#"{"id":5,"run":{"command":"x"}}"#,
            r#"{"id":5,"power_off":{"now":1}}"#,
        ] {
            let Message::Answer(Answer { id: 5, outcome: Outcome::Error(_) }) = refused(text) else {
                panic!("{text}: {:?}", refused(text));
            };
        }
        for text in ["", "hello", "[]", r#"{"run":{}}"#, r#"{"id":-1,"power_off":{}}"#, "\u{1b}[0m"] {
            let Message::Event(Event::BadRequest { .. }) = refused(text) else {
                panic!("{text}: {:?}", refused(text));
            };
        }
    }

    /// A line of either side with some bytes replaced.
    fn changed_line() -> impl Strategy<Value = Vec<u8>> {
        let lines = [
            r#"{"id":5,"run":{"command":"true","timeout_ms":10}}"#,
            r#"{"id":18446744073709551615,"spawn":{"name":"x","command":"y"}}"#,
            r#"{"id":5,"kill":{"name":"x","signal":9}}"#,
            r#"{"id":1,"exit":{"code":0,"stdout":"a\n","stderr":"","truncated":false}}"#,
            r#"{"event":"exited","name":"backend","signal":9}"#,
        ];
        let pieces =
            ["", "{", "}", "\"", "\\u0000", "[[[[", ",", ":", "-1", "1e999", "null", "id", "\u{fffd}", "\0"];
        let edit = (0..80usize, 0..20usize, proptest::sample::select(pieces.to_vec()));
        (proptest::sample::select(lines.to_vec()), proptest::collection::vec(edit, 0..6)).prop_map(
            |(line, edits)| {
                let mut bytes = line.as_bytes().to_vec();
                for (at, len, piece) in edits {
                    let start = at.min(bytes.len());
                    let end = (start + len).min(bytes.len());
                    bytes.splice(start..end, piece.bytes());
                }
                bytes
            },
        )
    }

    proptest! {
        /// Either side may be anybody who writes to the port.
        #[test]
        fn any_line_is_understood_or_refused_in_a_line_that_is_understood(
            bytes in prop_oneof![changed_line(), proptest::collection::vec(any::<u8>(), 0..100)],
        ) {
            match Request::parse(&bytes) {
                Ok(request) => {
                    let again = serde_json::to_vec(&request).expect("JSON");
                    prop_assert_eq!(Request::parse(&again).expect("own line"), request);
                }
                Err(refusal) => prop_assert_eq!(Message::parse(&line(&refusal)).expect("own line"), refusal),
            }
            let _ = Message::parse(&bytes);
        }
    }
}
