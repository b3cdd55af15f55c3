//! `vvu proxy` as a process: it is in its sandbox before it serves, and serves all the same.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use tempfile::TempDir;
use vvu::driver::{Driver, Incoming};
use vvu::event::wait_readable;
use vvu::message_socket::{Message, MessageSocket};
use vvu::spec::addr::{BarOffset, QueueIndex, SiblingGpa, SiblingVa};
use vvu::spec::express::PeerId;
use vvu::spec::express::page::Entry;
use vvu::spec::vhost_user::{FrontendReq, Header, MemoryRegion, memory_table_to_bytes};
use vvu::vfio_user::client::VfioUserDevice;

#[path = "common/ivshmem.rs"]
mod ivshmem;
#[path = "common/namespace.rs"]
mod namespace;

use ivshmem::Ivshmem;
use namespace::vvu_in_pid_namespace;

/// Bounds every wait, so that a failure ends.
const PATIENCE: Duration = Duration::from_secs(20);
const MEMORY: u64 = 4 << 20;

/// A running `vvu proxy`, killed when it is dropped.
struct Proxy {
    child: Child,
    dir: TempDir,
}

impl Proxy {
    fn start(options: &[&str]) -> Self {
        Self::try_start(options).unwrap_or_else(|error| panic!("{error}"))
    }

    /// What it says on standard error if it ends before it is ready.
    fn try_start(options: &[&str]) -> Result<Self, String> {
        Self::launch(Command::new(env!("CARGO_BIN_EXE_vvu")), options, Stdio::piped())
    }

    /// Starts it by `command`, to which the arguments are appended.
    fn launch(command: Command, options: &[&str], stderr: Stdio) -> Result<Self, String> {
        let own_memory = ["--memory-size", "4M", "--memory-link", "memory"];
        Self::launch_with(command, &[&own_memory, options].concat(), stderr)
    }

    /// A proxy that uses the memory file of `owner`.
    fn second(owner: &Self, options: &[&str]) -> Self {
        let memory = owner.path("memory");
        let memory = ["--memory", memory.to_str().expect("UTF-8")];
        Self::launch_with(
            Command::new(env!("CARGO_BIN_EXE_vvu")),
            &[&memory, options].concat(),
            Stdio::piped(),
        )
        .expect("a second proxy")
    }

    fn launch_with(mut command: Command, options: &[&str], stderr: Stdio) -> Result<Self, String> {
        let dir = tempfile::tempdir().expect("directory");
        let mut child = command
            .args(["-v", "proxy"])
            .args(["--vfio-user", "vmm", "--vhost-user", "sibling", "--express", "express"])
            .args(options)
            .current_dir(dir.path())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .expect("vvu");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("standard output");
        let mut proxy = Self { child, dir };
        if line.is_empty() {
            let mut error = String::new();
            let stderr = proxy.child.stderr.as_mut().expect("piped");
            stderr.read_to_string(&mut error).expect("standard error");
            return Err(error);
        }
        assert_eq!(line.trim_end(), vvu::PROXY_READY);
        Ok(proxy)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A line of the process's status in `/proc`.
    fn status(&self, field: &str) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("status");
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.expect("a field").trim().to_owned()
    }

    /// Lets it open `count` descriptors at most, from now on.
    fn limit_descriptors(&self, count: u64) {
        let limit = Rlimit { current: Some(count), maximum: Some(1024) };
        prlimit(Some(Pid::from_child(&self.child)), Resource::Nofile, limit).expect("prlimit");
    }

    /// Reads standard error up to the line that contains `text`.
    fn wait_for_log(&mut self, text: &str) {
        let stderr = self.child.stderr.as_mut().expect("piped");
        let mut line = Vec::new();
        while !String::from_utf8_lossy(&line).contains(text) {
            let fd = [stderr.as_fd()];
            assert!(
                wait_readable(&fd, Some(Instant::now() + PATIENCE)).expect("wait").is_some(),
                "no {text:?}"
            );
            line.resize(line.len() + 1, 0);
            let end = line.len() - 1;
            let length = stderr.read(&mut line[end..]).expect("standard error");
            assert_eq!(length, 1, "it has ended: {}", String::from_utf8_lossy(&line));
        }
    }

    /// Asks it to end; what it says on standard error.
    fn stop(self) -> String {
        self.stop_by(Signal::TERM)
    }

    fn stop_by(mut self, signal: Signal) -> String {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("signal");
        let mut text = String::new();
        self.child.stderr.take().expect("piped").read_to_string(&mut text).expect("standard error");
        assert_eq!(self.child.wait().expect("wait").code(), Some(0), "{text}");
        self.assert_no_names(&text);
        text
    }

