//! Requests to a running QEMU over the QEMU Monitor Protocol (QEMU, "QEMU Machine Protocol Specification"): a JSON object
//! a line, answers by number, events in between.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde_json::{Map, Value, json};
use vvu_process::text::printable;

use crate::watch::PERIOD;

/// Longest line that QEMU may send, in bytes.
const MAX_LINE: u64 = 1 << 20;
/// Messages that are kept until a wait reads them, and events that are kept until a wait asks for them.
const BACKLOG: usize = 64;
/// A QEMU that reads nothing for this long is stuck.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);
/// Events that say why the guest does not give a device back.
const REFUSALS: [&str; 2] = ["DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR"];

/// One exchange with a running VMM. All VMMs that have any speak QMP.
#[derive(Debug, Clone, PartialEq)]
pub enum Exchange {
    /// A command that must succeed.
    Command {
        /// Its name.
        execute: &'static str,
        /// Its arguments, an object.
        arguments: Value,
    },
    /// A command of the human monitor, in the words of the command line. It must print nothing, which means success.
    Words(String),
    /// An event that must come.
    Event {
        /// Its name.
        name: &'static str,
        /// Fields that its data must have.
        data: Value,
    },
}

/// The answer to a command.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// The command's result.
    Return(Value),
    /// Why the command failed, in QEMU's words.
    Error(String),
}

/// The management connection of one QEMU, which makes it when it starts.
pub(crate) struct Qmp {
    socket: Socket,
    connection: Option<Connection>,
    last_id: u64,
    /// Events that nobody has asked for yet.
    events: VecDeque<Value>,
}

/// The socket that QEMU connects to. Its name is removed with it.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

struct Connection {
    stream: UnixStream,
    messages: Receiver<Result<Value>>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        // A path that is gone already is as good.
        let _ = fs::remove_file(&self.path);
    }
}

impl Qmp {
    /// Listens at `path` for a QEMU that is still to be started.
    ///
    /// # Errors
    ///
    /// Fails if the socket cannot be made.
    pub(crate) fn listen(path: &Path) -> Result<Self> {
        let listener =
            UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
        let socket = Socket { listener, path: path.to_owned() };
        socket.listener.set_nonblocking(true).context("cannot set up the management socket")?;
        Ok(Self { socket, connection: None, last_id: 0, events: VecDeque::new() })
    }

