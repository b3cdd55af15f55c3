//! Stopping on Ctrl-C (SIGINT), SIGTERM and SIGHUP.
//!
//! A program calls [`listen`] once. The first signal kills every child, so that whoever waits for one sees it end,
//! cleans up and returns; [`requested`] is true from then on. The second signal ends the program at once.

use std::process::ExitCode;
use std::thread;

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::children;

/// As a shell reports a program that SIGINT ended: 128 + 2.
const EXIT_CODE: u8 = 130;

/// Installs the signal handlers.
///
/// # Errors
///
/// Fails if they cannot be installed.
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

/// Whether a signal has arrived. A child that failed was then interrupted, not broken.
#[must_use]
pub fn requested() -> bool {
    children::all_killed()
}

/// Fails once a signal has arrived. Long work without children calls it regularly.
///
/// # Errors
///
/// Fails with "interrupted".
pub fn check() -> Result<()> {
    if requested() {
        bail!("interrupted");
    }
    Ok(())
}

/// The exit code of an interrupted program.
pub fn exit_code() -> ExitCode {
    ExitCode::from(EXIT_CODE)
}
