//! Safe access to the descriptor of an [`EventFd`], which has none of its own.
#![expect(unsafe_code, reason = "vmm-sys-util's EventFd gives out its descriptor as a number only")]

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// The descriptor of `event`.
#[must_use]
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Takes the signals of `event`, which must not block; false if there were none.
#[must_use]
pub fn take(event: &EventFd) -> bool {
    event.read().is_ok()
}
