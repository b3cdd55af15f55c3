//! `vvu supervise` as a process: the program ends with the bridge, whatever it does to escape.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vvu::event::wait_readable;

#[path = "common/namespace.rs"]
mod namespace;

use namespace::vvu_in_pid_namespace;

/// Bounds every wait, so that a failure ends.
const PATIENCE: Duration = Duration::from_secs(20);

/// A supervisor, and the bridge's end of its socket pair.
struct Supervisor {
    child: Child,
    control: UnixStream,
    /// Its other end is in every process that the program starts.
    output: io::PipeReader,
}

impl Supervisor {
    fn start(words: &[&str]) -> Self {
        Self::launch(Command::new(env!("CARGO_BIN_EXE_vvu")), words)
    }

    /// Starts it by `command`, to which the arguments are appended.
    fn launch(mut command: Command, words: &[&str]) -> Self {
        let (control, theirs) = UnixStream::pair().expect("pair");
        let (output, input) = io::pipe().expect("pipe");
        let child = command
            .args(["supervise", "--"])
            .args(words)
            .stdin(OwnedFd::from(theirs))
            .stdout(input)
            .stderr(Stdio::null())
            .spawn()
            .expect("vvu");
        control.set_read_timeout(Some(PATIENCE)).expect("timeout");
        Self { child, control, output }
    }

    /// What the supervisor reports.
    fn report(&mut self) -> String {
        let mut line = [0; 256];
        let length = self.control.read(&mut line).expect("a report");
        String::from_utf8_lossy(&line[..length]).into_owned()
    }

    /// Waits for the next bytes of the program.
    fn said(&mut self) -> String {
        let readable = wait_readable(&[self.output.as_fd()], Some(Instant::now() + PATIENCE)).expect("wait");
        assert!(readable.is_some(), "the program says nothing");
        let mut text = [0; 64];
        let length = self.output.read(&mut text).expect("output");
        String::from_utf8_lossy(&text[..length]).into_owned()
    }

    /// Waits until no process is left that the program started.
    fn all_gone(mut self) {
        while !self.said().is_empty() {}
        self.child.wait().expect("wait");
    }
}

#[test]
fn its_end_is_seen_and_told() {
    let mut supervisor = Supervisor::start(&["sh", "-c", "exit 3"]);
    assert_eq!(supervisor.report(), "ended 768\n");
    supervisor.all_gone();
}

#[test]
fn what_it_started_ends_with_it() {
    // Both ignore SIGTERM, and one outlives its parent.
    let mut supervisor = Supervisor::start(&["sh", "-c", "trap '' TERM; sleep 1000 & exit 0"]);
    assert_eq!(supervisor.report(), "ended 0\n");
    supervisor.all_gone();
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let mut supervisor = Supervisor::start(&["/nonexistent"]);
    let report = supervisor.report();
    assert!(report.starts_with("not-started ") && report.contains("No such file"), "{report}");
    supervisor.all_gone();
}

/// The bridge is killed, and none of these processes has the signal of its parent's death, as none has that changed
/// its user.
#[test]
fn a_program_that_escaped_ends_with_the_bridge() {
    let escape = "setsid sh -c 'sleep 1000 & echo ready; wait' & wait";
    let mut supervisor = Supervisor::start(&["sh", "-c", escape]);
    assert_eq!(supervisor.said(), "ready\n");
    supervisor.control.shutdown(Shutdown::Both).expect("shutdown");
    supervisor.all_gone();
}

/// Containers may have a PID namespace without a `/proc` of its own, which shows the ids of the one around it.
#[test]
fn a_program_that_escaped_ends_although_proc_counts_differently() {
    let Some(command) = vvu_in_pid_namespace() else { return };
    let escape = "trap '' TERM; setsid sh -c 'sleep 1000 & echo ready; wait' & wait";
    let mut supervisor = Supervisor::launch(command, &["sh", "-c", escape]);
    assert_eq!(supervisor.said(), "ready\n");
    supervisor.control.shutdown(Shutdown::Both).expect("shutdown");
    supervisor.all_gone();
}

#[test]
fn a_program_that_goes_to_the_background_is_reported_and_ended() {
    let directory = tempfile::tempdir().expect("directory");
    let fifo = directory.path().join("fifo");
    let daemonize =
        r#"mkfifo "$0" && { setsid sh -c 'echo up > "$0"; exec sleep 1000' "$0" & read up < "$0"; }"#;
    let mut supervisor = Supervisor::start(&["sh", "-c", daemonize, fifo.to_str().expect("UTF-8")]);
    assert_eq!(supervisor.report(), "background\n");
    supervisor.all_gone();
}
