//! A VM's serial console, on which the kernel and PID 1 print, and the lines of its spawned commands: the evidence.
//!
//! The console is read through an rexpect session. Every wait ends on its pattern, on a failure of the guest, at the end
//! of the stream or at its deadline.

use std::io::{self, Read, Sink};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use regex::Regex;
use rexpect::error::Error as ExpectError;
use rexpect::reader::Options;
use rexpect::session::{ReadUntil, StreamSession};
use vvu_init::protocol::{RUN_ECHO, SPAWN_ECHO};
use vvu_process::text::printable;

use crate::transcript::Transcript;
use crate::watch::PERIOD;

/// Patterns that no healthy guest prints.
const FAILURES: &str = r"Kernel panic|BUG: |Oops: |general protection fault|Out of memory|emulation failure|vvu-init: failed|Initramfs unpacking failed";
/// Beginning of a line, up to a failure, that no spawned command has printed: those begin with `[NAME]`.
const GUESTS_OWN: &str = r"^(?:[^\[\n][^\n]*)?";
/// Beginning of a kernel message with its time, up to a failure. It may stand in the middle of another line.
const KERNELS: &str = r"\[ *\d+\.\d+\][^\n]*";

/// The console of one VM.
pub(crate) struct Console {
    session: StreamSession<Sink>,
    transcript: Arc<Transcript>,
    failures: Regex,
}

/// Passes the console to the session, without the commands that PID 1 repeats on it, and to the transcript.
struct Tap<R> {
    stream: R,
    transcript: Arc<Transcript>,
    line: LineStart,
}

/// The beginning of the console's current line, as far as it tells whether PID 1 repeats a command in it.
#[derive(Default)]
struct LineStart(Vec<u8>);

impl LineStart {
    /// Returns true if `byte`, the next one of the console, is part of a repeated command.
    fn is_echo(&mut self, byte: u8) -> bool {
        if byte == b'\n' {
            self.0.clear();
            return false;
        }
        let echoes = [RUN_ECHO, SPAWN_ECHO].map(str::as_bytes);
        if echoes.contains(&&self.0[..]) {
            return true;
        }
        if self.0.len() <= SPAWN_ECHO.len() {
            self.0.push(byte);
        }
        false
    }
}

impl<R: Read> Read for Tap<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // The session asks for more only after it has passed on all it had.
        self.transcript.announce();
        if self.transcript.is_flooded() {
            return Ok(0);
        }
        loop {
            let read = match self.stream.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // The session would read again after an error, for ever, so an error ends the stream.
                result => result.unwrap_or(0),
            };
            self.transcript.print(&buffer[..read]);
            let mut passed = 0;
            for at in 0..read {
                if !self.line.is_echo(buffer[at]) {
                    buffer[passed] = buffer[at];
                    passed += 1;
                }
            }
            // Nothing passed of something read is not the end of the stream.
            if passed > 0 || read == 0 {
                return Ok(passed);
            }
        }
    }
}

impl<R> Drop for Tap<R> {
    /// The session has passed on the end of the stream.
    fn drop(&mut self) {
        self.transcript.announce();
    }
}

/// The line that a wait found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The line, without its end and with control characters replaced.
    pub line: String,
    /// The first capture group of the pattern; without one, the whole match.
    pub value: String,
}

impl Found {
    fn new(pattern: &Regex, line: &str) -> Result<Self> {
        let captures = pattern.captures(line).context("a line that matched matches no more")?;
        let value = captures.get(1).or_else(|| captures.get(0)).map_or("", |value| value.as_str());
        let start = captures.get(0).map_or(0, |found| found.start());
        Ok(Self { line: printable(&line[start..]), value: value.to_owned() })
    }
}

impl Console {
    /// Reads the console at the other end of `stream`. What the guest prints goes to `transcript`.
    pub(crate) fn new(stream: impl Read + Send + 'static, transcript: Arc<Transcript>) -> Result<Self> {
        let tap = Tap { stream, transcript: Arc::clone(&transcript), line: LineStart::default() };
        // A session has one timeout for its whole life; zero leaves each wait its own deadline.
        let options = Options::new().timeout_ms(Some(0));
        let failures = Regex::new(&format!("(?m)(?:{GUESTS_OWN}|{KERNELS})(?:{FAILURES})[^\n]*(?:\n|$)"))?;
        Ok(Self { session: StreamSession::new(tap, io::sink(), options), transcript, failures })
    }

    /// Waits until a whole line of the console or of a spawned command matches `pattern`, and passes the lines of the
    /// same kind up to it.
    ///
    /// An error of `check`, which is called every [`PERIOD`], ends the wait.
    ///
    /// # Errors
    ///
    /// Fails if the guest prints a failure, the console ends, `check` fails, or `deadline` passes.
    pub(crate) fn wait(
        &mut self,
        pattern: &Regex,
        deadline: Instant,
        mut check: impl FnMut() -> Result<()>,
    ) -> Result<Found> {
        let line = Regex::new(&format!("(?m)^[^\n]*(?:{pattern})[^\n]*\n"))?;
        let mut tried = 0;
        loop {
            let generation = self.transcript.generation();
            let printed = self.poll(&line)?;
            if let Some(text) = printed.or_else(|| self.transcript.find(pattern, &mut tried)) {
                return Found::new(pattern, text.trim_end());
            }
            ensure!(!self.transcript.is_flooded(), "the guest prints without end");
            check()?;
            let now = Instant::now();
            if now >= deadline {
                bail!("no line matched /{pattern}/ in time");
            }
            self.transcript.sleep(generation, PERIOD.min(deadline - now));
        }
    }

