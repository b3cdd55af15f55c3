//! Turns the signals that ask a process to end into a stop request.
#![expect(
    unsafe_code,
    reason = "the caller vouches that a signal handler does only what is async-signal-safe"
)]

use std::io;

use signal_hook::consts::{SIGINT, SIGTERM};
use vvu::StopToken;

/// Returns a token whose stop is requested by the first `SIGINT` or `SIGTERM`.
///
/// # Errors
/// When there is no file descriptor left.
pub(crate) fn on_signal() -> io::Result<StopToken> {
    let stop = StopToken::new()?;
    for signal in [SIGINT, SIGTERM] {
        let handle = stop.clone();
        // SAFETY: the handler stores to an atomic and writes to a non-blocking descriptor, no more.
        unsafe { signal_hook::low_level::register(signal, move || handle.stop()) }?;
    }
    Ok(stop)
}
