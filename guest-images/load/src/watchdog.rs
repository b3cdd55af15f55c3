//! Names requests that take long while they are still on their way, so that a lost notification does not look like a load
//! that never ends.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Age at which a request is reported. It is reported again each time its age has doubled.
const FIRST_REPORT: Duration = Duration::from_secs(5);
/// Time between two looks at all requests.
const INTERVAL: Duration = Duration::from_secs(1);

/// The requests in flight, one for each thread.
#[derive(Debug)]
pub(crate) struct Watchdog {
    file: PathBuf,
    slots: Vec<Slot>,
    ended: Mutex<bool>,
    end: Condvar,
}

/// The request of a thread.
#[derive(Debug, Default)]
pub(crate) struct Slot(Mutex<Option<Request>>);

#[derive(Debug)]
struct Request {
    what: &'static str,
    block: u64,
    /// CPU that the thread made the request on; it chose the hardware queue.
    cpu: usize,
    began: Instant,
    next_report: Duration,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slot {
    /// Makes a request for `block`, watched.
    pub(crate) fn during<T>(&self, what: &'static str, block: u64, request: impl FnOnce() -> T) -> T {
        let (cpu, began) = (rustix::thread::sched_getcpu(), Instant::now());
        *lock(&self.0) = Some(Request { what, block, cpu, began, next_report: FIRST_REPORT });
        let result = request();
        *lock(&self.0) = None;
        result
    }
}

impl Watchdog {
    /// A watchdog for so many threads that load `file`.
    pub(crate) fn new(file: &Path, threads: u32) -> Self {
        let slots = (0..threads).map(|_| Slot::default()).collect();
        Self { file: file.to_owned(), slots, ended: Mutex::new(false), end: Condvar::new() }
    }

    /// The slot of thread `index`, counted from 0.
    pub(crate) fn slot(&self, index: usize) -> &Slot {
        &self.slots[index]
    }

    /// Watches until `work` has ended, and returns its result.
    pub(crate) fn watch<T>(&self, work: impl FnOnce() -> T) -> T {
        thread::scope(|scope| {
            let _end = End(self);
            scope.spawn(|| self.run());
            work()
        })
    }

    fn run(&self) {
        let mut ended = lock(&self.ended);
        while !*ended {
            ended = self.end.wait_timeout(ended, INTERVAL).unwrap_or_else(PoisonError::into_inner).0;
            for report in self.reports(Instant::now()) {
                eprintln!("vvu-load: {report}");
            }
        }
    }

    /// Describes the requests whose time for a report has come.
    fn reports(&self, now: Instant) -> Vec<String> {
        let mut reports = Vec::new();
        for (thread, slot) in self.slots.iter().enumerate() {
            let mut slot = lock(&slot.0);
            let Some(request) = slot.as_mut() else { continue };
            let age = now.saturating_duration_since(request.began);
            if age < request.next_report {
                continue;
            }
            request.next_report = age * 2;
            let Request { what, block, cpu, .. } = request;
            let queue = queue_of(&self.file, *cpu).map_or(String::new(), |queue| format!(", queue {queue}"));
            reports.push(format!(
                "a {what} of block {block} of {} has taken {} s so far (thread {thread}, CPU {cpu}{queue})",
                self.file.display(),
                age.as_secs()
            ));
        }
        reports
    }
}

/// Ends the watchdog when the work ends, in whatever way.
struct End<'w>(&'w Watchdog);

impl Drop for End<'_> {
    fn drop(&mut self) {
        *lock(&self.0.ended) = true;
        self.0.end.notify_all();
    }
}

/// The hardware queue that requests of `cpu` take; `None` if the kernel names none, as for a file that is no disk.
fn queue_of(file: &Path, cpu: usize) -> Option<String> {
    let device = fs::metadata(file).ok()?.rdev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let queues = fs::read_dir(format!("/sys/dev/block/{major}:{minor}/mq")).ok()?;
    queues.flatten().find_map(|queue| {
        let cpus = fs::read_to_string(queue.path().join("cpu_list")).ok()?;
        let found = cpus.trim().split(", ").any(|got| got.parse() == Ok(cpu));
        found.then(|| queue.file_name().to_string_lossy().into_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_reported_each_time_its_age_has_doubled() {
        let watchdog = Watchdog::new(Path::new("/dev/null"), 2);
        let later = |seconds| Instant::now() + Duration::from_secs(seconds);
        watchdog.slot(1).during("read", 17, || {
            assert!(watchdog.reports(later(4)).is_empty());
            let reports = watchdog.reports(later(6));
            assert!(
                reports[0]
                    .starts_with("a read of block 17 of /dev/null has taken 6 s so far (thread 1, CPU ")
            );
            assert!(watchdog.reports(later(11)).is_empty());
            assert_eq!(watchdog.reports(later(14)).len(), 1);
        });
        assert!(watchdog.reports(later(100)).is_empty(), "it has ended");
    }

    #[test]
    fn it_ends_with_the_work() {
        let watchdog = Watchdog::new(Path::new("/dev/null"), 1);
        assert_eq!(watchdog.watch(|| 7), 7);
        let panics =
            std::panic::catch_unwind(|| Watchdog::new(Path::new("/dev/null"), 1).watch(|| panic!("work")));
        assert!(panics.is_err());
    }
}
