//! Child processes that never outlive the process that started them.
//!
//! Every child leads a process group of its own, and the kernel kills it when this process dies. A process-wide list
//! holds the groups that are alive, since a signal concerns the whole process: `kill_all`, which only the signal
//! handler of [`crate::interrupt`] calls, ends all of them. A program that never calls
//! [`interrupt::listen`](crate::interrupt::listen) keeps the default effect of signals and never sees the list closed.

#![expect(unsafe_code, reason = "Command::pre_exec is the one way to ask for a death signal before exec")]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, getpid, getppid, kill_process, kill_process_group,
    pidfd_open, set_parent_process_death_signal, waitid,
};

/// The process groups that are alive.
struct Registry {
    groups: BTreeSet<i32>,
    /// [`kill_all`] ran: nothing more is started.
    closed: bool,
}

static REGISTRY: Mutex<Registry> = Mutex::new(Registry { groups: BTreeSet::new(), closed: false });

fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills every process group that [`spawn`] started and makes further calls of [`spawn`] fail.
///
/// The owners of the children see them end by SIGKILL.
pub(crate) fn kill_all() {
    let mut registry = registry();
    registry.closed = true;
    for group in &registry.groups {
        kill_group(*group);
    }
}

/// Returns true once [`kill_all`] ran.
pub(crate) fn all_killed() -> bool {
    registry().closed
}

fn kill_group(group: i32) {
    if let Some(pid) = Pid::from_raw(group) {
        // The only possible failure is that the group is gone already.
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

/// Starts `command` as the leader of a new process group.
///
/// # Errors
///
/// Fails as `Command::spawn` does, and with `ErrorKind::Interrupted` after a signal ended all children.
pub fn spawn(command: Command) -> io::Result<Running> {
    let (reply, answer) = mpsc::channel();
    spawner().send((command, reply)).map_err(|_| io::Error::other("the spawner thread ended"))?;
    answer.recv().map_err(|_| io::Error::other("the spawner thread ended"))?
}

/// Starts `command` in our own process group, so that it may read the terminal.
///
/// Call it on the main thread: the kernel sends the death signal when the forking thread ends. A signal handler does
/// not kill this child; the child gets the signals that the terminal sends to its foreground group.
///
/// # Errors
///
/// Fails as `Command::spawn` does.
pub fn spawn_on_terminal(mut command: Command) -> io::Result<Child> {
    die_with_parent(&mut command);
    command.spawn()
}

/// Has the kernel kill the child when the thread that forks it ends.
fn die_with_parent(command: &mut Command) {
    let parent = getpid();
    // SAFETY: the closure runs between fork and exec; it makes two system calls and touches neither the heap nor locks.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            if getppid() != Some(parent) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            Ok(())
        });
    }
}

type Request = (Command, mpsc::Sender<io::Result<Running>>);

/// The thread that forks.
///
/// The kernel sends the death signal when the forking *thread* ends, so children must not be tied to a worker
/// thread of their caller; this one lives as long as the process.
fn spawner() -> mpsc::Sender<Request> {
    static SPAWNER: OnceLock<mpsc::Sender<Request>> = OnceLock::new();
    SPAWNER
        .get_or_init(|| {
            let (requests, inbox) = mpsc::channel::<Request>();
            std::thread::spawn(move || {
                for (command, reply) in inbox {
                    // A caller that gave up drops the child with the answer, which kills it.
                    let _ = reply.send(spawn_here(command));
                }
            });
            requests
        })
        .clone()
}

fn spawn_here(mut command: Command) -> io::Result<Running> {
    command.process_group(0);
    die_with_parent(&mut command);
    // Held across the fork, so that kill_all sees either no child or a listed one.
    let mut registry = registry();
    if registry.closed {
        return Err(io::ErrorKind::Interrupted.into());
    }
    let child = command.spawn()?;
    let pid = Pid::from_child(&child);
    registry.groups.insert(pid.as_raw_nonzero().get());
    drop(registry);
    let mut running = Running { child, pid, status: None, pidfd: None };
    running.pidfd = Some(pidfd_open(pid, PidfdFlags::empty())?);
    Ok(running)
}