    fn assert_no_names(&self, text: &str) {
        for name in ["memory", "vmm", "sibling", "express"] {
            assert!(fs::symlink_metadata(self.path(name)).is_err(), "{name} is left: {text}");
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Neither works on one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait(fd: impl AsFd) {
    let patience = Timespec::try_from(PATIENCE).expect("seconds");
    assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&patience)), Ok(1), "nothing came");
    let mut count = [0; 8];
    rustix::io::read(&fd, &mut count).expect("a signal");
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd")
}

fn request(code: FrontendReq, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).expect("small");
    Message::new(Header { request: code as u32, flags: 1, size }, payload).bytes
}

/// A driver and a front-end make the proxy do everything it does for real ones.
fn converse(proxy: &Proxy) {
    let device = VfioUserDevice::connect(&proxy.path("vmm")).expect("device");
    let mut driver = Driver::new(device).expect("driver");
    driver.set_backend_up(true).expect("back-end up");
    let mut frontend = MessageSocket::new(UnixStream::connect(proxy.path("sibling")).expect("connect"));

    let memory = || {
        OwnedFd::from(fs::File::options().read(true).write(true).open(proxy.path("memory")).expect("memory"))
    };
    let region = MemoryRegion { gpa: SiblingGpa(0), size: MEMORY, va: SiblingVa(0), offset: BarOffset(0) };
    let (kick, call) = (event(), event());
    let mut vmm = Ivshmem::new(UnixStream::connect(proxy.path("express")).expect("connect"));
    // Call eventfds that come before the proxy knows of the VMM get no peers until it does.
    let deadline = Instant::now() + PATIENCE;
    while !vmm.is_ready() {
        assert!(Instant::now() < deadline, "the proxy does not greet the VMM");
        vmm.handle_all();
        std::thread::yield_now();
    }
    let dup = |fd: &OwnedFd| vec![fd.try_clone().expect("dup")];
    let (channel, _theirs) = UnixStream::pair().expect("pair");
    let inflight = [&[0; 16][..], &[1, 0, 0, 1, 0, 0, 0, 0]].concat();
    let mut sizes = Vec::new();
    for (message, fds) in [
        (request(FrontendReq::SET_MEM_TABLE, &memory_table_to_bytes(&[region])), vec![memory()]),
        (request(FrontendReq::SET_VRING_KICK, &[0; 8]), dup(&kick)),
        (request(FrontendReq::SET_VRING_CALL, &[0; 8]), dup(&call)),
        (request(FrontendReq::SET_VRING_CALL, &[0; 8]), vec![event()]),
        (request(FrontendReq::SET_VRING_CALL, &[0; 8]), dup(&call)),
        (request(FrontendReq::SET_BACKEND_REQ_FD, &[]), vec![channel.into()]),
        (request(FrontendReq::GET_INFLIGHT_FD, &inflight), vec![]),
    ] {
        sizes.push(message.len());
        frontend.send(message, fds).expect("send");
    }
    let mut last = None;
    for want in sizes {
        let message = loop {
            match driver.receive().expect("receive") {
                Some(Incoming::Message(message)) => break message,
                Some(Incoming::FrontendLeft) => panic!("the proxy hung up"),
                None => wait(driver.rx_event()),
            }
        };
        assert_eq!(message.bytes.len(), want);
        last = Some(message.header);
    }
    express(&mut vmm, &call);
    let mut reply = inflight;
    reply[..8].copy_from_slice(&0x1000u64.to_le_bytes());
    let reply = Message::new(last.expect("a message").reply(24), &reply);
    assert!(driver.send(&reply.bytes).expect("send"));
    let fd = frontend_reply(&mut frontend).fds.pop().expect("the memory file");
    assert!(fs::File::from(fd).metadata().expect("metadata").len() > MEMORY);

    rustix::io::write(&kick, &1u64.to_ne_bytes()).expect("kick");
    wait(driver.kick(QueueIndex(0)).expect("queue"));
    driver.call(QueueIndex(0)).expect("queue").signal();
    wait(&call);
}

/// The guest signals the call eventfd of queue 0 through the express device.
fn express(vmm: &mut Ivshmem, call: &OwnedFd) {
    vmm.handle_all();
    let (connected, ever) = vmm.peers();
    assert_eq!((connected.len(), ever), (2, 2), "the same eventfd is the same peer");
    let peer = u16::try_from(connected[0]).ok().and_then(PeerId::new).expect("a peer");
    vmm.ring(peer.confirm());
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut registered = [0; 4];
        vmm.read(Entry::registered_offset(QueueIndex(0)), &mut registered);
        if u32::from_le_bytes(registered) == peer.call() {
            break;
        }
        assert!(Instant::now() < deadline, "the proxy does not hear the confirmation");
        std::thread::yield_now();
    }
    wait(call);
    vmm.ring(peer.call());
    wait(call);
}

