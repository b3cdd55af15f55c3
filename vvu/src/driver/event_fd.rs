//! Eventfds by their descriptor, which `vmm-sys-util` only gives as a number.
#![expect(unsafe_code, reason = "turns a raw descriptor into a borrowed one")]

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// The descriptor of `event`, for as long as it is borrowed.
pub(crate) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor, and cannot close it while it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Takes the signals of `event`, which must not block; false if there were none.
pub(crate) fn take(event: &EventFd) -> bool {
    event.read().is_ok()
}
