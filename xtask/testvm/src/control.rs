//! Commands to a guest and their results, over the guest's second serial port.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail};
use vvu_init::protocol::{Action, Answer, Event, Identity, MAX_ANSWER, Message, Outcome, Request, line};

use crate::spawned::Spawned;
use crate::transcript::Transcript;
use crate::watch::PERIOD;

/// A guest that reads nothing for this long is stuck.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);
/// Messages that are kept until a wait reads them; then the guest blocks.
const BACKLOG: usize = 64;

/// The host's end of a guest's control port.
pub(crate) struct Control {
    stream: UnixStream,
    messages: Receiver<Result<Message>>,
    last_id: u64,
    ready: Option<Identity>,
    transcript: Arc<Transcript>,
    /// How often the guest is to have booted.
    boots: u32,
    /// The commands that the guest was asked to spawn.
    pub(crate) spawned: Spawned,
}

impl Control {
    /// Speaks to the guest at the other end of `stream`. What its spawned commands print goes to `transcript`.
    pub(crate) fn new(stream: UnixStream, transcript: Arc<Transcript>) -> Result<Self> {
        stream.set_write_timeout(Some(WRITE_TIMEOUT)).context("cannot set up the control port")?;
        let reader = stream.try_clone().context("cannot clone the control port")?;
        let (sender, messages) = sync_channel(BACKLOG);
        let lines = Arc::clone(&transcript);
        thread::spawn(move || read(reader, &lines, &sender));
        Ok(Self {
            stream,
            messages,
            last_id: 0,
            ready: None,
            transcript,
            boots: 1,
            spawned: Spawned::default(),
        })
    }

    /// Waits until the guest serves requests.
    ///
    /// # Errors
    ///
    /// Fails if the port ends, `check` fails, or `deadline` passes.
    pub(crate) fn ready(
        &mut self,
        deadline: Instant,
        mut check: impl FnMut() -> Result<()>,
    ) -> Result<&Identity> {
        while self.ready.is_none() {
            // No request is pending, so every message is an event.
            self.receive(deadline, &mut check).context("the guest did not get ready")?;
        }
        self.ready.as_ref().context("the guest is not ready")
    }

    /// Expects the guest to get ready again; its spawned commands end.
    pub(crate) fn restarting(&mut self) {
        self.ready = None;
        self.boots += 1;
        self.spawned.clear();
    }

    /// Waits until the guest sends a message, such as the end of a spawned command.
    ///
    /// # Errors
    ///
    /// Fails as [`Control::request`] does.
    pub(crate) fn wait(&mut self, deadline: Instant, mut check: impl FnMut() -> Result<()>) -> Result<()> {
        self.receive(deadline, &mut check).map(drop)
    }

    /// Sends a request to the guest and waits for the answer.
    ///
    /// An error of `check`, which is called every [`PERIOD`], ends the wait.
    ///
    /// # Errors
    ///
    /// Fails if the guest refuses, the port ends, `check` fails, or `deadline` passes.
    pub(crate) fn request(
        &mut self,
        action: Action,
        deadline: Instant,
        mut check: impl FnMut() -> Result<()>,
    ) -> Result<Outcome> {
        self.last_id += 1;
        let id = self.last_id;
        self.stream.write_all(&line(&Request { id, action })).context("cannot write to the control port")?;
        loop {
            match self.receive(deadline, &mut check)? {
                // The answer to an earlier request, whose wait has ended.
                Some(answer) if answer.id != id => {}
                Some(Answer { outcome: Outcome::Error(error), .. }) => bail!("the guest refused: {error}"),
                Some(Answer { outcome, .. }) => return Ok(outcome),
                None => {}
            }
        }
    }

    /// Fails if the guest has restarted unasked or a spawned command has ended unexpectedly.
    ///
    /// # Errors
    ///
    /// Fails as well if the guest sends nonsense.
    pub(crate) fn check(&mut self) -> Result<()> {
        while let Ok(message) = self.messages.try_recv() {
            self.sort(message?)?;
        }
        self.check_boots()
    }

    /// Fails if the guest boots although nobody asked for it. Its kernel says so long before PID 1 does, and PID 1 may never
    /// be reached.
    fn check_boots(&mut self) -> Result<()> {
        if self.transcript.boots() > self.boots { Err(self.restarted()) } else { Ok(()) }
    }