fn frontend_reply(frontend: &mut MessageSocket) -> Message {
    loop {
        if let Some(message) = frontend.receive().expect("receive") {
            return message;
        }
        let patience = Timespec::try_from(PATIENCE).expect("seconds");
        assert_eq!(poll(&mut [PollFd::new(frontend, PollFlags::IN)], Some(&patience)), Ok(1));
    }
}

#[test]
fn a_proxy_in_its_sandbox_does_all_its_work() {
    let proxy = Proxy::start(&[]);
    assert_eq!((proxy.status("Seccomp"), proxy.status("NoNewPrivs")), ("2".into(), "1".into()));
    // Twice: the second client and front-end find what the first ones left.
    converse(&proxy);
    converse(&proxy);
    let text = proxy.stop();
    assert!(!text.contains("sandbox refused"), "{text}");
}

/// As in a container: the processes outside have no id there, and the proxy another one outside.
#[test]
fn a_proxy_in_a_pid_namespace_does_all_its_work() {
    let Some(command) = vvu_in_pid_namespace() else { return };
    let proxy = Proxy::launch(command, &[], Stdio::piped()).expect("proxy");
    converse(&proxy);
    if !knows_strangers() {
        eprintln!("not tried: before Linux 6.9, nothing identifies a process outside of the namespace");
        return;
    }
    let device = VfioUserDevice::connect(&proxy.path("vmm")).expect("device");
    let mut driver = Driver::new(device).expect("driver");
    driver.set_backend_up(true).expect("back-end up");
    let mut frontend = MessageSocket::new(UnixStream::connect(proxy.path("sibling")).expect("connect"));
    frontend.send(request(FrontendReq::GET_FEATURES, &[]), vec![]).expect("send");
    while driver.receive().expect("receive").is_none() {
        wait(driver.rx_event());
    }
    drop(driver);
    wait_for_end(&frontend);
    // The proxy hangs up on a front-end that returns before the back-end does.
    wait_for_end(UnixStream::connect(proxy.path("sibling")).expect("connect"));
}

/// Whether pidfds have inodes of their own (Linux 6.9).
fn knows_strangers() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("a version");
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse::<u32>().ok());
    let version = (numbers.next().flatten(), numbers.next().flatten());
    version >= (Some(6), Some(9))
}

/// Waits until the other end of `socket` has hung up.
fn wait_for_end(socket: impl AsFd) {
    let patience = Timespec::try_from(PATIENCE).expect("seconds");
    assert_eq!(poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&patience)), Ok(1), "nothing came");
    let end = rustix::io::read(&socket, &mut [0; 64]);
    assert!(matches!(end, Ok(0) | Err(rustix::io::Errno::CONNRESET)), "{end:?}");
}

#[test]
fn the_sandbox_can_be_turned_off() {
    let proxy = Proxy::start(&["--sandbox", "off"]);
    assert_eq!(proxy.status("Seccomp"), "0");
    converse(&proxy);
    assert!(proxy.stop().contains("without its sandbox"));
}

/// Does what can be done on this machine, and says which: nothing here changes how many huge pages there are.
#[test]
fn huge_pages_serve_as_memory_or_their_lack_is_told() {
    match Proxy::try_start(&["--huge-pages"]) {
        Ok(proxy) => {
            eprintln!("with the huge pages of this machine");
            converse(&proxy);
            converse(&proxy);
            let text = proxy.stop();
            assert!(!text.contains("sandbox refused"), "{text}");
        }
        Err(error) => {
            eprintln!("without huge pages: {error}");
            assert!(
                error.contains("cannot have 18 huge pages") && error.contains("vm.nr_hugepages=18"),
                "{error}"
            );
        }
    }
}

/// Descriptors that are free again after a while are enough: no client is lost, and the proxy does not end.
#[test]
fn a_client_that_comes_when_no_descriptor_is_left_is_served_later() {
    let mut proxy = Proxy::start(&[]);
    // After that it has opened all that it needs to serve.
    converse(&proxy);
    proxy.limit_descriptors(3);
    let client = UnixStream::connect(proxy.path("vmm")).expect("backlog");
    proxy.wait_for_log("cannot accept a vfio-user client yet");
    proxy.limit_descriptors(1024);
    let device = VfioUserDevice::from_stream(client).expect("a client that was served late");
    drop(device);
    converse(&proxy);
    let text = proxy.stop();
    assert!(!text.contains("sandbox refused"), "{text}");
}

