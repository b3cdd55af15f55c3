//! Tells whether two descriptors are one open file.
#![expect(unsafe_code, reason = "rustix has no kcmp")]

use std::os::fd::{AsFd, AsRawFd};

/// Returns whether `a` and `b` are duplicates of each other, kcmp(2). A kernel that cannot tell, one without
/// `CONFIG_KCMP`, makes it false.
pub(super) fn is_same_file<F: AsFd>(a: &F, b: &F) -> bool {
    const KCMP_FILE: libc::c_int = 0;
    let [a, b] = [a, b].map(|fd| libc::c_long::from(fd.as_fd().as_raw_fd()));
    let own = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the call looks at the numbers of two open descriptors and touches no memory of this process.
    unsafe { libc::syscall(libc::SYS_kcmp, own, own, KCMP_FILE, a, b) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;

    #[test]
    fn duplicates_are_the_same_and_nothing_else_is() {
        let (one, other) = (Event::new().expect("event"), Event::new().expect("event"));
        let duplicate = one.try_clone().expect("clone");
        assert!(is_same_file(&one, &duplicate) && is_same_file(&one, &one));
        assert!(!is_same_file(&one, &other) && !is_same_file(&duplicate, &other));
    }
}
