//! Shows a person on stderr how far a task is.
//!
//! On a terminal one line is rewritten in place; elsewhere a plain line appears each second. Every stage ends with
//! a line of its own that stays, and its time is kept for the report.

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often the spinner turns on a terminal.
const TERMINAL_PERIOD: Duration = Duration::from_millis(125);
/// The longest silence elsewhere; under a second, so that scheduling delays do not make it longer than one.
const PLAIN_PERIOD: Duration = Duration::from_millis(900);
const NAME_WIDTH: usize = 14;

/// How long a finished stage took.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct StageTime {
    /// The stage's name, such as `kernel`.
    pub name: String,
    /// When it began, in seconds since this program did.
    #[serde(default)]
    pub began: f64,
    /// Duration in seconds.
    pub seconds: f64,
}

/// The one place that writes progress. Clones share the same output.
#[derive(Clone)]
pub struct Progress {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    ticker: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    quiet: bool,
    terminal: bool,
}

struct State {
    out: Box<dyn Write + Send>,
    running: Vec<Running>,
    finished: Vec<StageTime>,
    next_id: u64,
    begun: Instant,
    frame: usize,
    /// The terminal shows a line that must be erased before anything else is printed.
    live: bool,
    last_output: Instant,
    closing: bool,
}

struct Running {
    id: u64,
    name: String,
    text: String,
    since: Instant,
}

impl Progress {
    /// Progress on stderr. `quiet` leaves only notes and failures.
    pub fn new(quiet: bool) -> Self {
        let stderr = io::stderr();
        let terminal = stderr.is_terminal();
        Self::with_output(Box::new(stderr), terminal, quiet)
    }

    fn with_output(out: Box<dyn Write + Send>, terminal: bool, quiet: bool) -> Self {
        let state = State {
            out,
            running: Vec::new(),
            finished: Vec::new(),
            next_id: 0,
            begun: Instant::now(),
            frame: 0,
            live: false,
            last_output: Instant::now(),
            closing: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), quiet, terminal });
        let ticker = (!quiet).then(|| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.tick())
        });
        Self { inner: Arc::new(Inner { shared, ticker }) }
    }

    /// Begins a stage; several may run at once.
    pub fn stage(&self, name: impl Into<String>) -> Stage {
        let mut state = self.inner.shared.lock();
        let id = state.next_id;
        state.next_id += 1;
        state.running.push(Running { id, name: name.into(), text: String::new(), since: Instant::now() });
        drop(state);
        self.inner.shared.changed.notify_all();
        Stage { progress: self.clone(), id }
    }

    /// Prints a line that stays, whatever is running.
    pub fn note(&self, line: impl AsRef<str>) {
        self.inner.shared.lock().print(line.as_ref());
    }

    /// The stages that ended so far, in the order they ended.
    pub fn stages(&self) -> Vec<StageTime> {
        self.inner.shared.lock().finished.clone()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closing = true;
        state.erase();
        drop(state);
        self.shared.changed.notify_all();
        if let Some(ticker) = self.ticker.take() {
            // A ticker that panicked has nothing left to show.
            let _ = ticker.join();
        }
    }
}

/// A stage in progress. Dropping it without [`Stage::done`] reports it as failed.
pub struct Stage {
    progress: Progress,
    id: u64,
}

impl Stage {
    /// Says what the stage is doing now.
    pub fn update(&self, text: impl Into<String>) {
        let mut state = self.progress.inner.shared.lock();
        if let Some(stage) = state.running.iter_mut().find(|stage| stage.id == self.id) {
            stage.text = text.into();
        }
    }

