//! Shortages: errors that say that a resource of the process or the system is used up, and that pass.

use std::error::Error;
use std::io;

use rustix::io::Errno;

/// The errors of a shortage, each with what helps.
const SHORTAGES: &[(Errno, &str)] = &[
    (Errno::MFILE, "raise the limit on open files (`ulimit -n`)"),
    (Errno::NFILE, "raise the system's limit on open files (sysctl fs.file-max)"),
    (
        Errno::NOMEM,
        "make memory available, or raise the limits on it (`ulimit -v`, `ulimit -l`, the cgroup's)",
    ),
    (Errno::NOBUFS, "make memory available"),
    (
        Errno::NOSPC,
        "make room in the file system, or raise the kernel's limits (sysctl fs.epoll.max_user_watches)",
    ),
    (Errno::DQUOT, "raise the disk quota"),
    (Errno::AGAIN, "allow more threads (`ulimit -u`, the cgroup's pids.max), or make memory available"),
];

/// Whether a call failed for want of a resource that may be available again later. `EAGAIN` says so of threads, and of
/// everything else that there is nothing to do yet.
#[must_use]
pub fn is_shortage(error: &io::Error) -> bool {
    error.kind() != io::ErrorKind::WouldBlock && remedy(error).is_some()
}

/// What helps if `error` is a shortage.
#[must_use]
pub fn remedy(error: &io::Error) -> Option<&'static str> {
    let errno = Errno::from_io_error(error)?;
    SHORTAGES.iter().find(|(shortage, _)| *shortage == errno).map(|(_, remedy)| *remedy)
}

/// What helps if `error` or one of its causes is a shortage.
#[must_use]
pub fn remedy_of_cause(error: &(dyn Error + 'static)) -> Option<&'static str> {
    let found = match error.downcast_ref::<Errno>() {
        Some(errno) => remedy(&(*errno).into()),
        None => error.downcast_ref().and_then(remedy),
    };
    found.or_else(|| remedy_of_cause(error.source()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_has_a_remedy_and_other_errors_have_none() {
        let error = |errno: Errno| io::Error::from(errno);
        assert!(remedy(&error(Errno::MFILE)).is_some_and(|remedy| remedy.contains("ulimit -n")));
        assert!(is_shortage(&error(Errno::NOMEM)));
        assert!(!is_shortage(&error(Errno::AGAIN)));
        assert!(!is_shortage(&io::Error::other("no system call")));
    }
}
