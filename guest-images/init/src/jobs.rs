//! The processes PID 1 has started, their output and their end.

use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, WaitStatus};

use vvu_init::protocol::{Answer, End, Event, Exit, Kill, MAX_CAPTURE, Message, Outcome, Output, Run, Spawn};

/// Environment of every process.
pub(crate) const ENVIRONMENT: [(&str, &str); 2] =
    [("HOME", "/root"), ("PATH", "/bin:/sbin:/usr/bin:/usr/sbin:/usr/local/bin")];

/// Most processes at a time.
const MAX_JOBS: usize = 64;

/// Longest line of a spawned command in bytes; longer ones are broken.
const MAX_LINE: usize = 4 << 10;

/// Bytes read from one stream before the others have their turn: one pipe full.
const READ_AT_ONCE: usize = 64 << 10;

/// Started processes that have not ended.
#[derive(Default)]
pub(crate) struct Jobs {
    jobs: Vec<Job>,
}

struct Job {
    pid: Pid,
    purpose: Purpose,
    stdout: Stream,
    stderr: Stream,
}

enum Purpose {
    Run { id: u64, deadline: Instant },
    Spawn { name: String },
}

impl Jobs {
    /// Starts the command of a `run` request. The answer comes from [`Jobs::expire`] or [`Jobs::ended`].
    pub(crate) fn run(&mut self, id: u64, run: &Run) -> Result<(), String> {
        // No caller waits for years: the bound only keeps the addition from overflowing.
        let timeout = Duration::from_millis(run.timeout_ms.min(u64::from(u32::MAX)));
        let purpose = Purpose::Run { id, deadline: Instant::now() + timeout };
        self.start(&run.command, purpose).map(drop)
    }

    /// Starts the command of a `spawn` request.
    pub(crate) fn spawn(&mut self, spawn: &Spawn) -> Result<Pid, String> {
        if self.named(&spawn.name).is_some() {
            return Err(format!("`{}` is running already; kill it first or choose another name", spawn.name));
        }
        self.start(&spawn.command, Purpose::Spawn { name: spawn.name.clone() })
    }

    /// Sends a signal to the process group of a spawned command.
    pub(crate) fn kill(&self, kill: &Kill) -> Result<(), String> {
        let job = self.named(&kill.name).ok_or_else(|| format!("`{}` is not running", kill.name))?;
        let signal = Signal::from_named_raw(kill.signal)
            .ok_or_else(|| format!("{} is no signal number; want 1 to 31", kill.signal))?;
        rustix::process::kill_process_group(job.pid, signal)
            .map_err(|error| format!("cannot signal `{}`: {error}", kill.name))
    }