#[test]
fn a_hang_up_of_the_terminal_ends_the_proxy_and_its_names() {
    let text = Proxy::start(&[]).stop_by(Signal::HUP);
    assert!(!text.contains("are left"), "{text}");
}

/// As nohup(1) starts it.
#[test]
fn a_proxy_that_was_started_to_ignore_hang_ups_does() {
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' HUP; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_vvu")]);
    let proxy = Proxy::launch(shell, &[], Stdio::piped()).expect("proxy");
    let hang_up = |field| u64::from_str_radix(&proxy.status(field), 16).expect("a mask") & 1;
    assert_eq!((hang_up("SigIgn"), hang_up("SigCgt")), (1, 0));
    kill_process(Pid::from_child(&proxy.child), Signal::HUP).expect("signal");
    converse(&proxy);
    proxy.stop();
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    use rustix::fs::{OFlags, fcntl_setfl};
    let (_reader, writer) = rustix::pipe::pipe().expect("pipe");
    fcntl_setfl(&writer, OFlags::NONBLOCK).expect("non-blocking");
    while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
    while rustix::io::write(&writer, b"x").is_ok() {}
    fcntl_setfl(&writer, OFlags::empty()).expect("blocking");
    let mut proxy =
        Proxy::launch(Command::new(env!("CARGO_BIN_EXE_vvu")), &[], writer.into()).expect("proxy");
    converse(&proxy);
    kill_process(Pid::from_child(&proxy.child), Signal::TERM).expect("signal");
    let deadline = Instant::now() + PATIENCE;
    let process =
        rustix::process::pidfd_open(Pid::from_child(&proxy.child), rustix::process::PidfdFlags::empty())
            .expect("pidfd");
    assert!(wait_readable(&[process.as_fd()], Some(deadline)).expect("wait").is_some(), "it does not end");
    assert_eq!(proxy.child.wait().expect("wait").code(), Some(0));
    proxy.assert_no_names("");
}

/// Sends the memory file of `owner` to `proxy`, as a sibling VM does that has it.
fn offer_memory(proxy: &Proxy, owner: &Proxy) -> (Driver<VfioUserDevice>, MessageSocket) {
    let device = VfioUserDevice::connect(&proxy.path("vmm")).expect("device");
    let driver = Driver::new(device).expect("driver");
    driver.set_backend_up(true).expect("back-end up");
    let mut frontend = MessageSocket::new(UnixStream::connect(proxy.path("sibling")).expect("connect"));
    let memory = fs::File::options().read(true).write(true).open(owner.path("memory")).expect("memory");
    let region = MemoryRegion { gpa: SiblingGpa(0), size: MEMORY, va: SiblingVa(0), offset: BarOffset(0) };
    let table = request(FrontendReq::SET_MEM_TABLE, &memory_table_to_bytes(&[region]));
    frontend.send(table, vec![memory.into()]).expect("send");
    (driver, frontend)
}

/// It could serve no sibling any more, and its sibling would wait for ever.
#[test]
fn a_proxy_whose_memory_file_was_replaced_ends_and_says_why() {
    for options in [&[][..], &["--supervised"]] {
        let mut first = Proxy::start(&[]);
        let mut second = Proxy::second(&first, options);
        let newer = Proxy::start(&[]);
        // The owner runs: it is the sibling that is wrong.
        let (driver, frontend) = offer_memory(&second, &newer);
        wait_for_end(&frontend);
        drop((driver, frontend));
        second.wait_for_log("is not in the sibling memory file");
        first.child.kill().expect("kill");
        first.child.wait().expect("wait");
        let _peers = offer_memory(&second, &newer);
        second.wait_for_log("start this proxy again");
        assert_eq!(second.child.wait().expect("wait").code(), Some(1), "{options:?}");
    }
}

/// The names stay, since another proxy may be replacing them at that moment; no process stays.
#[test]
fn a_proxy_that_is_killed_leaves_names_and_no_process() {
    let mut proxy = Proxy::start(&[]);
    proxy.child.kill().expect("kill");
    // Standard error ends when the last process ends that has it.
    let mut text = String::new();
    proxy.child.stderr.take().expect("piped").read_to_string(&mut text).expect("standard error");
    assert!(fs::symlink_metadata(proxy.path("vmm")).is_ok(), "{text}");
}
