//! A back-end program as a child process that does not outlive us.
#![expect(unsafe_code, reason = "what a child does before it becomes the program is outside of Rust's rules")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use vvu::event::wait_readable;

/// How long a program may take to end when asked to.
const END_TIME: Duration = Duration::from_secs(5);

/// A running program and what it started in turn: a process group of its own. Dropping it ends them.
pub(super) struct Program {
    name: String,
    child: Child,
    group: Pid,
    exit: OwnedFd,
}

impl Program {
    /// Starts `words`. If this process dies, the program is killed.
    ///
    /// # Errors
    /// The program cannot be started.
    pub(super) fn start(words: &[String]) -> anyhow::Result<Self> {
        let (name, rest) = words.split_first().context("name a command")?;
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
        let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let exit =
            group.ok_or(Errno::SRCH).and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()));
        match (group, exit) {
            (Some(group), Ok(exit)) => Ok(Self { name: name.clone(), child, group, exit }),
            (_, error) => {
                // It has just been started, so it is there to be killed.
                let _ = child.kill().and_then(|()| child.wait());
                let error = error.err().unwrap_or(Errno::SRCH);
                Err(io::Error::from(error)).with_context(|| format!("cannot watch {name}"))
            }
        }
    }

    /// Returns a descriptor that is readable once the program has ended.
    pub(super) fn exit_event(&self) -> BorrowedFd<'_> {
        self.exit.as_fd()
    }

    /// How it ended; `None` while it runs.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub(super) fn exit(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot look at {}", self.name))
    }

    /// Ends it, and what it started: SIGTERM, and SIGKILL for what is left after a while.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub(super) fn end(&mut self) -> anyhow::Result<()> {
        let context = || format!("cannot end {}", self.name);
        if self.child.try_wait().with_context(context)?.is_none() {
            // Fails only if it has just ended.
            let _ = rustix::process::kill_process_group(self.group, Signal::TERM);
            wait(&self.exit, END_TIME).with_context(context)?;
        }
        // The group's name stays its own for as long as one of its processes is there.
        let _ = rustix::process::kill_process_group(self.group, Signal::KILL);
        self.child.wait().map(drop).with_context(context)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            log::error!("{error:#}");
        }
    }
}

/// Whether `fd` is readable within `time`.
fn wait(fd: &OwnedFd, time: Duration) -> io::Result<bool> {
    Ok(wait_readable(&[fd.as_fd()], Some(Instant::now() + time))?.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(script: &str) -> Program {
        Program::start(&["sh".to_owned(), "-c".to_owned(), script.to_owned()]).expect("started")
    }

    #[test]
    fn its_end_is_seen_and_told() {
        let mut program = program("exit 3");
        assert!(wait(&program.exit, END_TIME).expect("waited"));
        assert_eq!(program.exit().expect("looked").and_then(|exit| exit.code()), Some(3));
    }

    #[test]
    fn what_it_started_ends_with_it() {
        let (mut output, input) = io::pipe().expect("pipe");
        let keep = input.as_fd().try_clone_to_owned().expect("duplicate");
        rustix::io::fcntl_setfd(&keep, rustix::io::FdFlags::empty()).expect("inherited");
        // Both ignore SIGTERM, and one outlives its parent.
        let mut program = program("trap '' TERM; sleep 1000 & exit 0");
        assert!(wait(&program.exit, END_TIME).expect("waited"));
        drop((keep, input));
        program.end().expect("ended");
        let mut text = String::new();
        // Ends only when nobody holds the other end any longer.
        io::Read::read_to_string(&mut output, &mut text).expect("read");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = Program::start(&["/nonexistent".to_owned()]).err().expect("refused");
        assert!(format!("{error:#}").contains("/nonexistent"), "{error:#}");
    }
}
