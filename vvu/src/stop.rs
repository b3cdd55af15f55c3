//! Turns the signals that ask a process to end into a stop request.
#![expect(
    unsafe_code,
    reason = "the caller vouches that a signal handler does only what is async-signal-safe; no crate tells whether a \
              signal is ignored"
)]

use std::io;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vvu::StopToken;

/// Returns a token whose stop is requested by the first `SIGINT`, `SIGTERM` or `SIGHUP`. A process that was
/// started with `SIGHUP` ignored, as by nohup(1), goes on ignoring it.
///
/// # Errors
/// When there is no file descriptor left.
pub(crate) fn on_signal() -> io::Result<StopToken> {
    let stop = StopToken::new()?;
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        if signal == SIGHUP && is_ignored(signal)? {
            continue;
        }
        let handle = stop.clone();
        // SAFETY: the handler stores to an atomic and writes to a non-blocking descriptor, no more.
        unsafe { signal_hook::low_level::register(signal, move || handle.stop()) }?;
    }
    Ok(stop)
}

/// Whether `signal` is ignored at this moment.
fn is_ignored(signal: i32) -> io::Result<bool> {
    // SAFETY: all zeroes are a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action the kernel only writes the present one to `action`.
    match unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) } {
        0 => Ok(action.sa_sigaction == libc::SIG_IGN),
        _ => Err(io::Error::last_os_error()),
    }
}
