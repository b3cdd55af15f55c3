//! Log lines on standard error, no more of them than a person can read: peers cause many of them.

use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Lines in one [`WINDOW`]; the rest are counted.
const LINES_MAX: u32 = 100;
const WINDOW: Duration = Duration::from_secs(1);

struct Logger(Mutex<Option<Window>>);

struct Window {
    start: Instant,
    lines: u32,
}

static LOGGER: Logger = Logger(Mutex::new(None));

/// Logs warnings and errors; with `verbosity` 1 also what happens, with 2 everything.
pub(crate) fn init(verbosity: u8) {
    let level = match verbosity {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        _ => LevelFilter::Trace,
    };
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(level);
    }
}

impl Logger {
    /// Whether another line may go out, and how many did not in the window before.
    fn admit(&self, now: Instant) -> (bool, u32) {
        let mut window = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let current = window.get_or_insert(Window { start: now, lines: 0 });
        let mut suppressed = 0;
        if now.duration_since(current.start) >= WINDOW {
            suppressed = current.lines.saturating_sub(LINES_MAX);
            *current = Window { start: now, lines: 0 };
        }
        current.lines = current.lines.saturating_add(1);
        (current.lines <= LINES_MAX, suppressed)
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // This one warns of what is normal: a device without an error interrupt.
        let chatty = metadata.target().starts_with("vfio_ioctls");
        let level = if chatty { metadata.level().max(Level::Debug) } else { metadata.level() };
        level <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let (admitted, suppressed) = self.admit(Instant::now());
        let mut stderr = std::io::stderr().lock();
        // There is nobody left to tell if standard error is gone.
        if suppressed > 0 {
            let _ = writeln!(stderr, "vvu: warning: {suppressed} more lines were left out");
        }
        if admitted {
            let level = match record.level() {
                Level::Error => "error: ",
                Level::Warn => "warning: ",
                _ => "",
            };
            let _ = writeln!(stderr, "vvu: {level}{}", record.args());
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let logger = Logger(Mutex::new(None));
        let start = Instant::now();
        let admitted = (0..150).filter(|_| logger.admit(start).0).count();
        assert_eq!(admitted, 100);
        assert_eq!(logger.admit(start + WINDOW), (true, 50));
        assert_eq!(logger.admit(start + WINDOW), (true, 0));
    }
}
