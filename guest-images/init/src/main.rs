//! PID 1 of the guests: mounts what a guest needs, then runs what the host asks for.
//!
//! One thread and one `poll`: requests, output and ends of processes are handled as they come, and nothing waits
//! for anything else.

mod boot;
mod control;
mod jobs;

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, WaitOptions};
use signal_hook::consts::{SIGCHLD, SIGTERM, SIGUSR1, SIGUSR2};

use boot::{Ending, Options};
use control::Control;
use jobs::Jobs;
use vvu_init::protocol::{
    Action, Answer, Empty, Event, Identity, Message, Outcome, READY_LINE, RUN_ECHO, Request, SPAWN_ECHO,
};

/// Time for sending the last messages before the machine goes away.
const LAST_WORDS: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    println!("{READY_LINE}");
    if rustix::process::getpid() != Pid::INIT {
        eprintln!("vvu-init: this is PID 1 of a guest and nothing to run by hand");
        return ExitCode::FAILURE;
    }
    let ending = Guest::start().and_then(Guest::serve).unwrap_or_else(|error| {
        println!("vvu-init: failed: {error:#}");
        Ending::PowerOff
    });
    boot::within(LAST_WORDS, || rustix::termios::tcdrain(io::stdout()));
    let error = boot::end(ending);
    // PID 1 must not end, or the kernel panics; with `panic=-1` and `-no-reboot` that ends the guest as well.
    println!("vvu-init: failed: {error:#}");
    ExitCode::FAILURE
}

/// The running guest.
struct Guest {
    jobs: Jobs,
    /// Absent if the kernel command line names no control port.
    control: Option<Control>,
    shell: Option<Shell>,
    /// A byte for each SIGCHLD.
    child_ended: UnixStream,
    /// A byte for each signal by which `poweroff` and `halt` ask PID 1.
    asked_to_end: UnixStream,
    /// A byte for each signal by which `reboot` asks PID 1.
    asked_to_reboot: UnixStream,
}

impl Guest {
    fn start() -> Result<Self> {
        let child_ended = signal_stream(&[SIGCHLD])?;
        let asked_to_end = signal_stream(&[SIGUSR1, SIGUSR2])?;
        let asked_to_reboot = signal_stream(&[SIGTERM])?;
        let Options { shell, hostname: _, control } = boot::set_up()?;
        let control = match control {
            Some(name) => {
                let port = Path::new("/dev").join(name);
                let control = Control::open(&port);
                Some(control.with_context(|| format!("cannot open the control port {}", port.display()))?)
            }
            None if shell => None,
            None => bail!("nothing to do: want `vvu.control=PORT` or `vvu.shell` on the kernel command line"),
        };
        let shell = if shell { Some(Shell::start()?) } else { None };
        let mut guest =
            Self { jobs: Jobs::default(), control, shell, child_ended, asked_to_end, asked_to_reboot };
        guest.send(&Message::Event(Event::Ready(identity())));
        Ok(guest)
    }

    /// Handles what comes until the guest is to end.
    fn serve(mut self) -> Result<Ending> {
        loop {
            self.wait()?;
            if drained(&self.asked_to_end) {
                println!("vvu-init: asked to power off by a signal");
                return Ok(Ending::PowerOff);
            }
            if drained(&self.asked_to_reboot) {
                println!("vvu-init: asked to reboot by a signal");
                return Ok(Ending::Reboot);
            }
            if self.has_room() {
                let lines = self.jobs.read();
                self.send_all(lines);
            }
            if drained(&self.child_ended) {
                self.reap()?;
            }
            let expired = self.jobs.expire(Instant::now());
            self.send_all(expired);
            let Some(control) = &mut self.control else { continue };
            let requests = control.receive().context("cannot read requests")?;
            for request in requests {
                match request {
                    Ok(Request { id, action }) => {
                        self.handle(id, &action);
                        let ending = match action {
                            Action::PowerOff(Empty {}) => Ending::PowerOff,
                            Action::Reboot(Empty {}) => Ending::Reboot,
                            _ => continue,
                        };
                        let control = self.control.take();
                        boot::within(LAST_WORDS, move || control.map(Control::finish));
                        return Ok(ending);
                    }
                    Err(refusal) => {
                        println!("vvu-init: bad request: {refusal:?}");
                        self.send(&refusal);
                    }
                }
            }
            if let Some(control) = &mut self.control {
                control.flush().context("cannot answer the host")?;
            }
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&self) -> Result<()> {
        let timeout = self.jobs.deadline().map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() }
        });
        let input = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let signals: [BorrowedFd<'_>; 3] =
            [self.child_ended.as_fd(), self.asked_to_end.as_fd(), self.asked_to_reboot.as_fd()];
        let output = self.jobs.fds().filter(|_| self.has_room());
        let mut fds: Vec<_> = signals.into_iter().chain(output).map(input).collect();
        if let Some(control) = &self.control {
            let (port, flags) = control.interest();
            fds.push(PollFd::from_borrowed_fd(port, flags));
        }
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error).context("cannot poll"),
        }
    }

    fn handle(&mut self, id: u64, action: &Action) {
        let mut console = io::stdout();
        let outcome = match action {
            Action::Run(run) => {
                // The console alone shows what happened. A failure of it cannot be reported anywhere.
                let _ = writeln!(console, "{RUN_ECHO}{id}: {}", brief(&run.command));
                match self.jobs.run(id, run) {
                    Ok(()) => return,
                    Err(error) => Outcome::Error(error),
                }
            }
            Action::Spawn(spawn) => {
                let _ = writeln!(console, "{SPAWN_ECHO}{}: {}", spawn.name, brief(&spawn.command));
                match self.jobs.spawn(spawn) {
                    Ok(pid) => Outcome::Spawned { pid: pid.as_raw_nonzero().get() },
                    Err(error) => Outcome::Error(error),
                }
            }
            Action::Kill(kill) => match self.jobs.kill(kill) {
                Ok(()) => Outcome::Killed(Empty {}),
                Err(error) => Outcome::Error(error),
            },
            Action::Hello(Empty {}) => Outcome::Hello(identity()),
            Action::PowerOff(Empty {}) => Outcome::PoweringOff(Empty {}),
            Action::Reboot(Empty {}) => Outcome::Rebooting(Empty {}),
        };
        self.answer(id, outcome);
    }

    /// Collects every process that has ended: ours, and the orphans that PID 1 inherits.
    fn reap(&mut self) -> Result<()> {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let messages = self.jobs.ended(pid, status);
            if let Some(Message::Event(Event::Exited { name, end })) = messages.last() {
                println!("vvu-init: {name} ended by {end}");
            }
            self.send_all(messages);
            if let Some(shell) = self.shell.take_if(|shell| shell.pid == pid) {
                self.shell = Some(shell.again()?);
            }
        }
        Ok(())
    }

    fn answer(&mut self, id: u64, outcome: Outcome) {
        self.send(&Message::Answer(Answer { id, outcome }));
    }

    /// Whether the host keeps up with what the processes print.
    fn has_room(&self) -> bool {
        self.control.as_ref().is_none_or(Control::has_room)
    }

    fn send_all(&mut self, messages: Vec<Message>) {
        messages.iter().for_each(|message| self.send(message));
    }

    fn send(&mut self, message: &Message) {
        if let Some(control) = &mut self.control {
            control.send(message);
        }
    }
}