/// A child process and its group. Dropping it kills the group and reaps the child.
#[derive(Debug)]
pub struct Running {
    child: Child,
    pid: Pid,
    status: Option<ExitStatus>,
    pidfd: Option<OwnedFd>,
}

impl Running {
    /// The child's process id, which is also the id of its group.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the child has ended, then kills what is left of its group.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        loop {
            // Without reaping: while the zombie exists its group id cannot be given to anyone else.
            match waitid(WaitId::Pid(self.pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => break,
            }
        }
        let group = self.pid.as_raw_nonzero().get();
        let mut registry = registry();
        kill_group(group);
        registry.groups.remove(&group);
        drop(registry);
        let status = self.child.wait()?;
        self.status = Some(status);
        Ok(status)
    }

    /// Like [`Running::wait`], but gives up after `limit` and returns `None` with the child still running.
    pub fn wait_timeout(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        while self.status.is_none() {
            let Some(pidfd) = &self.pidfd else { break };
            let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))
                .map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&left)) {
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(0) => return Ok(None),
                Ok(_) => break,
            }
        }
        self.wait().map(Some)
    }

    /// Asks the child, but not the rest of its group, to end (SIGTERM).
    pub fn terminate(&self) -> io::Result<()> {
        if self.status.is_none() {
            kill_process(self.pid, Signal::TERM)?;
        }
        Ok(())
    }

    /// Kills the whole group and reaps the child.
    pub fn kill(&mut self) -> io::Result<ExitStatus> {
        if self.status.is_none() {
            kill_group(self.pid.as_raw_nonzero().get());
        }
        self.wait()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // An error has no receiver here. The death signal ends the child at the latest with this process.
        let _ = self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    fn exists(pid: i32) -> bool {
        // A zombie that init has not reaped yet is dead for our purpose.
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| stat.rsplit(')').next().is_some_and(|rest| !rest.trim_start().starts_with('Z')))
    }

    #[test]
    fn dropping_a_child_ends_its_grandchildren() {
        let (output, input) = std::io::pipe().expect("a pipe");
        let mut command = shell("sleep 1000 & echo $!; wait");
        command.stdout(input);
        let running = spawn(command).expect("sh starts");
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line).expect("a pid");
        let grandchild: i32 = line.trim().parse().expect("a number");
        assert!(exists(grandchild));
        drop(running);
        let deadline = Instant::now() + Duration::from_secs(10);
        while exists(grandchild) {
            assert!(Instant::now() < deadline, "grandchild {grandchild} survived");
            std::thread::yield_now();
        }
    }

    #[test]
    fn exit_status_survives_and_the_group_is_forgotten() {
        let mut running = spawn(shell("exit 7")).expect("sh starts");
        let group = i32::try_from(running.id()).expect("a pid");
        assert_eq!(running.wait().expect("ends").code(), Some(7));
        assert_eq!(running.wait().expect("ended").code(), Some(7));
        assert!(!registry().groups.contains(&group));
    }

    #[test]
    fn a_child_lives_on_when_the_thread_that_asked_for_it_ends() {
        let mut running =
            std::thread::spawn(|| spawn(shell("read x"))).join().expect("no panic").expect("sh starts");
        // stdin is /dev/null, so the shell ends by itself rather than by the death signal.
        assert_eq!(running.wait().expect("ends").code(), Some(1));
    }

    #[test]
    fn wait_timeout_leaves_the_child_running() {
        let mut running = spawn(shell("sleep 1000")).expect("sh starts");
        assert_eq!(running.wait_timeout(Duration::from_millis(1)).expect("polls"), None);
        assert!(!running.kill().expect("killed").success());
    }
}
