//! What the parts of the chain log, for tests of messages that a person has to read.

use std::sync::{Mutex, Once};

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Collector;

impl log::Log for Collector {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Info
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = format!("{} {}", record.level(), record.args());
            // Shown by the test runner when the test fails.
            eprintln!("{line}");
            LINES.lock().expect("log").push(line);
        }
    }

    fn flush(&self) {}
}

/// Starts to collect.
pub fn collect() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Collector).expect("the only logger");
        log::set_max_level(log::LevelFilter::Info);
    });
}

/// Whether a line has been logged that contains all of `parts`.
pub fn contain(parts: &[&str]) -> bool {
    LINES.lock().expect("log").iter().any(|line| parts.iter().all(|part| line.contains(part)))
}
