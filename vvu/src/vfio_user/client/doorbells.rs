//! A thread that turns signals of events into register writes.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::event::{Event, StopToken};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;

use crate::pci::DeviceError;
use crate::spec::pci::Region;

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
    region: Region,
    offset: u64,
    value: u16,
    event: Event,
}

/// Key of the stop event; bindings count from 1.
const STOP: u64 = 0;

impl Doorbells {
    /// Starts the thread; `write` writes a value at an offset of a region.
    pub(crate) fn new<W>(write: W) -> Result<Self, DeviceError>
    where
        W: Fn(Region, u64, u16) -> Result<(), DeviceError> + Send + 'static,
    {
        let start = || -> std::io::Result<Self> {
            let poll = epoll::create(CreateFlags::CLOEXEC)?;
            let stop = StopToken::new()?;
            epoll::add(&poll, &stop, EventData::new_u64(STOP), EventFlags::IN)?;
            let shared = Arc::new(Shared { poll, stop, bindings: Mutex::default() });
            let thread = std::thread::Builder::new().name("doorbells".into()).spawn({
                let shared = Arc::clone(&shared);
                move || shared.run(write)
            })?;
            Ok(Self { shared, thread: Some(thread) })
        };
        start().map_err(|source| DeviceError::Io { what: "start the doorbell thread".into(), source })
    }

    /// Writes `value` at `offset` of `region` at each signal of `event`, which must not block, from now
    /// on. An event bound before to the same write is bound no longer.
    pub(crate) fn bind(
        &self,
        region: Region,
        offset: u64,
        value: u16,
        event: &Event,
    ) -> Result<(), DeviceError> {
        let what = || format!("bind a doorbell at {offset:#x} of {region:?}");
        let event = event.try_clone().map_err(|source| DeviceError::Io { what: what(), source })?;
        let mut bindings = self.shared.bindings();
        bindings.next_key += 1;
        let key = bindings.next_key;
        epoll::add(&self.shared.poll, &event, EventData::new_u64(key), EventFlags::IN)
            .map_err(|errno| DeviceError::Io { what: what(), source: errno.into() })?;
        let replaced =
            |binding: &Binding| (binding.region, binding.offset, binding.value) == (region, offset, value);
        // The caller's handle keeps a replaced event alive, so it would stay in the poll set.
        for binding in bindings.list.extract_if(.., |binding| replaced(binding)) {
            if let Err(error) = epoll::delete(&self.shared.poll, &binding.event) {
                log::debug!("cannot stop waiting for a replaced doorbell: {error}");
            }
        }
        bindings.list.push(Binding { key, region, offset, value, event });
        Ok(())
    }
}

impl Shared {
    fn bindings(&self) -> MutexGuard<'_, Bindings> {
        self.bindings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, write: impl Fn(Region, u64, u16) -> Result<(), DeviceError>) {
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
                if let Some((region, offset, value)) = self.take_signal(key)
                    && let Err(error) = write(region, offset, value)
                {
                    log::warn!("doorbell lost: {error}");
                }
            }
        }
    }

    /// Returns what the signalled binding writes; `None` if it was replaced or has no signal any more.
    fn take_signal(&self, key: u64) -> Option<(Region, u64, u16)> {
        let bindings = self.bindings();
        let binding = bindings.list.iter().find(|binding| binding.key == key)?;
        (binding.event.drain() > 0).then_some((binding.region, binding.offset, binding.value))
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
