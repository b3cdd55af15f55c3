//! `vvu proxy --supervised`: the supervisor, which keeps what the device needs and starts workers.
//!
//! Supervisor and worker share one table of file descriptors (`CLONE_FILES`), so a worker that dies leaves open what
//! its peers gave it. The supervisor reads nothing from a peer. While a worker runs, it waits for signals and for the
//! worker's end, and uses no descriptor. It must have one thread, since a worker begins as its copy.
#![expect(
    unsafe_code,
    reason = "no crate makes a process that shares its descriptors, waits for signals without a thread or a descriptor, \
              or passes all descriptors on to another program"
)]

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use libc::{SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR2, c_int};
use rustix::event::{PollFd, PollFlags};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, WaitOptions, getpid, getppid, kill_process, waitpid};
use vvu::PROXY_READY;
use vvu::device::{DeviceConfig, Trace, VvuDevice};
use vvu::durable::Adopted;
use vvu::event::{wait_any, wait_readable};
use vvu::vfio_user::server::Server;

use super::{Args, Sandbox};
use crate::{logger, sandbox, service, stop};
use equipment::Equipment;

mod equipment;

/// Crashes in a row after which there is no other worker: the next one would come upon the same cause.
const CRASHES_MAX: u32 = 3;
/// A worker that lived for longer than this did not come upon the cause of the last crash at once.
const CRASH_WINDOW: Duration = Duration::from_secs(1);
/// How long another program may take to tell its version.
const CHECK_LIMIT: Duration = Duration::from_secs(2);
/// Name of the worker's process.
const WORKER_NAME: &str = "vvu-worker";

/// Runs workers, one after the other, until one ends in order.
pub(super) fn run(args: Args, verbosity: u8) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let signals = Signals::block().context("cannot block signals")?;
    let equipment = Equipment::obtain(&args)?;
    service::ready();
    let mut crashes = 0;
    loop {
        let start = Instant::now();
        let supervisor = getpid();
        let Some(worker) = fork().context("cannot start a worker")? else {
            let result = work(&args, verbosity, &equipment, &signals, supervisor);
            logger::finish(result.as_ref().err().map(crate::describe).as_deref());
            // Without the destructors: the descriptors are the supervisor's as well.
            std::process::exit(i32::from(result.is_err()));
        };
        let end = supervise(worker, &signals)?;
        match (end.status.code(), end.status.signal(), end.reason) {
            // It was killed just before it was to end.
            (_, Some(libc::SIGKILL), Reason::Stop) | (Some(0), ..) => return Ok(()),
            (Some(1), _, _) => bail!("the worker cannot go on"),
            (.., Reason::Stop) => bail!("the worker did not end in order: {}", end.status),
            (.., Reason::Upgrade) => {
                let error = check_program(&program).map_or_else(|error| error, |()| equipment.exec(&program));
                say(&format!(
                    "error: cannot run {}: {error:#}; going on with the old program",
                    program.display()
                ));
            }
            (_, Some(libc::SIGKILL), Reason::Unknown) => {
                say("warning: the worker was killed; another one takes over");
            }
            (.., Reason::Unknown) => {
                crashes = if start.elapsed() > CRASH_WINDOW { 1 } else { crashes + 1 };
                if crashes == CRASHES_MAX {
                    bail!("the worker crashed {CRASHES_MAX} times in a row: {}", end.status);
                }
                say(&format!("error: the worker crashed ({}); another one takes over", end.status));
            }
        }
    }
}

/// The end of a worker.
struct End {
    status: ExitStatus,
    reason: Reason,
}

/// Why a worker ended, as far as the supervisor had to do with it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reason {
    Unknown,
    Stop,
    Upgrade,
}

/// Waits for the end of a worker, and passes requests to end on to it.
fn supervise(worker: Pid, signals: &Signals) -> anyhow::Result<End> {
    let mut reason = Reason::Unknown;
    loop {
        match signals.wait().context("cannot wait for signals")? {
            SIGCHLD => {
                let ended =
                    waitpid(Some(worker), WaitOptions::NOHANG).context("cannot wait for the worker")?;
                if let Some((_, status)) = ended {
                    return Ok(End { status: ExitStatus::from_raw(status.as_raw()), reason });
                }
            }
            SIGUSR2 => {
                reason = Reason::Upgrade;
                send(worker, Signal::KILL);
            }
            _ => {
                reason = Reason::Stop;
                send(worker, Signal::TERM);
            }
        }
    }
}

fn send(worker: Pid, signal: Signal) {
    // It is a child that was not waited for, so the number is its own.
    let _ = kill_process(worker, signal);
}

/// Checks that `program` takes over what this program saves. No worker runs meanwhile, which could interfere.
fn check_program(program: &Path) -> anyhow::Result<()> {
    let mut child = Command::new(program).arg("state-format").stdout(Stdio::piped()).spawn()?;
    let mut text = [0; 32];
    let mut length = 0;
    if let Some(stdout) = &mut child.stdout
        && wait_readable(&[stdout.as_fd()], Some(Instant::now() + CHECK_LIMIT))?.is_some()
    {
        length = stdout.read(&mut text)?;
    }
    child.kill()?;
    child.wait()?;
    let own = vvu::durable::FORMAT.to_string();
    let format = String::from_utf8_lossy(&text[..length]);
    if format.trim() != own {
        bail!("it takes over state of version {:?}: want {own}; restart both VMs to use it", format.trim());
    }
    Ok(())
}

