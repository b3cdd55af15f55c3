//! Ends a wait for one part of a lab when another part fails.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use anyhow::Result;
use vvu_process::interrupt;

/// How often a wait checks the other parts of its lab, which give it no notice.
pub(crate) const PERIOD: Duration = Duration::from_millis(200);

/// A VM or a host process of a lab.
pub(crate) trait Part: Send {
    /// Fails if the part has failed. Does not block.
    fn check(&mut self) -> Result<()>;
}

/// The running parts of a lab.
#[derive(Default)]
pub(crate) struct Watch {
    parts: Mutex<Vec<Weak<Mutex<dyn Part>>>>,
    /// Waits do not check other parts.
    tolerant: AtomicBool,
}

impl Watch {
    /// Adds a part; it leaves when its owner drops it.
    pub(crate) fn add(&self, part: Weak<Mutex<dyn Part>>) {
        let mut parts = lock(&self.parts);
        parts.retain(|part| part.strong_count() > 0);
        parts.push(part);
    }

    /// Fails if a part has failed or a signal has asked this program to stop.
    ///
    /// A part whose lock is held is not checked: a wait for that very part holds it.
    pub(crate) fn check(&self) -> Result<()> {
        interrupt::check()?;
        if self.tolerant.load(Ordering::Relaxed) {
            return Ok(());
        }
        let parts: Vec<_> = lock(&self.parts).iter().filter_map(Weak::upgrade).collect();
        for part in parts {
            match part.try_lock() {
                Ok(mut part) => part.check()?,
                Err(TryLockError::Poisoned(part)) => part.into_inner().check()?,
                Err(TryLockError::WouldBlock) => {}
            }
        }
        Ok(())
    }

    /// Chooses whether waits go on when other parts fail.
    pub(crate) fn set_tolerant(&self, tolerant: bool) {
        self.tolerant.store(tolerant, Ordering::Relaxed);
    }

    /// Calls `poll`, which blocks for at most the time it is given, until it returns a value; `None` after `deadline`.
    ///
    /// # Errors
    ///
    /// Fails when `poll` does, when a part of the lab fails, and on a signal.
    pub(crate) fn wait<T>(
        &self,
        deadline: Instant,
        mut poll: impl FnMut(Duration) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let value = poll(PERIOD.min(left))?;
            if value.is_some() {
                return Ok(value);
            }
            self.check()?;
            if left.is_zero() {
                return Ok(None);
            }
        }
    }
}

/// Locks `mutex`. What it protects stays consistent when a thread that holds it panics.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;
    use std::sync::Arc;

    struct Broken;

    impl Part for Broken {
        fn check(&mut self) -> Result<()> {
            bail!("broken")
        }
    }

    #[test]
    fn a_wait_ends_when_another_part_fails_and_not_after_that_part_is_gone() {
        let watch = Watch::default();
        let part: Arc<Mutex<dyn Part>> = Arc::new(Mutex::new(Broken));
        watch.add(Arc::downgrade(&part));
        let far = Instant::now() + Duration::from_secs(60);
        let error = watch.wait(far, |_| Ok(None::<()>)).expect_err("broken");
        assert_eq!(error.to_string(), "broken");
        watch.set_tolerant(true);
        watch.check().expect("tolerated");
        watch.set_tolerant(false);
        {
            let _waited_for = lock(&part);
            watch.check().expect("its own wait sees its failure");
        }
        drop(part);
        watch.check().expect("gone");
        assert_eq!(watch.wait(Instant::now(), |_| Ok(None::<()>)).expect("waited"), None);
    }
}
