//! A back-end program that does not outlive the bridge.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::time::Instant;

use anyhow::{Context, bail};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};
use vvu::event::wait_readable;

use crate::commands::supervise::{END_TIME, Report};

/// How a program ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum Exit {
    /// With this status.
    Status(ExitStatus),
    /// It goes on in the background.
    Background,
}

/// A running program and everything that it started, below a [supervisor](crate::commands::supervise). Dropping it
/// ends them.
pub(super) struct Program {
    name: String,
    supervisor: Child,
    supervisor_end: OwnedFd,
    control: UnixStream,
}

impl Program {
    /// Starts a supervisor that starts `words`.
    ///
    /// # Errors
    /// When there is no descriptor or no process left. A program that cannot be started is an error of
    /// [`exit`](Self::exit).
    pub(super) fn start(words: &[String]) -> anyhow::Result<Self> {
        let name = words.first().context("name a command")?.clone();
        let context = || format!("cannot start {name}");
        let (control, theirs) = UnixStream::pair().with_context(context)?;
        control.set_nonblocking(true).with_context(context)?;
        // A signal from the terminal ends the bridge, which then ends the program.
        let mut supervisor = Command::new("/proc/self/exe")
            .args(["supervise", "--"])
            .args(words)
            .stdin(OwnedFd::from(theirs))
            .process_group(0)
            .spawn()
            .with_context(context)?;
        let pid = i32::try_from(supervisor.id()).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH);
        match pid.and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty())) {
            Ok(supervisor_end) => Ok(Self { name, supervisor, supervisor_end, control }),
            Err(error) => {
                // The process was started a moment ago, so this does not fail.
                let _ = supervisor.kill().and_then(|()| supervisor.wait());
                Err(io::Error::from(error)).with_context(|| format!("cannot watch {name}"))
            }
        }
    }

    /// Returns a descriptor that is readable once the program has ended.
    pub(super) fn exit_event(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    /// Returns how the program ended; `None` while it runs.
    ///
    /// # Errors
    /// When the program could not be started, or its supervisor was killed.
    pub(super) fn exit(&mut self) -> anyhow::Result<Option<Exit>> {
        let mut line = [0; 4096];
        // The supervisor writes its report in one call.
        let length = match self.control.read(&mut line) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            result => result.with_context(|| format!("cannot watch {}", self.name))?,
        };
        match Report::parse(&String::from_utf8_lossy(&line[..length])) {
            Some(Report::Ended(status)) => Ok(Some(Exit::Status(status))),
            Some(Report::Background) => Ok(Some(Exit::Background)),
            Some(Report::NotStarted(reason)) => bail!("cannot start {}: {reason}", self.name),
            None => bail!("the supervisor of {} was killed", self.name),
        }
    }

    /// Ends the program and what it started: SIGTERM, and SIGKILL for what is left after a while.
    ///
    /// # Errors
    /// When the supervisor cannot be waited for.
    pub(super) fn end(&mut self) -> anyhow::Result<()> {
        let context = || format!("cannot end {}", self.name);
        // Fails only if the supervisor has ended.
        let _ = self.control.shutdown(Shutdown::Write);
        let deadline = Instant::now() + 3 * END_TIME;
        let ended = wait_readable(&[self.supervisor_end.as_fd()], Some(deadline)).with_context(context)?;
        if ended.is_none() {
            self.supervisor.kill().with_context(context)?;
        }
        self.supervisor.wait().map(drop).with_context(context)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            log::error!("{error:#}");
        }
    }
}