/// Writes a line to standard error, unless nobody reads there.
fn say(text: &str) {
    let stderr = io::stderr();
    let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
    if wait_any(&mut fds, Some(Instant::now())).is_ok_and(|ready| ready > 0) {
        let _ = writeln!(io::stderr(), "vvu: {text}");
    }
}

/// Starts a process that is a copy of this one and shares its descriptors. Returns its id, and `None` in the copy.
///
/// The C library does not know of it, and takes the copy's first thread for that of the supervisor: the copy must not
/// signal that thread. abort(3) fails to, and ends the process in another way.
fn fork() -> io::Result<Option<Pid>> {
    let threads = fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!("the supervisor has {threads} threads: want 1")));
    }
    let flags = libc::CLONE_FILES | SIGCHLD;
    // SAFETY: the process has one thread, so the copy has all of its state in order. Without a stack of its own the copy
    // goes on here, on a copy of this stack.
    match unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        id => Ok(i32::try_from(id).ok().and_then(Pid::from_raw)),
    }
}

/// The signals that the supervisor waits for.
struct Signals(libc::sigset_t);

impl Signals {
    const ALL: [c_int; 5] = [SIGCHLD, SIGINT, SIGTERM, SIGHUP, SIGUSR2];

    /// Blocks them, so that they wait to be waited for.
    fn block() -> io::Result<Self> {
        // SAFETY: sigemptyset makes the set valid; sigaddset and sigprocmask get a valid set.
        let (set, result) = unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in Self::ALL {
                libc::sigaddset(&raw mut set, signal);
            }
            (set, libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()))
        };
        if result == 0 { Ok(Self(set)) } else { Err(io::Error::last_os_error()) }
    }

    /// Lets them take effect at once, in a worker.
    fn unblock(&self) -> io::Result<()> {
        // SAFETY: the set is valid.
        let result = unsafe { libc::sigprocmask(libc::SIG_UNBLOCK, &raw const self.0, std::ptr::null_mut()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Waits for the next of them.
    fn wait(&self) -> io::Result<c_int> {
        loop {
            // SAFETY: the set is valid, and nothing is to be known but the number.
            let signal = unsafe { libc::sigwaitinfo(&raw const self.0, std::ptr::null_mut()) };
            if signal > 0 {
                return Ok(signal);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// The numbers of the descriptors that are open.
fn open_descriptors() -> io::Result<Vec<RawFd>> {
    let number = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    let listed: Vec<RawFd> = fs::read_dir("/proc/self/fd")?.filter_map(number).collect();
    // The directory itself is among them, and closed by now.
    Ok(listed.into_iter().filter(|fd| fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok()).collect())
}

/// Sets whether another program gets the descriptors that are open, but for the standard ones.
fn set_close_on_exec(close: bool) -> io::Result<()> {
    let flags = if close { FdFlags::CLOEXEC } else { FdFlags::empty() };
    for number in open_descriptors()?.into_iter().filter(|number| *number > libc::STDERR_FILENO) {
        // SAFETY: it was open a moment ago, and no other thread or process with this table runs.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        fcntl_setfd(fd, flags)?;
    }
    Ok(())
}

/// A worker's life.
fn work(
    args: &Args,
    verbosity: u8,
    equipment: &Equipment,
    signals: &Signals,
    supervisor: Pid,
) -> anyhow::Result<()> {
    // First, while only the predecessor's descriptors are open beside those of the supervisor.
    let mut left = open_descriptors().context("cannot list the open descriptors")?;
    left.retain(|number| !equipment.descriptors.contains(number));
    // SAFETY: they are open, and only dead workers knew of them.
    let left = unsafe { Adopted::new(left) };
    die_with(supervisor).context("cannot ask to be killed with the supervisor")?;
    fs::write("/proc/self/comm", WORKER_NAME).context("cannot name the worker")?;
    logger::init(verbosity).context("cannot start to log")?;
    let stop = stop::on_signal().context("cannot catch signals")?;
    signals.unblock().context("cannot unblock signals")?;

    let is_first = equipment.store.commits() == 0;
    let Equipment { memory, vhost_user, vfio_user, express, store, uuid, trace, .. } = equipment;
    // Duplicates, since the supervisor goes on using its own.
    let config = DeviceConfig {
        memory: memory.try_clone()?,
        listener: vhost_user.listener().try_clone()?,
        queues: args.queues,
        uuid: uuid.into_bytes(),
    };
    let mut device = VvuDevice::new(config).context("cannot make the vvu device")?;
    device.keep_state(store);
    if let Some(socket) = express {
        device.serve_express(socket.listener().try_clone()?).context("cannot serve the express device")?;
    }
    if let Some((file, start)) = trace {
        let trace =
            Trace::since(*start, file.try_clone()?).context("cannot start the thread of the trace")?;
        device.set_trace(trace);
    }
    let server = Server::new(vfio_user.listener().try_clone()?, stop, &device)?;
    let server = server.with_store(store.try_clone()?, left);
    match args.sandbox {
        Sandbox::On => sandbox::enter().context("cannot enter the sandbox")?,
        Sandbox::Off => log::warn!("the proxy runs without its sandbox"),
    }
    if is_first {
        // A predecessor may have written it, and whoever waited for it may have gone.
        let _ = writeln!(io::stdout(), "{PROXY_READY}");
    }
    Ok(server.serve(&mut device)?)
}

/// Asks the kernel to kill this process when its parent dies.
fn die_with(parent: Pid) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have died just before.
    if getppid() == Some(parent) { Ok(()) } else { Err(Errno::SRCH.into()) }
}