    /// Ends the stage and prints its time with `text`.
    pub fn done(self, text: impl AsRef<str>) {
        let shared = &self.progress.inner.shared;
        let mut state = shared.lock();
        if let Some((name, seconds, _)) = state.finish(self.id)
            && !shared.quiet
        {
            state.print(&stage_line(&name, seconds, text.as_ref()));
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let mut state = self.progress.inner.shared.lock();
        if let Some((name, seconds, text)) = state.finish(self.id) {
            let separator = if text.is_empty() { "" } else { ": " };
            state.print(&stage_line(&name, seconds, &format!("failed{separator}{text}")));
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while printing leaves nothing inconsistent behind.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tick(&self) {
        let period = if self.terminal { TERMINAL_PERIOD } else { PLAIN_PERIOD };
        let mut state = self.lock();
        while !state.closing {
            if state.running.is_empty() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                // Silence before the first stage does not count against it.
                state.last_output = Instant::now();
                continue;
            }
            let silence = if self.terminal { Duration::ZERO } else { state.last_output.elapsed() };
            let (back, timeout) = self
                .changed
                .wait_timeout(state, period.saturating_sub(silence))
                .unwrap_or_else(PoisonError::into_inner);
            state = back;
            if timeout.timed_out() && !state.closing && !state.running.is_empty() {
                state.show(self.terminal, period);
            }
        }
    }
}

impl State {
    fn finish(&mut self, id: u64) -> Option<(String, f64, String)> {
        let at = self.running.iter().position(|stage| stage.id == id)?;
        let stage = self.running.remove(at);
        let seconds = stage.since.elapsed().as_secs_f64();
        let began = stage.since.saturating_duration_since(self.begun).as_secs_f64();
        self.finished.push(StageTime { name: stage.name.clone(), began, seconds });
        Some((stage.name, seconds, stage.text))
    }

    fn show(&mut self, terminal: bool, period: Duration) {
        let line = live_line(&self.running, Instant::now());
        if terminal {
            const SPINNER: [char; 4] = ['|', '/', '-', '\\'];
            self.frame = (self.frame + 1) % SPINNER.len();
            let width = rustix::termios::tcgetwinsize(io::stderr())
                .map_or(80, |size| usize::from(size.ws_col).max(20));
            let line = fit(&format!("{} {line}", SPINNER[self.frame]), width - 1);
            self.emit(&format!("\r\x1b[K{line}"));
            self.live = true;
        } else if self.last_output.elapsed() >= period {
            self.emit(&format!("{line}\n"));
        }
    }

    fn print(&mut self, line: &str) {
        self.erase();
        self.emit(&format!("{line}\n"));
    }

    fn erase(&mut self) {
        if self.live {
            self.emit("\r\x1b[K");
            self.live = false;
        }
    }

    fn emit(&mut self, text: &str) {
        // Progress that cannot be shown (stderr closed) must not stop the work.
        let _ = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
        self.last_output = Instant::now();
    }
}

fn stage_line(name: &str, seconds: f64, text: &str) -> String {
    format!("{name:<NAME_WIDTH$}{seconds:>7.1} s  {text}").trim_end().to_owned()
}

fn live_line(running: &[Running], now: Instant) -> String {
    let parts: Vec<String> = running
        .iter()
        .map(|stage| {
            let seconds = now.saturating_duration_since(stage.since).as_secs_f64();
            stage_line(&stage.name, seconds, &stage.text)
        })
        .collect();
    parts.join("  |  ")
}

/// Cuts `line` to `width` characters and replaces what would move the cursor.
fn fit(line: &str, width: usize) -> String {
    line.chars().map(|c| if c.is_control() { ' ' } else { c }).take(width).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Hands each write to the test.
    struct Tap(mpsc::Sender<String>);

    impl Write for Tap {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // A test that ended no longer listens.
            let _ = self.0.send(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn tapped(terminal: bool, quiet: bool) -> (Progress, mpsc::Receiver<String>) {
        let (sender, receiver) = mpsc::channel();
        (Progress::with_output(Box::new(Tap(sender)), terminal, quiet), receiver)
    }

    #[test]
    fn lines_have_fixed_columns() {
        assert_eq!(stage_line("kernel", 3.21, "580 objects"), "kernel            3.2 s  580 objects");
        assert_eq!(stage_line("kernel", 123.0, ""), "kernel          123.0 s");
    }

    #[test]
    fn live_line_joins_the_stages_and_is_cut_to_the_width() {
        let now = Instant::now();
        let stage =
            |name: &str, text: &str| Running { id: 0, name: name.into(), text: text.into(), since: now };
        let line = live_line(&[stage("kernel", "12/580"), stage("guest", "a\tb")], now);
        assert_eq!(line, "kernel            0.0 s  12/580  |  guest             0.0 s  a\tb");
        assert_eq!(fit("a\tb\x1b[2J é", 8), "a b [2J ");
    }

    #[test]
    fn a_stage_that_is_dropped_failed() {
        let (progress, output) = tapped(false, false);
        let stage = progress.stage("qemu");
        stage.update("unpacking");
        drop(stage);
        let line = output.recv().expect("a line");
        assert!(line.starts_with("qemu ") && line.ends_with("failed: unpacking\n"), "{line:?}");
        assert_eq!(progress.stages().len(), 1);
    }

    #[test]
    fn a_running_stage_shows_by_itself_on_either_output() {
        for terminal in [true, false] {
            let (progress, output) = tapped(terminal, false);
            let stage = progress.stage("kernel");
            stage.update("working");
            let line = output.recv().expect("the ticker prints");
            assert!(line.contains("kernel") && line.contains("working"), "{line:?}");
            assert_eq!(line.starts_with("\r\x1b[K"), terminal);
            stage.done("built");
        }
    }

    #[test]
    fn a_note_erases_the_live_line_first() {
        let (progress, output) = tapped(true, false);
        let stage = progress.stage("kernel");
        output.recv().expect("the spinner");
        progress.note("hello");
        drop(stage);
        drop(progress);
        let all: String = output.iter().collect();
        assert!(all.contains("\r\x1b[Khello\n"), "{all:?}");
    }

    #[test]
    fn quiet_keeps_notes_and_failures() {
        let (progress, output) = tapped(false, true);
        progress.stage("image").done("fine");
        progress.note("installing");
        drop(progress.stage("kernel"));
        drop(progress);
        let all: Vec<String> = output.iter().collect();
        assert_eq!(all.len(), 2, "{all:?}");
        assert_eq!(all[0], "installing\n");
        assert!(all[1].ends_with("failed\n"));
    }
}