    /// The error of a guest that was restarted, which names the commands that are gone.
    fn restarted(&mut self) -> Error {
        let gone = self.spawned.clear();
        let gone =
            if gone.is_empty() { String::new() } else { format!("; {} gone with it", gone.join(", ")) };
        anyhow!("the guest was restarted, although nobody asked for it{gone}")
    }

    /// Waits for one message and returns it if it is an answer.
    fn receive(
        &mut self,
        deadline: Instant,
        check: &mut impl FnMut() -> Result<()>,
    ) -> Result<Option<Answer>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.messages.recv_timeout(PERIOD.min(left)) {
                Ok(message) => return self.sort(message?),
                Err(RecvTimeoutError::Disconnected) => bail!("the control port ended"),
                Err(RecvTimeoutError::Timeout) => {
                    check()?;
                    self.check_boots()?;
                    if left.is_zero() {
                        bail!("no answer in time");
                    }
                }
            }
        }
    }

    fn sort(&mut self, message: Message) -> Result<Option<Answer>> {
        match message {
            Message::Answer(answer) => return Ok(Some(answer)),
            Message::Event(Event::Ready(identity)) => {
                if self.ready.replace(identity).is_some() {
                    return Err(self.restarted());
                }
            }
            Message::Event(Event::Exited { name, end }) => self.spawned.record(name, end)?,
            // The reading thread has taken it.
            Message::Event(Event::Line { .. }) => {}
            Message::Event(Event::BadRequest { error }) => {
                bail!("the guest could not read a request: {error}")
            }
        }
        Ok(None)
    }
}

/// Passes messages on until the port ends or the receiver is gone. The lines of a command are in `transcript` before its
/// end is among the messages.
fn read(stream: UnixStream, transcript: &Transcript, messages: &SyncSender<Result<Message>>) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        // A read error ends the port.
        let read = reader.by_ref().take(MAX_ANSWER as u64 + 1).read_until(b'\n', &mut line).unwrap_or(0);
        if read == 0 {
            return;
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let message = if line.ends_with(b"\n") {
            Message::parse(&line).with_context(|| format!("not a message of the guest: {}", excerpt(&line)))
        } else {
            Err(anyhow::anyhow!("a line of the guest has no end: {}", excerpt(&line)))
        };
        if let Ok(Message::Event(Event::Line { name, text })) = &message {
            transcript.say(name, text);
            continue;
        }
        let stop = message.is_err();
        if messages.send(message).is_err() || stop {
            return;
        }
    }
}

