//! A VM's serial console: what the kernel and user space print is the evidence.
//!
//! QEMU writes the log itself. This module reads the same bytes through an rexpect session, so that every wait ends on
//! its pattern, on a failure of the guest, at the end of the stream or at its deadline.

use std::collections::VecDeque;
use std::io::{self, Read, Sink};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use regex::Regex;
use rexpect::error::Error as ExpectError;
use rexpect::reader::Options;
use rexpect::session::{ReadUntil, StreamSession};
use vvu_init::protocol::{RUN_ECHO, SPAWN_ECHO};
use vvu_process::text::printable;

use crate::watch::PERIOD;

/// Patterns that no healthy guest prints.
const FAILURES: &str = r"Kernel panic|BUG: |Oops: |general protection fault|Out of memory|emulation failure|vvu-init: failed|Initramfs unpacking failed";
/// Beginning of a line, up to a failure, that no spawned command has printed: those begin with `[NAME]`.
const GUESTS_OWN: &str = r"^(?:[^\[\n][^\n]*)?";
/// Beginning of a kernel message with its time, up to a failure. It may stand in the middle of another line.
const KERNELS: &str = r"\[ *\d+\.\d+\][^\n]*";
/// Lines of the console that an error shows.
const TAIL_LINES: usize = 30;
/// Characters to which the tail cuts longer lines.
const MAX_LINE: usize = 500;
/// A guest that prints more bytes than this is out of control; its console is treated as ended.
const MAX_BYTES: u64 = 64 << 20;

/// The console of one VM.
pub(crate) struct Console {
    session: StreamSession<Sink>,
    shared: Arc<Shared>,
    failures: Regex,
}

/// State that the reading thread shares with waits.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    delivered: Condvar,
}

#[derive(Default)]
struct State {
    /// Number of deliveries to the session.
    generation: u64,
    bytes: u64,
    lines: VecDeque<String>,
    line: String,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A tail with a line missing is still a tail.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Passes the console to the session, without the commands that PID 1 repeats on it, keeps its last lines and wakes
/// waits.
struct Tap<R> {
    stream: R,
    shared: Arc<Shared>,
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
        let mut state = self.shared.lock();
        state.generation += 1;
        let flooded = state.bytes > MAX_BYTES;
        drop(state);
        self.shared.delivered.notify_all();
        if flooded {
            return Ok(0);
        }
        loop {
            let read = match self.stream.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // The session would read again after an error, for ever, so an error ends the stream.
                result => result.unwrap_or(0),
            };
            self.shared.lock().keep(&buffer[..read]);
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
        self.shared.lock().generation += 1;
        self.shared.delivered.notify_all();
    }
}

impl State {
    fn keep(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        for &byte in bytes {
            if byte == b'\n' {
                if self.lines.len() == TAIL_LINES {
                    self.lines.pop_front();
                }
                let line = std::mem::take(&mut self.line);
                self.lines.push_back(line.trim_end_matches('\r').to_owned());
            } else if self.line.len() < MAX_LINE {
                self.line.push(char::from(byte));
            }
        }
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

impl Console {
    /// Reads the console at the other end of `stream`.
    pub(crate) fn new(stream: impl Read + Send + 'static) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let tap = Tap { stream, shared: Arc::clone(&shared), line: LineStart::default() };
        // A session has one timeout for its whole life; zero leaves each wait its own deadline.
        let options = Options::new().timeout_ms(Some(0));
        let failures = Regex::new(&format!("(?m)(?:{GUESTS_OWN}|{KERNELS})(?:{FAILURES})[^\n]*(?:\n|$)"))?;
        Ok(Self { session: StreamSession::new(tap, io::sink(), options), shared, failures })
    }

    /// Waits until a whole line matches `pattern` and consumes the lines up to it.
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
        loop {
            let generation = self.shared.lock().generation;
            if let Some(text) = self.poll(&line)? {
                let line = text.trim_end();
                let captures = pattern.captures(line).context("a line that matched matches no more")?;
                let value = captures.get(1).or_else(|| captures.get(0)).map_or("", |value| value.as_str());
                let start = captures.get(0).map_or(0, |found| found.start());
                return Ok(Found { line: printable(&line[start..]), value: value.to_owned() });
            }
            check()?;
            let now = Instant::now();
            if now >= deadline {
                bail!("no line matched /{pattern}/ in time");
            }
            self.sleep(generation, PERIOD.min(deadline - now));
        }
    }

    /// Passes over the lines that have arrived.
    ///
    /// # Errors
    ///
    /// Fails if one of them is a failure, or the console has ended.
    pub(crate) fn skip(&mut self) -> Result<()> {
        let line = Regex::new("(?m)^[^\n]*\n")?;
        while self.poll(&line)?.is_some() {}
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
        let state = self.shared.lock();
        let partial = (!state.line.is_empty()).then(|| state.line.clone());
        state.lines.iter().cloned().chain(partial).map(|line| printable(&line)).collect()
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

    /// Waits for a delivery after `generation`, for at most `limit`.
    fn sleep(&self, generation: u64, limit: Duration) {
        let state = self.shared.lock();
        let _unused = self
            .shared
            .delivered
            .wait_timeout_while(state, limit, |state| state.generation == generation)
            .unwrap_or_else(PoisonError::into_inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{PipeWriter, Write};

    fn console() -> (Console, PipeWriter) {
        let (host, guest) = io::pipe().expect("a pipe");
        (Console::new(host).expect("a console"), guest)
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
