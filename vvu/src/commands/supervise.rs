//! `vvu supervise`: runs a back-end program for the bridge, and ends the program and everything that it started.
//!
//! A program that changes its user loses the signal that would kill it when the bridge dies (`PR_SET_PDEATHSIG`), and
//! one that goes to the background leaves its process group. The supervisor does neither, and the kernel makes it the
//! parent of every process that the program leaves behind (`PR_SET_CHILD_SUBREAPER`).
//!
//! Standard input is one end of a socket pair with the bridge. The supervisor writes one [`Report`] to it when the
//! program ends. When the other end closes, since the bridge is done or dead, the supervisor ends the program.
#![expect(
    unsafe_code,
    reason = "a child that must die with its parent says so before it becomes the program"
)]

use std::collections::HashSet;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use vvu::event::wait_readable;

/// Time that the program gets to end after SIGTERM, and the kernel after SIGKILL.
pub(crate) const END_TIME: Duration = Duration::from_secs(5);

/// Options of `vvu supervise`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Program to run
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// What the supervisor tells the bridge.
#[derive(Debug)]
pub(crate) enum Report {
    /// The program ended.
    Ended(ExitStatus),
    /// The program ended well, and left a process in a session of its own.
    Background,
    /// The program cannot be started, for this reason.
    NotStarted(String),
}

impl Report {
    fn to_line(&self) -> String {
        match self {
            Self::Ended(status) => format!("ended {}\n", status.into_raw()),
            Self::Background => "background\n".to_owned(),
            Self::NotStarted(reason) => format!("not-started {}\n", reason.replace('\n', " ")),
        }
    }

    /// Reads a report; `None` for anything else.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        match line.trim_end().split_once(' ') {
            Some(("ended", status)) => Some(Self::Ended(ExitStatus::from_raw(status.parse().ok()?))),
            Some(("not-started", reason)) => Some(Self::NotStarted(reason.to_owned())),
            None if line.trim_end() == "background" => Some(Self::Background),
            _ => None,
        }
    }
}

/// Runs the program until it ends or the bridge does.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .context("cannot become the parent of orphans")?;
    let own = own_id().context("cannot read /proc/self: is /proc mounted?")?;
    let bridge = UnixStream::from(io::stdin().as_fd().try_clone_to_owned().context("cannot share stdin")?);
    let (program, ended) = match start(&args.command) {
        Ok(started) => started,
        Err(error) => return tell(&bridge, &Report::NotStarted(error.to_string())),
    };
    let mut children = Children { own, program, status: None };
    // Closed, or ended: in both cases what is left is to be ended.
    let first =
        wait_readable(&[bridge.as_fd(), ended.as_fd()], None).context("cannot wait for the program")?;
    if first == Some(1) {
        children.reap();
        if let Some(status) = children.status {
            let background = status.success() && children.has_left_the_session();
            tell(&bridge, &if background { Report::Background } else { Report::Ended(status) })?;
        }
    }
    children.end();
    Ok(())
}

/// The id of this process in `/proc`, which may count as another PID namespace does.
fn own_id() -> Option<i32> {
    fs::read_link("/proc/self").ok()?.to_str()?.parse().ok()
}

/// Writes a report. A bridge that is gone needs none.
fn tell(mut bridge: &UnixStream, report: &Report) -> anyhow::Result<()> {
    match bridge.write_all(report.to_line().as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context("cannot report"),
        _ => Ok(()),
    }
}

/// Starts the program in a process group of its own, with a descriptor that is readable once it has ended.
fn start(words: &[String]) -> io::Result<(Pid, OwnedFd)> {
    let (name, rest) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(name);
    command.args(rest).stdin(Stdio::null()).process_group(0);
    let parent = rustix::process::getpid();
    let dies_with_parent = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died just before.
        if rustix::process::getppid() == Some(parent) { Ok(()) } else { Err(Errno::SRCH.into()) }
    };
    // SAFETY: between fork and exec it makes two system calls and allocates nothing.
    unsafe { command.pre_exec(dies_with_parent) };
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
    Ok((pid, rustix::process::pidfd_open(pid, PidfdFlags::empty())?))
}

/// The program, and the processes that it left behind.
struct Children {
    /// Id of this process in `/proc`.
    own: i32,
    program: Pid,
    /// How the program ended.
    status: Option<ExitStatus>,
}

impl Children {
    /// Takes note of the children that have ended; true if some are left.
    fn reap(&mut self) -> bool {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.program => {
                    self.status = Some(ExitStatus::from_raw(status.as_raw()));
                }
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }

    /// Whether a child is in another session, as a program is that has gone to the background.
    fn has_left_the_session(&self) -> bool {
        let Some(own) = Lineage::of(self.own) else { return false };
        let mut children = self.list().into_iter().filter_map(|child| Lineage::of(child.id));
        children.any(|child| child.session != own.session)
    }

    /// Ends all of them: SIGTERM, and SIGKILL for those that are left after a while.
    fn end(&mut self) {
        let deadline = Instant::now() + END_TIME;
        // Fails if the group is gone.
        let _ = rustix::process::kill_process_group(self.program, Signal::TERM);
        let mut asked = HashSet::new();
        while self.reap() && Instant::now() < deadline {
            let children = self.list();
            children.iter().filter(|child| asked.insert(child.id)).for_each(|child| child.kill(Signal::TERM));
            wait_for_any(&children, deadline);
        }
        let deadline = Instant::now() + END_TIME;
        while self.reap() && Instant::now() < deadline {
            let children = self.list();
            children.iter().for_each(|child| child.kill(Signal::KILL));
            wait_for_any(&children, deadline);
        }
    }

    /// The processes whose parent this one is.
    fn list(&self) -> Vec<ChildProcess> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let is_child = |id: &i32| Lineage::of(*id).is_some_and(|child| child.parent == self.own);
        // The directory is opened first, so that it is the child's, and not that of a later process with its id.
        let open = |id| Some(ChildProcess { id, directory: fs::File::open(format!("/proc/{id}")).ok()? });
        ids.filter_map(open).filter(|child| is_child(&child.id)).collect()
    }
}

/// A child, by its directory in `/proc`: its id there may be that of another process here.
struct ChildProcess {
    id: i32,
    directory: fs::File,
}

impl ChildProcess {
    fn kill(&self, signal: Signal) {
        // Fails only if the process has just ended.
        let _ = rustix::process::pidfd_send_signal(&self.directory, signal);
    }

    /// A descriptor that is readable once the process has ended; `None` if the process is gone or `/proc` counts
    /// differently.
    fn end(&self) -> Option<OwnedFd> {
        let same = own_id() == Some(rustix::process::getpid().as_raw_pid());
        let pid = Pid::from_raw(self.id).filter(|_| same)?;
        rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()
    }
}

/// A process's parent and session, 0 where their process is outside the supervisor's PID namespace.
///
/// A `Pid` cannot be 0, so that `getsid` of rustix fails in such a namespace: a container without an init of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lineage {
    parent: i32,
    session: i32,
}

impl Lineage {
    /// `None` if the process is gone.
    fn of(id: i32) -> Option<Self> {
        Self::parse(&fs::read(format!("/proc/{id}/stat")).ok()?)
    }

    /// Reads the fields after the name: the state, the parent, the process group and the session (proc_pid_stat(5)).
    fn parse(stat: &[u8]) -> Option<Self> {
        // The name may hold any bytes, also parentheses.
        let stat = String::from_utf8_lossy(stat);
        let (_, after_name) = stat.rsplit_once(')')?;
        let mut fields = after_name.split_whitespace().skip(1).map(str::parse);
        let (parent, _group, session) = (fields.next()?.ok()?, fields.next()?, fields.next()?.ok()?);
        Some(Self { parent, session })
    }
}

/// Waits until one of the processes has ended, which may have left others behind.
fn wait_for_any(children: &[ChildProcess], deadline: Instant) {
    let ends: Vec<OwnedFd> = children.iter().filter_map(ChildProcess::end).collect();
    let ends: Vec<_> = ends.iter().map(AsFd::as_fd).collect();
    // A child that is not in /proc yet, or not any more, is there or gone a moment later.
    let moment = Instant::now() + Duration::from_millis(10);
    let until = if ends.len() == children.len() && !ends.is_empty() { deadline } else { moment };
    // A failure makes the caller look again, until its deadline.
    let _ = wait_readable(&ends, Some(until));
}

#[cfg(test)]
mod tests {
    use super::Lineage;

    #[test]
    fn a_session_outside_the_pid_namespace_is_zero() {
        let stat = b"41 (a) b (c) S 0 41 0 0 -1 4194560 101";
        assert_eq!(Lineage::parse(stat), Some(Lineage { parent: 0, session: 0 }));
        assert_eq!(Lineage::parse(b"41 (a) S 7"), None);
    }
}
