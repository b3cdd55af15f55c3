//! Values that are dropped only after the next commit.

use std::cell::RefCell;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// Values that wait for a commit.
type Waiting = Vec<Box<dyn Send>>;

thread_local! {
    /// `None` in threads that commit nothing, where values are dropped at once.
    static WAITING: RefCell<Option<Waiting>> = const { RefCell::new(None) };
}

/// From now on this thread keeps the values that are dropped until it [releases](release) them.
pub fn hold() {
    WAITING.with(|waiting| {
        waiting.borrow_mut().get_or_insert_default();
    });
}

/// Returns the values that were dropped since the last call. The caller has committed, and drops them.
pub fn release() -> Vec<Box<dyn Send>> {
    WAITING.with(|waiting| waiting.borrow_mut().as_mut().map(std::mem::take).unwrap_or_default())
}

/// Keeps `value` until the next commit; gives it back in a thread that commits nothing.
pub fn hold_until_commit<T: Send + 'static>(value: T) -> Option<T> {
    let mut value = Some(value);
    // There is no thread-local storage any more when the thread ends.
    let _ = WAITING.try_with(|waiting| {
        if let Some(waiting) = waiting.borrow_mut().as_mut() {
            waiting.extend(value.take().map(|value| Box::new(value) as Box<dyn Send>));
        }
    });
    value
}

/// A value that outlives its drop until the next commit.
#[derive(Debug)]
pub struct Held<T: Send + 'static>(Option<T>);

/// A file descriptor that the saved state may name.
pub type Fd = Held<OwnedFd>;

impl<T: Send + 'static> Held<T> {
    /// Holds `value`.
    #[must_use]
    pub fn new(value: T) -> Self {
        Self(Some(value))
    }

    /// Returns the value, which is dropped as usual.
    ///
    /// # Panics
    /// Never: only the drop leaves it empty.
    #[must_use]
    #[expect(clippy::expect_used, reason = "only the drop leaves it empty")]
    pub fn into_inner(mut self) -> T {
        self.0.take().expect("a value")
    }
}

impl<T: Send + 'static> Deref for Held<T> {
    type Target = T;

    #[expect(clippy::expect_used, reason = "only the drop leaves it empty")]
    fn deref(&self) -> &T {
        self.0.as_ref().expect("a value")
    }
}

impl<T: Send + 'static> Drop for Held<T> {
    fn drop(&mut self) {
        if let Some(value) = self.0.take() {
            drop(hold_until_commit(value));
        }
    }
}

impl<T: AsFd + Send + 'static> AsFd for Held<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (**self).as_fd()
    }
}

impl Fd {
    /// The number by which the saved state names it.
    #[must_use]
    pub fn number(&self) -> RawFd {
        self.as_raw_fd()
    }
}

impl<F: Into<OwnedFd>> From<F> for Fd {
    fn from(fd: F) -> Self {
        Self::new(fd.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;

    fn is_open(number: RawFd) -> bool {
        std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok()
    }

    #[test]
    fn a_descriptor_stays_open_until_the_commit() {
        hold();
        let fd = Fd::from(OwnedFd::from(Event::new().expect("event")));
        let number = fd.number();
        drop(fd);
        assert!(is_open(number));
        assert_eq!(release().len(), 1);
        assert_eq!(release().len(), 0);
    }

    #[test]
    fn without_commits_nothing_waits() {
        let (sender, dropped) = std::sync::mpsc::channel::<()>();
        drop(Held::new(sender));
        assert!(dropped.try_recv().is_err_and(|error| error == std::sync::mpsc::TryRecvError::Disconnected));
    }
}
