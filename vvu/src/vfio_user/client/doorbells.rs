//! A thread that turns signals of events into register writes.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::event::{Event, StopToken};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;

use crate::pci::{DeviceError, Doorbell};

/// Writes registers when events are signalled, until it is dropped.
#[derive(Debug)]
pub(crate) struct Doorbells {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    poll: OwnedFd,
    stop: StopToken,
    bindings: Mutex<Bindings>,
}

#[derive(Debug, Default)]
struct Bindings {
    list: Vec<Binding>,
    next_key: u64,
}

#[derive(Debug)]
struct Binding {
    key: u64,
    doorbell: Doorbell,
    event: Event,
}

/// Key of the stop event; bindings count from 1.
const STOP: u64 = 0;

impl Doorbells {
    /// Starts the thread; `ring` rings a doorbell.
    pub(crate) fn new<R>(ring: R) -> Result<Self, DeviceError>
    where
        R: Fn(Doorbell) -> Result<(), DeviceError> + Send + 'static,
    {
        let start = || -> std::io::Result<Self> {
            let poll = epoll::create(CreateFlags::CLOEXEC)?;
            let stop = StopToken::new()?;
            epoll::add(&poll, &stop, EventData::new_u64(STOP), EventFlags::IN)?;
            let shared = Arc::new(Shared { poll, stop, bindings: Mutex::default() });
            let thread = std::thread::Builder::new().name("doorbells".into()).spawn({
                let shared = Arc::clone(&shared);
                move || shared.run(ring)
            })?;
            Ok(Self { shared, thread: Some(thread) })
        };
        start().map_err(|source| DeviceError::Io { what: "start the doorbell thread".into(), source })
    }

    /// Rings `doorbell` at each signal of `event`, which must not block, from now on. An event bound before to the same
    /// doorbell is bound no longer.
    pub(crate) fn bind(&self, doorbell: Doorbell, event: &Event) -> Result<(), DeviceError> {
        let what = || format!("bind {doorbell:?}");
        let event = event.try_clone().map_err(|source| DeviceError::Io { what: what(), source })?;
        let mut bindings = self.shared.bindings();
        bindings.next_key += 1;
        let key = bindings.next_key;
        epoll::add(&self.shared.poll, &event, EventData::new_u64(key), EventFlags::IN)
            .map_err(|errno| DeviceError::Io { what: what(), source: errno.into() })?;
        self.shared.remove(&mut bindings, doorbell);
        bindings.list.push(Binding { key, doorbell, event });
        Ok(())
    }

    /// Binds no event to `doorbell` any longer.
    pub(crate) fn unbind(&self, doorbell: Doorbell) {
        self.shared.remove(&mut self.shared.bindings(), doorbell);
    }
}

impl Shared {
    fn bindings(&self) -> MutexGuard<'_, Bindings> {
        self.bindings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self, bindings: &mut Bindings, doorbell: Doorbell) {
        for binding in bindings.list.extract_if(.., |binding| binding.doorbell == doorbell) {
            // The caller's handle keeps the event alive, so it would stay in the poll set.
            if let Err(error) = epoll::delete(&self.poll, &binding.event) {
                log::debug!("cannot stop waiting for a doorbell's event: {error}");
            }
        }
    }

    fn run(&self, ring: impl Fn(Doorbell) -> Result<(), DeviceError>) {
        let mut events = Vec::with_capacity(16);
        loop {
            events.clear();
            match epoll::wait(&self.poll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return log::error!("doorbells end: {error}"),
            }
            for event in &events {
                let key = event.data.u64();
                if key == STOP {
                    return;
                }
                if let Some(doorbell) = self.take_signal(key)
                    && let Err(error) = ring(doorbell)
                {
                    log::warn!("doorbell lost: {error}");
                }
            }
        }
    }

    /// Returns the doorbell of the signalled binding; `None` if it was replaced or has no signal any more.
    fn take_signal(&self, key: u64) -> Option<Doorbell> {
        let bindings = self.bindings();
        let binding = bindings.list.iter().find(|binding| binding.key == key)?;
        (binding.event.drain() > 0).then_some(binding.doorbell)
    }
}

impl Drop for Doorbells {
    fn drop(&mut self) {
        self.shared.stop.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the doorbell thread panicked");
        }
    }
}
