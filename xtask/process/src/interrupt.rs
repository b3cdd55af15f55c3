//! Stopping on Ctrl-C (SIGINT), SIGTERM and SIGHUP.
//!
//! A signal that this program was started to ignore, as `nohup` does with SIGHUP, stays ignored.
//!
//! A program calls [`listen`] once. The first signal kills every child, so that whoever waits for one sees it end,
//! cleans up and returns; [`requested`] is true from then on. The second signal ends the program at once.

use std::fs;
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
    let status = fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let heeded = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| !ignored(&status, *signal));
    let mut signals = Signals::new(heeded).context("cannot listen for signals")?;
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

/// Returns true if the process whose /proc/PID/status is `status` ignores `signal`.
fn ignored(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Bit 0 is signal 1.
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// Returns true once a signal has arrived. A child that fails after that was interrupted; it has no fault of its own.
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Set in the child that [`a_hangup_that_nohup_ignores_stays_ignored`] starts.
    const CHILD: &str = "VVU_TEST_LISTEN";

    #[test]
    fn a_hangup_that_nohup_ignores_stays_ignored() {
        if std::env::var_os(CHILD).is_some() {
            listen().expect("listens");
            let status = fs::read_to_string("/proc/self/status").expect("procfs");
            assert!(ignored(&status, SIGHUP) && !ignored(&status, SIGTERM), "{status}");
            return;
        }
        let test = std::env::current_exe().expect("this program");
        let mut command = Command::new("nohup");
        command.arg(test).args(["--exact", "interrupt::tests::a_hangup_that_nohup_ignores_stays_ignored"]);
        let output = command.env(CHILD, "1").output().expect("nohup starts");
        assert!(output.status.success(), "{output:?}");
    }

    #[test]
    fn the_mask_of_ignored_signals_is_read() {
        let status = "Name:\tx\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000004002\n";
        assert!(ignored(status, SIGHUP) && !ignored(status, SIGINT) && !ignored("", SIGHUP));
    }
}