    /// The first line of a spawned command that has arrived and matches; the lines up to it are passed.
    pub(crate) fn said(&self, pattern: &Regex) -> Option<Result<Found>> {
        self.transcript.find(pattern, &mut 0).map(|line| Found::new(pattern, &line))
    }

    /// Passes over the lines that have arrived.
    ///
    /// # Errors
    ///
    /// Fails if one of them is a failure, or the console has ended.
    pub(crate) fn skip(&mut self) -> Result<()> {
        let line = Regex::new("(?m)^[^\n]*\n")?;
        while self.poll(&line)?.is_some() {}
        self.transcript.skip();
        Ok(())
    }

    /// Fails if the guest has printed a failure since the last wait or check.
    ///
    /// # Errors
    ///
    /// The message has the line with the failure.
    pub(crate) fn check(&mut self) -> Result<()> {
        let failures = self.failures.clone();
        match self.session.exp_any(vec![ReadUntil::Regex(failures)]) {
            Ok((_, failure)) => Err(anyhow!("the guest failed: {}", printable(failure.trim()))),
            Err(ExpectError::Timeout { .. } | ExpectError::EOF { .. }) => Ok(()),
            Err(error) => Err(error).context("cannot read the console"),
        }
    }

    /// The last lines, the unfinished one included.
    pub(crate) fn tail(&self) -> Vec<String> {
        self.transcript.tail()
    }