    /// The descriptors to poll for input.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let streams = self.jobs.iter().flat_map(|job| [&job.stdout, &job.stderr]);
        streams.filter_map(|stream| stream.pipe.as_ref().map(AsFd::as_fd))
    }

    /// The next time at which [`Jobs::expire`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let deadlines = self.jobs.iter().filter_map(|job| match job.purpose {
            Purpose::Run { deadline, .. } => Some(deadline),
            Purpose::Spawn { .. } => None,
        });
        deadlines.min()
    }

    /// Reads what the processes have written, and returns the lines of spawned commands.
    pub(crate) fn read(&mut self) -> Vec<Message> {
        self.jobs.iter_mut().flat_map(Job::read).collect()
    }

    /// Kills commands that have run longer than allowed, and returns their answers.
    ///
    /// The answer does not wait for the process to be gone: one that hangs in the kernel never is.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Message> {
        let late = |job: &mut Job| matches!(job.purpose, Purpose::Run { deadline, .. } if deadline <= now);
        let late: Vec<Job> = self.jobs.extract_if(.., late).collect();
        late.into_iter()
            .filter_map(|mut job| {
                // Fails only if the group is gone already.
                let _ = rustix::process::kill_process_group(job.pid, Signal::KILL);
                // A command of this kind has no lines.
                let _ = job.read();
                job.answer(Outcome::Timeout)
            })
            .collect()
    }

    /// Records that a process has ended, which need not be a job, and returns the messages for the host, its end last.
    pub(crate) fn ended(&mut self, pid: Pid, status: WaitStatus) -> Vec<Message> {
        let Some(index) = self.jobs.iter().position(|job| job.pid == pid) else { return Vec::new() };
        let mut job = self.jobs.swap_remove(index);
        let mut messages = job.read();
        let end = end(status);
        match &job.purpose {
            Purpose::Run { .. } => {
                messages.extend(job.answer(|output| Outcome::Exit(Exit { end, output })));
            }
            Purpose::Spawn { name } => {
                let name = name.clone();
                messages.extend(job.stdout.last_line(&name));
                messages.extend(job.stderr.last_line(&name));
                messages.push(Message::Event(Event::Exited { name, end }));
            }
        }
        messages
    }

    fn named(&self, wanted: &str) -> Option<&Job> {
        self.jobs.iter().find(|job| matches!(&job.purpose, Purpose::Spawn { name } if name == wanted))
    }

    fn start(&mut self, command: &str, purpose: Purpose) -> Result<Pid, String> {
        if self.jobs.len() == MAX_JOBS {
            return Err(format!("{MAX_JOBS} processes are running, which is the limit"));
        }
        let start = || -> io::Result<Job> {
            let mut child = Command::new("/bin/sh")
                .args(["-c", command])
                .envs(ENVIRONMENT)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .process_group(0)
                .spawn()?;
            // Dropping the handle neither kills nor waits: the main loop reaps every process.
            let pid = Pid::from_child(&child);
            let stdout = Stream::new(child.stdout.take().map(OwnedFd::from))?;
            let stderr = Stream::new(child.stderr.take().map(OwnedFd::from))?;
            Ok(Job { pid, purpose, stdout, stderr })
        };
        let job = start().map_err(|error| format!("cannot start /bin/sh: {error}"))?;
        let pid = job.pid;
        self.jobs.push(job);
        Ok(pid)
    }
}

impl Job {
    /// Reads what there is, and returns the lines of a spawned command.
    fn read(&mut self) -> Vec<Message> {
        let mut lines = Vec::new();
        for stream in [&mut self.stdout, &mut self.stderr] {
            stream.fill();
            match &self.purpose {
                Purpose::Run { .. } => stream.truncate(),
                Purpose::Spawn { name } => lines.extend(stream.lines(name)),
            }
        }
        lines
    }

    /// The answer to a `run` request, of its output.
    fn answer(self, outcome: impl FnOnce(Output) -> Outcome) -> Option<Message> {
        let Purpose::Run { id, .. } = self.purpose else { return None };
        let truncated = self.stdout.truncated || self.stderr.truncated;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let output = Output { stdout: text(&self.stdout.bytes), stderr: text(&self.stderr.bytes), truncated };
        Some(Message::Answer(Answer { id, outcome: outcome(output) }))
    }
}

/// An output of a process, with the bytes that were read and not yet passed on.
struct Stream {
    /// None once the other end is closed.
    pipe: Option<OwnedFd>,
    bytes: Vec<u8>,
    truncated: bool,
}

impl Stream {
    fn new(pipe: Option<OwnedFd>) -> io::Result<Self> {
        if let Some(pipe) = &pipe {
            rustix::fs::fcntl_setfl(pipe, OFlags::NONBLOCK)?;
        }
        Ok(Self { pipe, bytes: Vec::new(), truncated: false })
    }

    /// Reads what is there, at most [`READ_AT_ONCE`].
    fn fill(&mut self) {
        let Some(pipe) = &self.pipe else { return };
        let start = self.bytes.len();
        self.bytes.resize(start + READ_AT_ONCE, 0);
        let mut end = start;
        while end < self.bytes.len() {
            match rustix::io::read(pipe, &mut self.bytes[end..]) {
                Ok(0) => {
                    self.pipe = None;
                    break;
                }
                Ok(count) => end += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => {
                    self.pipe = None;
                    break;
                }
            }
        }
        self.bytes.truncate(end);
    }

