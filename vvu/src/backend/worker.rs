//! The thread of one queue.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::device::Device;
use super::notify::Kicks;
use super::queue::Queue;
use super::sync;

/// A queue and the thread that serves it. Dropping it ends the thread, once the request it carries out is done.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Locked by the thread while it works on requests.
    queue: Mutex<Queue>,
    kicks: Kicks,
    /// Makes the thread unlock the queue at the next opportunity.
    interrupt: AtomicBool,
    ended: AtomicBool,
}

impl Worker {
    /// Starts the thread of a stopped queue, which polls for `window`.
    ///
    /// # Errors
    /// When there is no thread or file descriptor left.
    pub(super) fn start(index: u16, device: Arc<dyn Device>, window: Duration) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue::new(index, window)),
            kicks: Kicks::new()?,
            interrupt: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let its = Arc::clone(&shared);
        let thread =
            thread::Builder::new().name(format!("queue {index}")).spawn(move || its.run(&*device))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Changes the queue between two requests.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Queue) -> T) -> T {
        self.shared.interrupt.store(true, Ordering::Relaxed);
        let mut queue = self.shared.queue();
        self.shared.interrupt.store(false, Ordering::Relaxed);
        let result = change(&mut queue);
        drop(queue);
        self.shared.kicks.wake_up();
        result
    }

    /// Makes `event` the kick event.
    ///
    /// # Errors
    /// When `event` cannot be waited for.
    pub(super) fn set_kick(&self, event: Option<File>) -> io::Result<()> {
        self.shared.kicks.set_kick(event)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // The driver may go on making requests, which would keep the thread busy for ever.
        self.shared.interrupt.store(true, Ordering::Relaxed);
        self.shared.kicks.wake_up();
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            log::error!("the thread of a queue panicked: this is a bug");
        }
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, device: &dyn Device) {
        loop {
            if let Err(error) = self.kicks.wait() {
                log::error!("the thread of queue {} ends: cannot wait: {error}", self.queue().index);
                return;
            }
            if self.ended.load(Ordering::SeqCst) {
                return;
            }
            sync::serve(&mut self.queue(), device, &self.interrupt);
        }
    }
}
