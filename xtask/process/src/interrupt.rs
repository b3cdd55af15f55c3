//! Ctrl-C and SIGTERM: everything of this process ends, in whatever stage it is.
//!
//! The first signal kills every child; whoever waits for one sees it end, cleans up and returns with
//! [`children::interrupted`] set. A second signal ends this process at once, and with it, by the death signal, what
//! it started.

use std::process::ExitCode;
use std::thread;

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::children;

/// Exit code of an interrupted task, as a shell reports SIGINT.
const EXIT_CODE: u8 = 130;

/// Begins to listen for the signals.
///
/// # Errors
///
/// The handlers cannot be installed.
pub fn listen() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot listen for signals")?;
    thread::spawn(move || {
        let mut signals = signals.forever();
        if signals.next().is_some() {
            children::kill_all();
        }
        if signals.next().is_some() {
            children::kill_all();
            std::process::exit(i32::from(EXIT_CODE));
        }
    });
    Ok(())
}

/// Fails once a signal came. Long work without children calls it now and then.
///
/// # Errors
///
/// A signal came.
pub fn check() -> Result<()> {
    if children::interrupted() {
        bail!("interrupted");
    }
    Ok(())
}

/// The exit code of an interrupted task.
pub fn exit_code() -> ExitCode {
    ExitCode::from(EXIT_CODE)
}