    fn truncate(&mut self) {
        if self.bytes.len() > MAX_CAPTURE {
            self.bytes.truncate(MAX_CAPTURE);
            self.truncated = true;
        }
    }

    /// Takes the complete lines of the spawned command `name`.
    fn lines(&mut self, name: &str) -> Vec<Message> {
        let bytes = mem::take(&mut self.bytes);
        let mut rest = &bytes[..];
        let mut lines = Vec::new();
        loop {
            let length = rest.iter().take(MAX_LINE).position(|&byte| byte == b'\n');
            let (text, skip) = match length {
                Some(length) => (&rest[..length], length + 1),
                None if rest.len() >= MAX_LINE => (&rest[..MAX_LINE], MAX_LINE),
                None => break,
            };
            lines.push(line(name, text));
            rest = &rest[skip..];
        }
        self.bytes = rest.to_vec();
        lines
    }

    /// Takes a last line that has no newline.
    fn last_line(&mut self, name: &str) -> Option<Message> {
        let text = mem::take(&mut self.bytes);
        (!text.is_empty()).then(|| line(name, &text))
    }
}

/// The event of a line that the spawned command `name` printed.
fn line(name: &str, text: &[u8]) -> Message {
    Message::Event(Event::Line { name: name.to_owned(), text: String::from_utf8_lossy(text).into_owned() })
}

