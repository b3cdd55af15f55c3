//! `vvu device block` as management programs and systemd start it: vhost-user, "Backend program conventions";
//! sd_listen_fds(3), sd_notify(3).

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::json;
use vhost::VhostBackend;
use vhost::vhost_user::Frontend;

use crate::common::{Driver, Setup, disk, pattern};
use crate::{DATA, memory};

const VVU: &str = env!("CARGO_BIN_EXE_vvu");

/// A process that is killed when it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Neither works on a process that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a command that prints the back-end's ready line, and returns that line too.
fn ready(command: &mut Command) -> (Running, String) {
    let mut running = Running(command.stdout(Stdio::piped()).spawn().expect("started"));
    let mut line = String::new();
    let stdout = running.0.stdout.take().expect("piped");
    BufReader::new(stdout).read_line(&mut line).expect("standard output");
    assert!(line.contains("ready"), "{line}");
    (running, line)
}

/// A shell that has `socket` as descriptor 3 and becomes `vvu device block ARGUMENTS` for `disk`.
fn with_socket(socket: impl Into<OwnedFd>, prefix: &str, disk: &Path, arguments: &str) -> Command {
    let mut command = Command::new("sh");
    let script = format!("{prefix} exec \"$0\" device block --blk-file \"$1\" {arguments} 3<&0 0</dev/null");
    command.args(["-c", &script, VVU]).arg(disk).stdin(socket.into());
    command
}

/// Reads the disk at the socket.
fn check(socket: &Path, content: &[u8]) {
    let memory = memory();
    let mut driver = Driver::connect(socket, &memory, Setup::default()).expect("connected");
    assert_eq!(driver.read(0, 0, DATA, 512), content[..512]);
}

#[test]
fn capabilities_are_printed_without_a_disk() {
    let output =
        Command::new(VVU).args(["device", "block", "--print-capabilities"]).output().expect("started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let printed: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(printed, json!({"type": "block", "features": ["read-only", "blk-file"]}));
}

#[test]
fn the_names_of_the_conventions_are_taken_and_the_service_manager_is_told() {
    let content = pattern(5, 4096);
    let (dir, disk) = disk(&content).expect("disk");
    let socket = dir.path().join("s");
    let manager = UnixDatagram::bind(dir.path().join("notify")).expect("bound");
    let mut command = Command::new(VVU);
    command.args(["device", "block", "--socket-path"]).arg(&socket).arg("--blk-file").arg(&disk);
    command.env("NOTIFY_SOCKET", dir.path().join("notify"));
    let (_running, _) = ready(&mut command);
    let mut message = [0; 64];
    let length = manager.recv(&mut message).expect("received");
    assert_eq!(String::from_utf8_lossy(&message[..length]).trim_end(), "READY=1");
    check(&socket, &content);
}

#[test]
fn a_listening_socket_is_inherited_by_number_or_from_systemd() {
    let content = pattern(6, 4096);
    for (prefix, arguments) in [("", "--fd 3"), ("LISTEN_PID=$$ LISTEN_FDS=1", "")] {
        let (dir, disk) = disk(&content).expect("disk");
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).expect("bound");
        let (_running, line) = ready(&mut with_socket(listener, prefix, &disk, arguments));
        assert!(line.contains("an inherited socket"), "{line}");
        // One front-end after the other.
        check(&socket, &content);
        check(&socket, &content);
    }
}

#[test]
fn a_connection_is_served_until_the_front_end_leaves() {
    let (_dir, disk) = disk(&pattern(7, 4096)).expect("disk");
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let (mut running, _) = ready(&mut with_socket(theirs, "", &disk, "--fd 3"));
    let frontend = Frontend::from_stream(ours, 1);
    assert_ne!(frontend.get_features().expect("answered"), 0);
    drop(frontend);
    assert!(running.0.wait().expect("ended").success());
}

#[test]
fn what_is_no_socket_is_refused_in_words() {
    let (dir, disk) = disk(&pattern(8, 4096)).expect("disk");
    let file = std::fs::File::open(dir.path()).expect("opened");
    let refused = |command: &mut Command, want: &str| {
        let output = command.output().expect("started");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(want), "{said}");
    };
    refused(&mut with_socket(file, "", &disk, "--fd 3"), "no unix stream socket");
    refused(Command::new(VVU).args(["device", "block", "--fd", "77", "--file"]).arg(&disk), "not open");
    refused(Command::new(VVU).args(["device", "block", "--file"]).arg(&disk), "name a place");
    refused(Command::new(VVU).args(["device", "block", "--socket", "s"]), "--file");
}