fn identity() -> Identity {
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    Identity { kernel, init: env!("CARGO_PKG_VERSION").to_owned() }
}

/// A command as one line of bounded length: a serial console is slow.
fn brief(command: &str) -> String {
    const LONGEST: usize = 200;
    let mut line = String::new();
    for character in command.chars() {
        if line.len() >= LONGEST {
            line.push_str("...");
            break;
        }
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

/// A non-blocking stream that gets a byte for each of these signals.
fn signal_stream(signals: &[i32]) -> Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair().context("cannot create a socket pair")?;
    ours.set_nonblocking(true)?;
    for &signal in signals {
        signal_hook::low_level::pipe::register(signal, theirs.try_clone()?)
            .with_context(|| format!("cannot handle signal {signal}"))?;
    }
    Ok(ours)
}

/// Empties a signal stream and says whether there was anything.
fn drained(stream: &UnixStream) -> bool {
    let mut bytes = [0; 64];
    let mut any = false;
    while let Ok(1..) = rustix::io::read(stream, &mut bytes) {
        any = true;
    }
    any
}

/// A shell with job control on the console, for a person.
struct Shell {
    pid: Pid,
    since: Instant,
    /// Number of shells before this one that ended at once.
    short_lived: u32,
}

impl Shell {
    /// A shell that lives for less than this has failed to start.
    const SHORT: Duration = Duration::from_secs(1);

    /// After this many failures in a row no other shell is started.
    const MOST_SHORT_LIVED: u32 = 5;

    fn start() -> Result<Self> {
        let Some(path) = boot::console_terminal() else {
            bail!("`vvu.shell` needs a console that is a terminal")
        };
        let terminal = OpenOptions::new().read(true).write(true).open(&path).with_context(|| path.clone())?;
        let child = Command::new("/bin/setsid")
            .args(["-c", "/bin/sh", "-l"])
            .envs(jobs::ENVIRONMENT)
            .stdin(Stdio::from(terminal.try_clone()?))
            .stdout(Stdio::from(terminal.try_clone()?))
            .stderr(Stdio::from(terminal))
            .current_dir("/root")
            .spawn()
            .context("cannot start /bin/setsid")?;
        Ok(Self { pid: Pid::from_child(&child), since: Instant::now(), short_lived: 0 })
    }

    /// Starts the next one after this one has ended.
    fn again(self) -> Result<Self> {
        let short_lived = if self.since.elapsed() < Self::SHORT { self.short_lived + 1 } else { 0 };
        if short_lived == Self::MOST_SHORT_LIVED {
            bail!("the shell on the console keeps ending at once");
        }
        Ok(Self { short_lived, ..Self::start()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_on_one_short_line() {
        assert_eq!(brief("echo \"a\"\necho \u{1b}[2J"), "echo \"a\"\\necho \\u{1b}[2J");
        assert_eq!(brief(&"x".repeat(200)), "x".repeat(200));
        assert!(brief(&"x".repeat(201)).ends_with("x..."));
        assert!(brief(&"x".repeat(60_000)).len() < 210);
    }
}