fn end(status: WaitStatus) -> End {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => End::Code(code),
        (None, signal) => End::Signal(signal.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec};
    use rustix::process::WaitOptions;

    use super::*;

    /// Serves the jobs as the main loop does until one ends, for at most 20 s; its lines are added to `lines`.
    fn next(jobs: &mut Jobs, lines: &mut Vec<String>) -> Message {
        let mut keep = |messages: Vec<Message>| {
            let mut last = None;
            for message in messages {
                match message {
                    Message::Event(Event::Line { name, text }) => lines.push(format!("[{name}] {text}")),
                    other => last = Some(other),
                }
            }
            last
        };
        let give_up = Instant::now() + Duration::from_secs(20);
        while Instant::now() < give_up {
            let mut fds: Vec<_> = jobs.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            let moment = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
            rustix::event::poll(&mut fds, Some(&moment)).expect("poll");
            keep(jobs.read());
            if let Some(message) = jobs.expire(Instant::now()).pop() {
                return message;
            }
            // Only our own: other tests have children in this process too.
            let pids: Vec<Pid> = jobs.jobs.iter().map(|job| job.pid).collect();
            for pid in pids {
                let ended = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG).expect("waitpid");
                let messages = ended.map(|(pid, status)| jobs.ended(pid, status)).unwrap_or_default();
                if let Some(message) = keep(messages) {
                    return message;
                }
            }
        }
        panic!("nothing happened for 20 s");
    }

    fn run(command: &str, timeout_ms: u64) -> Outcome {
        let mut jobs = Jobs::default();
        jobs.run(1, &Run { command: command.into(), timeout_ms }).expect("sh starts");
        match next(&mut jobs, &mut Vec::new()) {
            Message::Answer(Answer { id: 1, outcome }) => outcome,
            other => panic!("{other:?}"),
        }
    }

    fn spawn(jobs: &mut Jobs, name: &str, command: &str) -> Pid {
        jobs.spawn(&Spawn { name: name.into(), command: command.into() }).expect("sh starts")
    }

    #[test]
    fn a_command_answers_with_its_code_and_both_outputs() {
        let output = Output { stdout: "out\n".into(), stderr: "err\n".into(), truncated: false };
        assert_eq!(
            run("echo out; echo err >&2; exit 3", 20_000),
            Outcome::Exit(Exit { end: End::Code(3), output })
        );
    }

    #[test]
    fn a_command_killed_by_a_signal_says_so() {
        let exit = Exit { end: End::Signal(9), output: Output::default() };
        assert_eq!(run("kill -9 $$", 20_000), Outcome::Exit(exit));
    }

    #[test]
    fn more_output_than_allowed_is_cut_and_does_not_block() {
        let Outcome::Exit(Exit { end: End::Code(0), output }) = run("head -c 3000000 /dev/zero", 20_000)
        else {
            panic!("did not exit");
        };
        assert_eq!((output.stdout.len(), output.truncated), (MAX_CAPTURE, true));
    }

    #[test]
    fn a_late_command_is_killed_with_all_it_started() {
        // The group is gone when the last holder of the pipe is.
        let (mut reader, writer) = io::pipe().expect("pipe");
        let mut jobs = Jobs::default();
        rustix::io::fcntl_setfd(&writer, rustix::io::FdFlags::empty()).expect("inheritable");
        jobs.run(1, &Run { command: "echo begun; sleep 1000 & sleep 1000".into(), timeout_ms: 300 })
            .expect("starts");
        let pid = jobs.jobs[0].pid;
        drop(writer);
        let message = next(&mut jobs, &mut Vec::new());
        let output = Output { stdout: "begun\n".into(), ..Output::default() };
        assert_eq!(message, Message::Answer(Answer { id: 1, outcome: Outcome::Timeout(output) }));
        assert_eq!(io::Read::read(&mut reader, &mut [0]).expect("end of file"), 0);
        rustix::process::waitpid(Some(pid), WaitOptions::empty()).expect("a child of ours");
    }

    #[test]
    fn a_background_process_does_not_hold_the_answer_up() {
        let output = Output { stdout: "done\n".into(), ..Output::default() };
        assert_eq!(
            run("sleep 60 & pid=$!; echo done; (kill $pid) & exit 0", 20_000),
            Outcome::Exit(Exit { end: End::Code(0), output })
        );
    }

    #[test]
    fn spawned_commands_print_lines_and_report_their_end() {
        let mut jobs = Jobs::default();
        let mut lines = Vec::new();
        spawn(&mut jobs, "backend", "echo one; printf two");
        let message = next(&mut jobs, &mut lines);
        assert_eq!(message, Message::Event(Event::Exited { name: "backend".into(), end: End::Code(0) }));
        assert_eq!(lines, ["[backend] one", "[backend] two"]);
    }

    #[test]
    fn spawned_commands_are_killed_by_name_and_names_are_unique() {
        let mut jobs = Jobs::default();
        spawn(&mut jobs, "a", "sleep 1000");
        let again = Spawn { name: "a".into(), command: "true".into() };
        assert!(jobs.spawn(&again).expect_err("name is taken").contains("running already"));
        assert!(jobs.kill(&Kill { name: "b".into(), signal: 9 }).is_err());
        assert!(jobs.kill(&Kill { name: "a".into(), signal: 0 }).is_err());
        jobs.kill(&Kill { name: "a".into(), signal: 15 }).expect("running");
        let ended = Message::Event(Event::Exited { name: "a".into(), end: End::Signal(15) });
        assert_eq!(next(&mut jobs, &mut Vec::new()), ended);
        spawn(&mut jobs, "a", "true");
        next(&mut jobs, &mut Vec::new());
    }

    #[test]
    fn overlong_lines_are_broken() {
        let mut jobs = Jobs::default();
        let mut lines = Vec::new();
        spawn(&mut jobs, "x", "head -c 5000 /dev/zero | tr '\\0' y; echo");
        next(&mut jobs, &mut lines);
        let lengths: Vec<usize> = lines.iter().map(String::len).collect();
        assert_eq!(lengths, ["[x] ".len() + MAX_LINE, "[x] ".len() + 5000 - MAX_LINE]);
    }

    #[test]
    fn there_is_a_limit_of_processes() {
        let mut jobs = Jobs::default();
        for id in 0..MAX_JOBS {
            spawn(&mut jobs, &id.to_string(), "sleep 1000");
        }
        let one_more = jobs.run(99, &Run { command: "true".into(), timeout_ms: 1 });
        assert!(one_more.expect_err("too many").contains("limit"));
        for id in 0..MAX_JOBS {
            jobs.kill(&Kill { name: id.to_string(), signal: 9 }).expect("running");
        }
        for _ in 0..MAX_JOBS {
            next(&mut jobs, &mut Vec::new());
        }
    }
}