fn excerpt(line: &[u8]) -> String {
    String::from_utf8_lossy(&line[..line.len().min(200)]).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vvu_init::protocol::{Empty, End, Exit, Output};

    fn far() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn guest(talk: impl FnOnce(UnixStream, BufReader<UnixStream>) + Send + 'static) -> Control {
        let (host, guest) = UnixStream::pair().expect("a pair");
        thread::spawn(move || {
            let reader = BufReader::new(guest.try_clone().expect("cloned"));
            talk(guest, reader);
        });
        Control::new(host, Arc::default()).expect("a control port")
    }

    fn send(stream: &mut UnixStream, message: &Message) {
        stream.write_all(&line(message)).expect("written");
    }

    fn next(reader: &mut BufReader<UnixStream>) -> Request {
        let mut line = Vec::new();
        reader.read_until(b'\n', &mut line).expect("a line");
        Request::parse(&line).expect("a request")
    }

    #[test]
    fn a_request_gets_its_own_answer_and_events_are_kept() {
        let mut control = guest(|mut stream, mut reader| {
            let identity = Identity { kernel: "6.12".into(), init: "0.1".into() };
            send(&mut stream, &Message::Event(Event::Ready(identity)));
            let id = next(&mut reader).id;
            let late = Outcome::Killed(Empty {});
            send(&mut stream, &Message::Answer(Answer { id: id + 100, outcome: late }));
            send(&mut stream, &Message::Event(Event::Exited { name: "backend".into(), end: End::Signal(9) }));
            let exit = Exit { end: End::Code(3), output: Output::default() };
            send(&mut stream, &Message::Answer(Answer { id, outcome: Outcome::Exit(exit) }));
            let id = next(&mut reader).id;
            send(&mut stream, &Message::Answer(Answer { id, outcome: Outcome::Error("no".into()) }));
        });
        assert_eq!(control.ready(far(), || Ok(())).expect("ready").kernel, "6.12");
        let outcome = control.request(Action::Hello(Empty {}), far(), || Ok(())).expect("answered");
        assert!(matches!(outcome, Outcome::Exit(Exit { end: End::Code(3), .. })));
        control.check().expect("as expected");
        assert_eq!(control.spawned.take_end("backend").expect("ended"), Some(End::Signal(9)));
        let error = control.request(Action::Hello(Empty {}), far(), || Ok(())).expect_err("refused");
        assert_eq!(error.to_string(), "the guest refused: no");
    }

    #[test]
    fn a_restart_that_nobody_asked_for_ends_the_wait_and_names_what_is_gone() {
        let ready = || Message::Event(Event::Ready(Identity { kernel: "6.12".into(), init: "0.1".into() }));
        let mut control = guest(move |mut stream, mut reader| {
            send(&mut stream, &ready());
            next(&mut reader);
            // The answer to the request never comes.
            send(&mut stream, &ready());
            next(&mut reader);
            send(&mut stream, &ready());
            next(&mut reader);
        });
        control.ready(far(), || Ok(())).expect("ready");
        control.spawned.expect("keeper", 0);
        let mut request = || control.request(Action::Hello(Empty {}), far(), || Ok(()));
        let error = request().expect_err("restarted").to_string();
        assert_eq!(error, "the guest was restarted, although nobody asked for it; keeper gone with it");
        let error = request().expect_err("restarted again").to_string();
        assert_eq!(error, "the guest was restarted, although nobody asked for it");
        control.restarting();
        assert!(control.ready(Instant::now(), || Ok(())).is_err(), "not ready yet");
    }

    /// A guest that resets before PID 1 runs would boot again and again until the deadline.
    #[test]
    fn a_boot_that_nobody_asked_for_ends_the_wait_for_a_guest_that_is_not_ready() {
        let (host, _guest) = UnixStream::pair().expect("a pair");
        let transcript = Arc::new(Transcript::default());
        let mut control = Control::new(host, Arc::clone(&transcript)).expect("a control port");
        let boot = || transcript.print(b"[    0.000000] Linux version 6.12\r\n");
        boot();
        control.check().expect("the first boot");
        control.restarting();
        boot();
        control.check().expect("asked for");
        boot();
        let error = format!("{:#}", control.ready(far(), || Ok(())).expect_err("again"));
        assert!(error.contains("restarted, although nobody asked for it"), "{error}");
    }

    #[test]
    fn the_end_of_a_spawned_command_ends_a_wait_for_an_answer() {
        let mut control = guest(|mut stream, mut reader| {
            next(&mut reader);
            let end = End::Code(1);
            send(&mut stream, &Message::Event(Event::Exited { name: "backend".into(), end }));
            next(&mut reader);
        });
        control.spawned.expect("backend", 0);
        let error = control.request(Action::Hello(Empty {}), far(), || Ok(())).expect_err("ended");
        assert_eq!(error.to_string(), "the spawned command backend ended with exit code 1");
    }

    #[test]
    fn noise_silence_and_the_end_are_errors() {
        let mut control = guest(|mut stream, _| stream.write_all(b"\r\nlogin:\n").expect("written"));
        let error = format!("{:#}", control.ready(far(), || Ok(())).expect_err("noise"));
        assert!(error.contains("not a message of the guest: login:"), "{error}");

        let mut control = guest(|_, _| ());
        let error = format!("{:#}", control.ready(far(), || Ok(())).expect_err("ended"));
        assert!(error.contains("the control port ended"), "{error}");

        let (host, _guest) = UnixStream::pair().expect("a pair");
        let mut control = Control::new(host, Arc::default()).expect("a control port");
        let error = format!("{:#}", control.ready(Instant::now(), || Ok(())).expect_err("late"));
        assert!(error.contains("no answer in time"), "{error}");
        let error = format!("{:#}", control.ready(far(), || bail!("QEMU ended")).expect_err("looked"));
        assert!(error.contains("QEMU ended"), "{error}");
    }
}