    /// The match of `line` in what has arrived, or `None` if it has not arrived yet.
    fn poll(&mut self, line: &Regex) -> Result<Option<String>> {
        let needles = vec![ReadUntil::Regex(self.failures.clone()), ReadUntil::Regex(line.clone())];
        match self.session.exp_any(needles) {
            Ok((_, text)) if self.failures.is_match(&text) => {
                bail!("the guest failed: {}", printable(text.trim()))
            }
            Ok((_, text)) => Ok(Some(text)),
            Err(ExpectError::Timeout { .. }) => Ok(None),
            Err(ExpectError::EOF { .. }) => bail!("the console ended"),
            Err(error) => Err(error).context("cannot read the console"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transcript::TAIL_LINES;
    use std::io::{PipeWriter, Write};
    use std::time::Duration;

    fn console() -> (Console, PipeWriter) {
        let (host, guest) = io::pipe().expect("a pipe");
        (Console::new(host, Arc::default()).expect("a console"), guest)
    }

    fn wait(console: &mut Console, pattern: &str) -> Result<Found> {
        let pattern = Regex::new(&format!("(?mR:{pattern})"))?;
        console.wait(&pattern, Instant::now() + Duration::from_secs(20), || Ok(()))
    }

    #[test]
    fn a_line_is_found_with_its_value_even_when_it_comes_in_pieces() {
        let (mut console, mut guest) = console();
        let writer = std::thread::spawn(move || {
            for piece in
                ["noise\r\nvirtio_blk: [vda] 131", "072 512-byte logical blocks (67", " MB)\r\nmore\r\n"]
            {
                guest.write_all(piece.as_bytes()).expect("written");
            }
            guest
        });
        let found = wait(&mut console, r"\[vda\] (\d+) 512-byte").expect("found");
        assert_eq!(found.line, "[vda] 131072 512-byte logical blocks (67 MB)");
        assert_eq!(found.value, "131072");
        assert_eq!(wait(&mut console, "^more$").expect("the next line").value, "more");
        drop(writer.join().expect("no panic"));
    }

    #[test]
    fn a_panic_ends_the_wait_at_once_with_its_line() {
        let (mut console, mut guest) = console();
        guest.write_all(b"[ 1.0] Kernel panic - not syncing: no init\r\nready\r\n").expect("written");
        let error = wait(&mut console, "ready").expect_err("panicked").to_string();
        assert_eq!(error, "the guest failed: [ 1.0] Kernel panic - not syncing: no init");
    }

    #[test]
    fn a_command_that_pid_1_repeats_is_no_evidence() {
        let (mut console, mut guest) = console();
        guest.write_all(b"vvu-init: spawn svc: sleep 5; echo service ready\r\n").expect("written");
        guest
            .write_all(b"vvu-init: run 1: dmesg | grep 'BUG: '\r\n[svc] the service ready now\r\n")
            .expect("written");
        let found = wait(&mut console, "service ready").expect("printed by the command itself");
        assert_eq!(found.line, "service ready now");
        guest.write_all(b"vvu-init: ready\r\nvvu-init: running\r\n").expect("written");
        assert_eq!(wait(&mut console, "^vvu-init: run.*$").expect("no echo").line, "vvu-init: running");
        assert!(
            console.tail().iter().any(|line| line.ends_with("echo service ready")),
            "{:?}",
            console.tail()
        );
    }

    #[test]
    fn what_a_spawned_command_prints_is_no_failure_of_the_guest() {
        let (mut console, mut guest) = console();
        guest.write_all(b"[say] the text is BUG: none\r\n[dpdk] Out of memory\r\n").expect("written");
        assert_eq!(wait(&mut console, "text is .*").expect("found").line, "text is BUG: none");
        wait(&mut console, "Out of").expect("found");
        console.check().expect("no failure");
        for line in [
            "[   12.34] BUG: unable",
            "[say] half a li[   12.345678] BUG: unable",
            "Oops: 1",
            "vvu-init: failed: x",
        ] {
            writeln!(guest, "{line}").expect("written");
            let error = wait(&mut console, "never").expect_err(line).to_string();
            let shown = error.strip_prefix("the guest failed: ").expect("a failure");
            assert!(line.ends_with(shown), "{error}");
        }
    }

    /// Each kind of line has its own order: they come over two ports.
    #[test]
    fn lines_of_commands_are_found_beside_those_of_the_console() {
        let (mut console, mut guest) = console();
        let transcript = Arc::clone(&console.transcript);
        transcript.say("noise", "first");
        guest.write_all(b"[   9.1] virtio_blk virtio0: [vda]\n").expect("written");
        wait(&mut console, "vda").expect("the console's");
        transcript.say("backend", "vvu: ready on 5");
        let found = wait(&mut console, r"^\[backend\] .*ready on (\d)$").expect("the command's");
        assert_eq!(found, Found { line: "[backend] vvu: ready on 5".into(), value: "5".into() });
        transcript.say("backend", "BUG: no failure of the guest");
        assert!(console.said(&Regex::new("first|ready").expect("a pattern")).is_none());
        console.check().expect("no failure");
        let writer = std::thread::spawn(move || transcript.say("backend", "again"));
        wait(&mut console, "again").expect("found when it comes");
        writer.join().expect("no panic");
    }

    #[test]
    fn escape_sequences_of_a_guest_do_not_reach_the_terminal() {
        let (mut console, mut guest) = console();
        guest.write_all(b"\x1b]0;title\x07ready\r\n\x1b[2Jmore\n").expect("written");
        assert_eq!(wait(&mut console, ".*ready").expect("found").line, r"\u{1b}]0;title\u{7}ready");
        wait(&mut console, "more").expect("found");
        assert_eq!(console.tail(), [r"\u{1b}]0;title\u{7}ready", r"\u{1b}[2Jmore"]);
    }

    #[test]
    fn a_failure_between_waits_is_seen_by_a_check() {
        let (mut console, mut guest) = console();
        guest.write_all(b"ready\nfine\n").expect("written");
        wait(&mut console, "ready").expect("found");
        console.check().expect("nothing wrong");
        guest.write_all(b"Oops: 0002 [#1]\nend\n").expect("written");
        let error = wait(&mut console, "end").expect_err("failed").to_string();
        assert!(error.contains("Oops: 0002"), "{error}");
    }

    #[test]
    fn lines_that_were_passed_over_are_not_found() {
        let (mut console, mut guest) = console();
        // One write arrives as a whole.
        guest.write_all(b"first\n[vda] old\n").expect("written");
        wait(&mut console, "first").expect("found");
        console.skip().expect("no failure");
        guest.write_all(b"[vda] new\n").expect("written");
        assert_eq!(wait(&mut console, r"\[vda\].*").expect("found").line, "[vda] new");
        guest.write_all(b"Oops: 1\nend\n").expect("written");
        wait(&mut console, "end").expect_err("failed");
    }

    #[test]
    fn the_end_of_the_stream_a_deadline_and_a_look_each_end_the_wait() {
        let (mut console, guest) = console();
        let pattern = Regex::new("never").expect("a pattern");
        let error = console.wait(&pattern, Instant::now(), || Ok(())).expect_err("late").to_string();
        assert!(error.contains("/never/"), "{error}");
        let far = Instant::now() + Duration::from_secs(60);
        let error = console.wait(&pattern, far, || bail!("QEMU ended")).expect_err("looked").to_string();
        assert_eq!(error, "QEMU ended");
        drop(guest);
        assert_eq!(wait(&mut console, "never").expect_err("ended").to_string(), "the console ended");
    }

    #[test]
    fn the_tail_keeps_the_last_lines_and_the_unfinished_one() {
        let (mut console, mut guest) = console();
        for number in 0..TAIL_LINES + 2 {
            writeln!(guest, "line {number}").expect("written");
        }
        guest.write_all(b"end\nprompt# ").expect("written");
        drop(guest);
        wait(&mut console, "end").expect("found");
        wait(&mut console, "never").expect_err("ended");
        let tail = console.tail();
        assert_eq!(tail.len(), TAIL_LINES + 1);
        assert_eq!(tail.first().map(String::as_str), Some("line 3"));
        assert_eq!(tail.last().map(String::as_str), Some("prompt# "));
    }
}
