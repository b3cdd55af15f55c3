//! Log lines on standard error.
//!
//! Peers cause many lines, so only as many are written as a person can read. And whoever reads standard error
//! may stop reading, which must not stop the process: a thread writes the lines, and those that it cannot
//! write in time are dropped and counted.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Lines in one [`WINDOW`]; the rest are counted.
const LINES_MAX: u32 = 100;
const WINDOW: Duration = Duration::from_secs(1);
/// Lines that wait to be written.
const QUEUE_SIZE: usize = 256;
/// Time that a process gives its last lines.
const LAST_LINES: Duration = Duration::from_secs(1);

struct Logger {
    window: Mutex<Option<Window>>,
    queue: OnceLock<SyncSender<Entry>>,
}

struct Window {
    start: Instant,
    lines: u32,
    /// Lines that found no place in the queue.
    dropped: u32,
}

/// An entry of the writer's queue.
enum Entry {
    Line(String),
    /// Everything before this entry is written when the sender is dropped.
    Written(Sender<()>),
}

static LOGGER: Logger = Logger::new();

/// Starts to log warnings and errors; with `verbosity` 1 also what happens, with 2 everything.
///
/// # Errors
/// When the system has no thread left.
pub(crate) fn init(verbosity: u8) -> io::Result<()> {
    let level = match verbosity {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        _ => LevelFilter::Trace,
    };
    LOGGER.start(io::stderr())?;
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(level);
    }
    Ok(())
}

/// Writes the last line of the process, after all others. Gives up after [`LAST_LINES`].
pub(crate) fn finish(text: Option<&str>) {
    match text {
        // A supervisor has no thread to write its lines.
        Some(text) if LOGGER.queue.get().is_none() => eprintln!("vvu: {text}"),
        Some(text) => drop(LOGGER.put(format!("vvu: {text}\n"))),
        None => {}
    }
    LOGGER.flush();
}

impl Logger {
    const fn new() -> Self {
        Self { window: Mutex::new(None), queue: OnceLock::new() }
    }

    /// Starts the thread that writes to `out`; it runs when this returns.
    fn start(&self, out: impl Write + Send + 'static) -> io::Result<()> {
        let (queue, entries) = sync_channel(QUEUE_SIZE);
        let (running, is_running) = channel::<()>();
        std::thread::Builder::new().name("vvu-log".to_owned()).spawn(move || {
            drop(running);
            write_all(out, &entries);
        })?;
        // The end of the channel is the signal: nothing is sent.
        let _ = is_running.recv();
        let _ = self.queue.set(queue);
        Ok(())
    }

    fn window(&self) -> MutexGuard<'_, Option<Window>> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether another line may go out, and how many did not in the window before.
    fn admit(&self, now: Instant) -> (bool, u32) {
        let mut window = self.window();
        let current = window.get_or_insert(Window { start: now, lines: 0, dropped: 0 });
        let mut suppressed = 0;
        if now.duration_since(current.start) >= WINDOW {
            suppressed = current.lines.saturating_sub(LINES_MAX).saturating_add(current.dropped);
            *current = Window { start: now, lines: 0, dropped: 0 };
        }
        current.lines = current.lines.saturating_add(1);
        (current.lines <= LINES_MAX, suppressed)
    }

    /// Queues a line; false if there is no room.
    fn put(&self, line: String) -> bool {
        self.queue.get().is_some_and(|queue| queue.try_send(Entry::Line(line)).is_ok())
    }

    /// Queues a line that stands for `lines` lines, which are counted if there is no room.
    fn put_or_count(&self, line: String, lines: u32) {
        if !self.put(line)
            && let Some(window) = &mut *self.window()
        {
            window.dropped = window.dropped.saturating_add(lines);
        }
    }

    fn log_line(&self, now: Instant, level: Level, text: impl std::fmt::Display) {
        let (admitted, suppressed) = self.admit(now);
        if suppressed > 0 {
            self.put_or_count(format!("vvu: warning: {suppressed} more lines were left out\n"), suppressed);
        }
        if admitted {
            let level = match level {
                Level::Error => "error: ",
                Level::Warn => "warning: ",
                _ => "",
            };
            self.put_or_count(format!("vvu: {level}{text}\n"), 1);
        }
    }
}

fn write_all(mut out: impl Write, entries: &Receiver<Entry>) {
    for entry in entries {
        match entry {
            // Nobody is left to tell if standard error is gone.
            Entry::Line(line) => drop(out.write_all(line.as_bytes())),
            Entry::Written(sender) => drop(sender),
        }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // vfio_ioctls warns of what is normal: a device without an error interrupt.
        let chatty = metadata.target().starts_with("vfio_ioctls");
        let level = if chatty { metadata.level().max(Level::Debug) } else { metadata.level() };
        level <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            self.log_line(Instant::now(), record.level(), record.args());
        }
    }

    /// Waits until the queue is written, or gives up.
    fn flush(&self) {
        let (sender, written) = channel();
        if let Some(queue) = self.queue.get()
            && queue.try_send(Entry::Written(sender)).is_ok()
        {
            // Both outcomes are fine: all is written, or the reader does not read.
            let (Ok(()) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected)) =
                written.recv_timeout(LAST_LINES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let logger = Logger::new();
        let start = Instant::now();
        let admitted = (0..150).filter(|_| logger.admit(start).0).count();
        assert_eq!(admitted, 100);
        assert_eq!(logger.admit(start + WINDOW), (true, 50));
        assert_eq!(logger.admit(start + WINDOW), (true, 0));
    }

    /// The lines are longer than a pipe holds, and nobody reads; the counts come out when somebody does.
    #[test]
    fn a_log_that_nobody_reads_blocks_nobody_and_counts_what_it_drops() {
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        let logger = Logger::new();
        logger.start(std::fs::File::from(writer)).expect("thread");
        let start = Instant::now();
        let mut now = start;
        for _ in 0..20 {
            now += WINDOW;
            (0..LINES_MAX).for_each(|_| logger.log_line(now, Level::Warn, "x".repeat(1000)));
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        let mut reader = io::BufReader::new(std::fs::File::from(reader));
        let mut lines = io::BufRead::lines(&mut reader).map(|line| line.expect("line"));
        // A pipe holds 64 KiB, and the queue as many lines as it has places.
        for _ in 0..QUEUE_SIZE {
            assert!(lines.next().expect("a line").starts_with("vvu: warning: "));
        }
        let mut counted = None;
        while counted.is_none() {
            now += WINDOW;
            logger.log_line(now, Level::Info, "again");
            counted =
                lines.next().expect("a line").strip_suffix(" more lines were left out").map(str::to_owned);
        }
        let count: u32 =
            counted.expect("a count").trim_start_matches("vvu: warning: ").parse().expect("number");
        assert!((1..2000).contains(&count), "{count}");
    }

    #[test]
    fn the_last_lines_are_written_before_the_process_ends() {
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        let logger = Logger::new();
        logger.start(std::fs::File::from(writer)).expect("thread");
        logger.log_line(Instant::now(), Level::Error, "the end");
        logger.flush();
        let mut text = [0; 20];
        let count = std::fs::File::from(reader).read(&mut text).expect("read");
        assert_eq!(&text[..count], b"vvu: error: the end\n");
    }
}
