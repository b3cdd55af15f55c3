//! Closes what peers sent without waiting for it.
//!
//! Closing a file descriptor can block: a TCP socket with `SO_LINGER` waits for its peer, a FUSE file for
//! its server, and a UNIX socket closes the descriptors in its queue. A peer chooses what it sends, so the
//! device leaves the closing to a thread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::durable::hold_until_commit;

/// Values that may wait to be dropped before the device takes nothing more from peers.
const WAITING_MAX: usize = 64;

/// Name of the thread.
const THREAD_NAME: &str = "vvu-closer";

/// Drops values in a thread.
#[derive(Debug)]
pub(super) struct Closer {
    queue: Sender<Box<dyn Send>>,
    waiting: Arc<AtomicUsize>,
}

impl Closer {
    /// Starts the thread, which ends after the closer is dropped. Whenever there is room again, the thread
    /// writes to the eventfd `wake`.
    ///
    /// On return the thread is past its start: what a thread does there, the sandbox of the proxy forbids.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub(super) fn new(wake: Arc<OwnedFd>) -> io::Result<Self> {
        let (queue, values) = channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&waiting);
        let (started, start) = channel();
        std::thread::Builder::new().name(THREAD_NAME.to_owned()).stack_size(64 << 10).spawn(move || {
            // The receiver waits for this.
            let _ = started.send(());
            drop_all(&values, &counter, &wake);
        })?;
        start.recv().map_err(io::Error::other)?;
        Ok(Self { queue, waiting })
    }

    /// Drops `value` in the thread. The queue is bounded only if callers take nothing more from peers while
    /// the closer [is full](Self::is_full).
    ///
    /// A value that the saved state may name is dropped after the next commit.
    pub(super) fn close(&self, value: impl Send + 'static) {
        if cfg!(fuzzing) {
            // Fuzz targets close nothing that blocks, and a thread would slow them down.
            return drop(value);
        }
        if let Some(value) = hold_until_commit(value) {
            self.close_now(Box::new(value));
        }
    }

    /// As [`close`](Self::close), for a value that waited for a commit already.
    pub(super) fn close_now(&self, value: Box<dyn Send>) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        if let Err(error) = self.queue.send(value) {
            // The thread ends only after the closer, unless dropping a value panicked. Better to keep the
            // value than to block.
            log::error!("cannot close a peer's file descriptors: {error}");
            std::mem::forget(error);
        }
    }

    /// Whether too many values wait.
    pub(super) fn is_full(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) >= WAITING_MAX
    }
}

fn drop_all(values: &Receiver<Box<dyn Send>>, waiting: &AtomicUsize, wake: &OwnedFd) {
    for value in values {
        drop(value);
        if waiting.fetch_sub(1, Ordering::SeqCst) == WAITING_MAX {
            // A full counter wakes the device as well.
            let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Event, wait_readable};
    use std::os::fd::AsFd;
    use std::time::{Duration, Instant};

    /// Blocks whoever drops it until the sender at the other end is dropped.
    struct Slow(Receiver<()>);

    impl Drop for Slow {
        fn drop(&mut self) {
            let _ = self.0.recv();
        }
    }

    /// The names of this process's threads. A thread gives itself its name at its start.
    fn thread_names() -> Vec<String> {
        let tasks = std::fs::read_dir("/proc/self/task").expect("tasks");
        let names = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        names.map(|name| name.trim().to_owned()).collect()
    }

    #[test]
    fn the_thread_is_past_its_start_when_there_is_a_closer() {
        for _ in 0..100 {
            let wake = Event::new().expect("event");
            let closer = Closer::new(Arc::new(wake.into())).expect("thread");
            assert!(thread_names().iter().any(|name| name == THREAD_NAME), "{:?}", thread_names());
            drop(closer);
        }
    }

    #[test]
    fn slow_values_fill_the_closer_and_it_wakes_the_device_when_there_is_room() {
        let wake = Event::new().expect("event");
        let closer = Closer::new(Arc::new(wake.try_clone().expect("dup").into())).expect("thread");
        let (release, blocked) = channel();
        closer.close(Slow(blocked));
        for _ in 1..WAITING_MAX {
            assert!(!closer.is_full());
            closer.close(());
        }
        assert!(closer.is_full());
        let look = wait_readable(&[wake.as_fd()], Some(Instant::now())).expect("look");
        assert_eq!(look, None, "nothing wakes the device while the closer is full");
        drop(release);
        let deadline = Instant::now() + Duration::from_secs(20);
        assert_eq!(wait_readable(&[wake.as_fd()], Some(deadline)).expect("wait"), Some(0));
        assert!(!closer.is_full());
    }
}
