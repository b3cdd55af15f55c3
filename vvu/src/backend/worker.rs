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
use super::serve::Service;

/// A queue and the thread that serves it. Dropping it ends the thread, once the requests that are in flight are done.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Locked by the thread while it works on requests.
    service: Mutex<Service>,
    kicks: Kicks,
    /// Makes the thread unlock the service at the next opportunity.
    interrupt: AtomicBool,
    ended: AtomicBool,
}

impl Worker {
    /// Starts the thread of a stopped queue, which polls for `window`.
    ///
    /// # Errors
    /// When there is no thread or file descriptor left.
    pub(super) fn start(index: u16, device: Arc<dyn Device>, window: Duration) -> io::Result<Self> {
        let kicks = Kicks::new()?;
        let engine = device.engine(kicks.wake_up_event())?;
        if let Some(event) = engine.event() {
            kicks.watch(event)?;
        }
        let shared = Arc::new(Shared {
            service: Mutex::new(Service::new(Queue::new(index, window), engine)),
            kicks,
            interrupt: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let its = Arc::clone(&shared);
        let thread = thread::Builder::new().name(format!("queue {index}")).spawn(move || its.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Changes the queue while no request is in flight.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Queue) -> T) -> T {
        self.shared.interrupt.store(true, Ordering::Relaxed);
        let mut service = self.shared.service();
        self.shared.interrupt.store(false, Ordering::Relaxed);
        service.drain();
        let result = change(&mut service.queue);
        drop(service);
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
    fn service(&self) -> MutexGuard<'_, Service> {
        self.service.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let ended = || self.ended.load(Ordering::SeqCst);
        // An engine that waits takes wake-ups, too: the one that says it is time to end may be gone.
        while !ended() {
            if let Err(error) = self.kicks.wait() {
                log::error!("the thread of queue {} ends: cannot wait: {error}", self.service().queue.index);
                break;
            }
            if !ended() {
                self.service().serve(&self.interrupt);
            }
        }
        self.service().drain();
    }
}
