//! What a guest prints: the lines of its console, and those of its spawned commands.
//!
//! The lines of commands come over the control port. On the console the kernel's messages would fall into the middle of
//! them, since the kernel does not wait for what user space has written to the serial port. The log has both kinds, each
//! line whole.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use regex::Regex;
use vvu_process::text::printable;

/// Lines that an error shows.
pub(crate) const TAIL_LINES: usize = 30;
/// Characters to which the tail cuts longer lines.
const MAX_SHOWN: usize = 500;
/// Bytes of a line of the console after which it is written to the log in pieces.
const MAX_LINE: usize = 64 << 10;
/// What the kernel prints first when it boots.
const BANNER: &[u8] = b"[    0.000000] Linux version ";
/// A guest that prints more bytes than this is out of control.
const MAX_BYTES: u64 = 64 << 20;

/// The output of one guest, which the threads that read its ports share with waits.
#[derive(Default)]
pub(crate) struct Transcript {
    state: Mutex<State>,
    delivered: Condvar,
}

#[derive(Default)]
struct State {
    /// Number of deliveries.
    generation: u64,
    bytes: u64,
    tail: VecDeque<String>,
    /// Number of times that the kernel has begun to boot.
    boots: u32,
    /// The unfinished line of the console.
    line: Vec<u8>,
    /// Lines of spawned commands that no wait has passed yet, each behind `[NAME] `.
    said: VecDeque<String>,
    log: Option<File>,
}

impl Transcript {
    /// A transcript that appends every line to `log`.
    pub(crate) fn new(log: File) -> Self {
        let transcript = Self::default();
        transcript.lock().log = Some(log);
        transcript
    }

    /// Takes the next bytes of the console.
    pub(crate) fn print(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.bytes += bytes.len() as u64;
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            state.line.extend_from_slice(piece);
            if piece.ends_with(b"\n") || state.line.len() > MAX_LINE {
                state.finish_line();
            }
        }
    }

    /// Takes a line of the spawned command `name`.
    pub(crate) fn say(&self, name: &str, text: &str) {
        let mut state = self.lock();
        if state.bytes <= MAX_BYTES {
            let line = format!("[{name}] {text}");
            state.bytes += line.len() as u64 + 1;
            state.note(line.as_bytes());
            state.said.push_back(line);
        }
        drop(state);
        self.announce();
    }

    /// Wakes waits, which look at what has arrived.
    pub(crate) fn announce(&self) {
        self.lock().generation += 1;
        self.delivered.notify_all();
    }

    /// Number of deliveries so far.
    pub(crate) fn generation(&self) -> u64 {
        self.lock().generation
    }

    /// Waits for a delivery after `generation`, for at most `limit`.
    pub(crate) fn sleep(&self, generation: u64, limit: Duration) {
        let state = self.lock();
        let _unused = self
            .delivered
            .wait_timeout_while(state, limit, |state| state.generation == generation)
            .unwrap_or_else(PoisonError::into_inner);
    }

    /// How often the guest's kernel has said that it boots.
    pub(crate) fn boots(&self) -> u32 {
        self.lock().boots
    }

    /// Whether the guest has printed so much that the rest is dropped.
    pub(crate) fn is_flooded(&self) -> bool {
        self.lock().bytes > MAX_BYTES
    }

    /// The first line of a spawned command that matches; the lines up to it are passed. `tried` lines are known not to
    /// match; without a match it becomes the number of lines there are.
    pub(crate) fn find(&self, pattern: &Regex, tried: &mut usize) -> Option<String> {
        let mut state = self.lock();
        let found = state.said.iter().skip(*tried).position(|line| pattern.is_match(line));
        let Some(found) = found else {
            *tried = state.said.len();
            return None;
        };
        state.said.drain(..=*tried + found).next_back()
    }

    /// Passes over the lines of spawned commands.
    pub(crate) fn skip(&self) {
        self.lock().said.clear();
    }

    /// The last lines, the console's unfinished one included.
    pub(crate) fn tail(&self) -> Vec<String> {
        let state = self.lock();
        let unfinished = (!state.line.is_empty()).then(|| shown(&state.line));
        state.tail.iter().cloned().chain(unfinished).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A tail with a line missing is still a tail.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn finish_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        self.boots += u32::from(line.starts_with(BANNER));
        self.note(line.trim_ascii_end());
    }

    /// Adds a line to the log and the tail.
    fn note(&mut self, line: &[u8]) {
        if let Some(log) = &mut self.log {
            // A log that cannot be written fails no check: what is waited for is here.
            let _ = log.write_all(&[line, b"\n"].concat());
        }
        if self.tail.len() == TAIL_LINES {
            self.tail.pop_front();
        }
        self.tail.push_back(shown(line));
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            self.finish_line();
        }
    }
}

/// A line for a person.
fn shown(line: &[u8]) -> String {
    printable(&line.iter().take(MAX_SHOWN).map(|&byte| char::from(byte)).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_has_whole_lines_of_both_kinds_however_they_arrive() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        let transcript = Transcript::new(File::create(&path).expect("made"));
        transcript.print(b"[    9.1] noi");
        transcript.say("lines", "line 1 is whole");
        transcript.print(b"se\r\nlast words");
        transcript.say("lines", "line 2 is whole");
        assert_eq!(transcript.tail().last().map(String::as_str), Some("last words"));
        drop(transcript);
        let log = std::fs::read_to_string(path).expect("a log");
        assert_eq!(log, "[lines] line 1 is whole\n[    9.1] noise\n[lines] line 2 is whole\nlast words\n");
    }

    #[test]
    fn a_line_is_found_once_and_what_was_before_it_never() {
        let transcript = Transcript::default();
        let pattern = |text: &str| Regex::new(text).expect("a pattern");
        for text in ["one", "two", "three"] {
            transcript.say("a", text);
        }
        let find = |text: &str| transcript.find(&pattern(text), &mut 0);
        assert_eq!(find(r"^\[a\] two$").as_deref(), Some("[a] two"));
        assert_eq!(find("one|two"), None);
        let mut tried = 0;
        assert_eq!(transcript.find(&pattern("four"), &mut tried), None);
        assert_eq!(tried, 1, "the third line");
        transcript.say("a", "four");
        assert_eq!(transcript.find(&pattern("three|four"), &mut tried).as_deref(), Some("[a] four"));
        transcript.say("a", "five");
        transcript.skip();
        assert_eq!(find("five"), None);
    }

    #[test]
    fn each_boot_of_the_kernel_is_counted() {
        let transcript = Transcript::default();
        transcript.print(b"[    0.000000] Linux version 6.12\r\n[    1.2] Linux version again\r\n");
        transcript.say("dmesg", "[    0.000000] Linux version 6.12");
        assert_eq!(transcript.boots(), 1);
        transcript.print(b"[    0.000000] Linux version 6.12\r\n");
        assert_eq!(transcript.boots(), 2);
    }

    #[test]
    fn a_flood_is_bounded() {
        let transcript = Transcript::default();
        let line = "x".repeat(1 << 20);
        (0..80).for_each(|_| transcript.say("flood", &line));
        assert!(transcript.is_flooded());
        assert!(transcript.lock().said.len() < 70);
    }
}