    /// Carries out exchanges, one after the other.
    ///
    /// An error of `check`, which is called every [`PERIOD`], ends the wait.
    ///
    /// # Errors
    ///
    /// Fails if a command does, if the guest refuses what was asked for, the connection ends, `check` fails, or
    /// `deadline` passes.
    pub(crate) fn carry_out(
        &mut self,
        exchanges: &[Exchange],
        deadline: Instant,
        mut check: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        for exchange in exchanges {
            match exchange {
                Exchange::Command { execute, arguments } => {
                    if let Reply::Error(error) = self.execute(execute, arguments, deadline, &mut check)? {
                        bail!("the VMM refused {execute}: {}", printable(&error));
                    }
                }
                Exchange::Words(words) => {
                    let arguments = json!({ "command-line": words });
                    let reply = self.execute("human-monitor-command", &arguments, deadline, &mut check)?;
                    ensure!(
                        reply == Reply::Return(json!("")),
                        "the VMM refused `{words}`: {}",
                        match &reply {
                            Reply::Return(Value::String(text)) | Reply::Error(text) => printable(text.trim()),
                            Reply::Return(other) => other.to_string(),
                        }
                    );
                }
                Exchange::Event { name, data } => {
                    self.event(name, data, deadline, &mut check)?;
                }
            }
        }
        Ok(())
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    ///
    /// Fails if the connection ends, `check` fails, or `deadline` passes.
    pub(crate) fn execute(
        &mut self,
        command: &str,
        arguments: &Value,
        deadline: Instant,
        mut check: impl FnMut() -> Result<()>,
    ) -> Result<Reply> {
        if self.connection.is_none() {
            self.connection = Some(Connection::accept(&self.socket, deadline, &mut check)?);
            self.request("qmp_capabilities", &json!({}), deadline, &mut check)?;
        }
        self.request(command, arguments, deadline, &mut check)
    }

    /// Waits for an event of this name whose data has the fields of `data`; one that came before counts too, once.
    ///
    /// # Errors
    ///
    /// Fails if the guest refuses, the connection ends, `check` fails, or `deadline` passes.
    pub(crate) fn event(
        &mut self,
        name: &str,
        data: &Value,
        deadline: Instant,
        mut check: impl FnMut() -> Result<()>,
    ) -> Result<Value> {
        loop {
            let is = |event: &Value, name: &str| event["event"] == *name;
            let found = self.events.iter().position(|event| is(event, name) && has(&event["data"], data));
            if let Some(event) = found.and_then(|index| self.events.remove(index)) {
                return Ok(event);
            }
            let refused = |event: &&Value| REFUSALS.iter().any(|name| is(event, name));
            if let Some(event) = self.events.iter().find(refused) {
                bail!("the guest refused: {event}");
            }
            let event = self.receive(deadline, &mut check).with_context(|| format!("no event {name}"))?;
            self.keep(event);
        }
    }

    fn request(
        &mut self,
        command: &str,
        arguments: &Value,
        deadline: Instant,
        check: &mut impl FnMut() -> Result<()>,
    ) -> Result<Reply> {
        self.last_id += 1;
        let id = self.last_id;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        let connection = self.connection.as_mut().context("there is no management connection")?;
        connection.stream.write_all(line.as_bytes()).context("cannot write to the management connection")?;
        // What happened before the command is no answer to it.
        self.events.clear();
        loop {
            let message = self.receive(deadline, check).with_context(|| format!("no answer to {command}"))?;
            if message["id"] != json!(id) {
                self.keep(message);
            } else if let Some(value) = message.get("return") {
                return Ok(Reply::Return(value.clone()));
            } else {
                let error = message["error"]["desc"].as_str().unwrap_or("no reason given");
                return Ok(Reply::Error(error.to_owned()));
            }
        }
    }

    /// Keeps a message if it is an event.
    fn keep(&mut self, message: Value) {
        if message.get("event").is_some() {
            if self.events.len() == BACKLOG {
                self.events.pop_front();
            }
            self.events.push_back(message);
        }
    }

    fn receive(&mut self, deadline: Instant, check: &mut impl FnMut() -> Result<()>) -> Result<Value> {
        let connection = self.connection.as_ref().context("there is no management connection")?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match connection.messages.recv_timeout(PERIOD.min(left)) {
                Ok(message) => return message,
                Err(RecvTimeoutError::Disconnected) => bail!("the management connection ended"),
                Err(RecvTimeoutError::Timeout) => {
                    check()?;
                    ensure!(!left.is_zero(), "the VMM was silent for too long");
                }
            }
        }
    }
}

impl Connection {
    /// Takes the connection of the QEMU that was started for `socket`.
    fn accept(socket: &Socket, deadline: Instant, check: &mut impl FnMut() -> Result<()>) -> Result<Self> {
        let stream = loop {
            match socket.listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("cannot accept the management connection"),
            }
            check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "the VMM did not open its management connection in time");
            let timeout = Timespec::try_from(PERIOD.min(left)).context("a short time")?;
            match poll(&mut [PollFd::new(&socket.listener, PollFlags::IN)], Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot wait for the management connection"),
            }
        };
        stream.set_nonblocking(false).context("cannot set up the management connection")?;
        stream.set_write_timeout(Some(WRITE_TIMEOUT)).context("cannot set up the management connection")?;
        let reader = stream.try_clone().context("cannot clone the management connection")?;
        let (sender, messages) = sync_channel(BACKLOG);
        thread::spawn(move || read(reader, &sender));
        Ok(Self { stream, messages })
    }
}

/// Passes messages on until the connection ends or the receiver is gone.
fn read(stream: UnixStream, messages: &SyncSender<Result<Value>>) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        // A read error ends the connection.
        if reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line).unwrap_or(0) == 0 {
            return;
        }
        let message = serde_json::from_slice(&line).context("not a message of QMP");
        let failed = message.is_err();
        if messages.send(message).is_err() || failed {
            return;
        }
    }
}

/// Returns true if `value` has every field of the object `wanted`, with the same values.
fn has(value: &Value, wanted: &Value) -> bool {
    let none = Map::new();
    wanted.as_object().unwrap_or(&none).iter().all(|(key, want)| value.get(key) == Some(want))
}

#[cfg(test)]
#[path = "qmp_test.rs"]
mod tests;
