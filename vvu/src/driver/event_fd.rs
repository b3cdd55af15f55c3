//! Borrows the descriptor of an eventfd, which `vmm-sys-util` only gives as a number.
#![expect(unsafe_code, reason = "turns a raw descriptor into a borrowed one")]

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// The descriptor of `event`, for as long as it is borrowed.
pub(super) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor, and cannot close it while it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
