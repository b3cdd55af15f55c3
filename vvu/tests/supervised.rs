//! `vvu proxy --supervised`: the worker is killed at any moment, and neither side notices.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use vvu::StopToken;
use vvu::bridge::{BackendSocket, Bridge, BridgeError, Options, Retry};
use vvu::driver::Driver as GuestDriver;
use vvu::vfio_user::client::VfioUserDevice;

#[path = "common/mod.rs"]
mod common;

use common::{Backend, DEADLINE, Driver, Piece, Setup, SiblingMemory, Task, Vmm, pattern, wait_until};

/// Bytes of the sibling's memory.
const MEMORY: usize = 8 << 20;
/// The longest that the shortest-lived workers live.
const SHORTEST: Duration = Duration::from_millis(3);
/// Bytes of the disk.
const DISK: usize = 64 << 10;

/// A running `vvu proxy --supervised`, killed when it is dropped.
struct Proxy {
    child: Child,
    dir: tempfile::TempDir,
}

impl Proxy {
    fn start() -> Self {
        Self::start_program(env!("CARGO_BIN_EXE_vvu").as_ref())
    }

    fn start_program(program: &Path) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let log = fs::File::create(dir.path().join("log")).expect("log");
        let mut child = Command::new(program)
            .args(["-v", "proxy", "--supervised", "--memory-size", "8M", "--memory-link", "memory"])
            .args(["--vfio-user", "vmm", "--vhost-user", "sibling", "--express", "express"])
            .current_dir(dir.path())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("vvu");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("standard output");
        let proxy = Self { child, dir };
        assert_eq!(line.trim_end(), vvu::PROXY_READY, "{:#?}", proxy.log());
        proxy
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn memory(&self) -> Arc<SiblingMemory> {
        let file = fs::File::options().read(true).write(true).open(self.path("memory")).expect("memory");
        Arc::new(SiblingMemory::of(file, &[Piece { gpa: 0, size: MEMORY, offset: 0 }]))
    }

    /// The worker, once there is one that has its name.
    fn worker(&self) -> Pid {
        wait_until("there is a worker", || worker(self.child.id()))
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("signal");
    }

    /// Asks it to end, and returns its log.
    fn stop(self) -> Vec<String> {
        self.signal(Signal::TERM);
        self.end(0)
    }

    /// What it wrote to standard error.
    fn log(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("log")).expect("log");
        text.lines().map(str::to_owned).collect()
    }

    /// Waits for its end, and returns its log.
    fn end(mut self, code: i32) -> Vec<String> {
        let status = wait_until("the proxy has ended", || self.child.try_wait().expect("wait"));
        let log = self.log();
        assert_eq!(status.code(), Some(code), "{log:#?}");
        for name in ["memory", "vmm", "sibling", "express"] {
            assert!(fs::symlink_metadata(self.dir.path().join(name)).is_err(), "{name} is left");
        }
        log
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            eprintln!("the end of the proxy's log: {:#?}", &log[log.len().saturating_sub(40)..]);
        }
    }
}

/// The worker of the supervisor with this process id.
fn worker(supervisor: u32) -> Option<Pid> {
    let children = fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children")).ok()?;
    let is_worker = |id: &i32| {
        fs::read_to_string(format!("/proc/{id}/comm")).is_ok_and(|name| name.trim_end() == "vvu-worker")
    };
    let mut ids = children.split_whitespace().filter_map(|id| id.parse().ok());
    ids.find(is_worker).and_then(Pid::from_raw)
}

/// Kills workers until it is stopped, each after a time that differs from the last.
struct Killer {
    stop: Arc<AtomicBool>,
    kills: Arc<AtomicU64>,
    task: Task<()>,
}

impl Killer {
    fn start(proxy: &Proxy, seed: u64) -> Self {
        let (stop, kills) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (stop.clone(), kills.clone());
        let supervisor = proxy.child.id();
        let task = Task::spawn("killer", move || {
            let mut state = seed | 1;
            while !stopped.load(Ordering::SeqCst) {
                let Some(worker) = worker(supervisor) else { continue };
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                // Mostly soon after the start, but not so often that nothing is done in between.
                let longest = SHORTEST * (1 << ((state >> 32) % 7));
                let nanos = u64::try_from(longest.as_nanos()).expect("short");
                std::thread::sleep(Duration::from_nanos(state % nanos));
                if kill_process(worker, Signal::KILL).is_ok() {
                    count.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        Self { stop, kills, task }
    }

    fn kills(&self) -> u64 {
        self.kills.load(Ordering::SeqCst)
    }

    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.task.join();
    }
}

/// The guest driver and the bridge in the device VM.
struct Guest {
    stop: StopToken,
    task: Task<Result<(), BridgeError>>,
}

impl Guest {
    fn start(proxy: &Proxy, backend: &Backend, express: Option<&Vmm>) -> Self {
        let express = express.map(Vmm::device);
        let stream = UnixStream::connect(proxy.path("vmm")).expect("proxy");
        let stop = StopToken::new().expect("token");
        let (stopped, socket) = (stop.clone(), backend.socket.clone());
        let (sender, ready) = channel();
        let task = Task::spawn("bridge", move || {
            let device = VfioUserDevice::from_stream(stream).expect("vfio-user");
            let mut driver = GuestDriver::new(device).expect("vvu device");
            if let Some(express) = express {
                driver.use_express(express).expect("express device");
            }
            let options = Options { backend: BackendSocket::Connect(socket), retry: Retry::Forever };
            Bridge::new(driver, options).run(&[stopped.as_fd()], || sender.send(()).expect("test"))
        });
        ready.recv_timeout(DEADLINE).expect("the bridge is ready");
        Self { stop, task }
    }

    fn end(self) {
        self.stop.stop();
        self.task.join().expect("bridge");
    }
}

/// Writes and reads, each verified, until `done`.
fn load(driver: &mut Driver, memory: &SiblingMemory, mut done: impl FnMut(u64) -> bool) -> u64 {
    let buffer = Driver::buffers(memory, 4);
    let mut round = 0;
    while !done(round) {
        round += 1;
        let sector = round * 7 % (DISK as u64 / 512);
        let content = pattern(round, 512);
        driver.write(0, sector, buffer, &content);
        memory.write(buffer, &[0; 512]);
        assert_eq!(driver.read(0, sector, buffer, 512), content, "round {round}");
    }
    round
}

/// Kills until there were `kills` while a load runs over one connection, then once more a clean round trip.
fn under_load(kills: u64, express: bool) {
    let proxy = Proxy::start();
    let memory = proxy.memory();
    let backend = Backend::start(&vec![0; DISK], |_| {});
    let vmm = express.then(|| Vmm::connect(&proxy.path("express")));
    let guest = Guest::start(&proxy, &backend, vmm.as_ref());
    let mut driver = Driver::connect_persistently(&proxy.path("sibling"), &memory, Setup::default());
    let killer = Killer::start(&proxy, 1);
    load(&mut driver, &memory, |_| killer.kills() >= kills);
    killer.end();
    load(&mut driver, &memory, |round| round >= 10);
    drop(driver);
    guest.end();
    backend.end();
    drop(vmm);
    proxy.stop();
}

/// Waits until there is another worker than `old`.
fn wait_for_another(proxy: &Proxy, old: Pid) {
    wait_until("there is another worker", || worker(proxy.child.id()).filter(|now| *now != old));
}

#[test]
fn a_load_goes_on_while_workers_are_killed() {
    under_load(200, false);
}

#[test]
fn a_load_goes_on_by_way_of_the_express_device() {
    under_load(100, true);
}

/// Each front-end is served by its first connection, whatever part of its negotiation a death interrupts.
#[test]
fn front_ends_come_and_go_while_workers_are_killed() {
    let proxy = Proxy::start();
    let memory = proxy.memory();
    let backend = Backend::start(&vec![0; DISK], |_| {});
    let guest = Guest::start(&proxy, &backend, None);
    let killer = Killer::start(&proxy, 3);
    while killer.kills() < 100 {
        for inflight in [false, true] {
            let setup = Setup { queues: 2, inflight, ..Setup::default() };
            let mut driver = Driver::connect(&proxy.path("sibling"), &memory, setup).expect("served");
            load(&mut driver, &memory, |round| round >= 2);
        }
    }
    killer.end();
    guest.end();
    backend.end();
    proxy.stop();
}

/// Each driver brings the device up at the first attempt.
#[test]
fn device_vms_come_and_go_while_workers_are_killed() {
    let proxy = Proxy::start();
    let memory = proxy.memory();
    let backend = Backend::start(&vec![0; DISK], |_| {});
    let killer = Killer::start(&proxy, 5);
    while killer.kills() < 100 {
        let guest = Guest::start(&proxy, &backend, None);
        let mut driver = Driver::connect_persistently(&proxy.path("sibling"), &memory, Setup::default());
        load(&mut driver, &memory, |round| round >= 1);
        drop(driver);
        guest.end();
    }
    killer.end();
    backend.end();
    proxy.stop();
}

#[test]
fn another_program_takes_over_and_a_wrong_one_does_not() {
    let programs = tempfile::tempdir().expect("directory");
    let program = programs.path().join("vvu");
    let install = |source: &Path| {
        let new = programs.path().join("new");
        fs::copy(source, &new).expect("a copy");
        fs::rename(&new, &program).expect("in its place");
    };
    let own = Path::new(env!("CARGO_BIN_EXE_vvu"));
    install(own);
    let proxy = Proxy::start_program(&program);
    let memory = proxy.memory();
    let backend = Backend::start(&vec![0; DISK], |_| {});
    let guest = Guest::start(&proxy, &backend, None);
    let mut driver = Driver::connect_persistently(&proxy.path("sibling"), &memory, Setup::default());
    let runs = || fs::read_link(format!("/proc/{}/exe", proxy.child.id())).expect("a program");
    for (source, is_upgraded) in [(own, true), (Path::new("/bin/true"), false), (own, true)] {
        install(source);
        let old = proxy.worker();
        proxy.signal(Signal::USR2);
        load(&mut driver, &memory, |round| round >= 20);
        wait_for_another(&proxy, old);
        assert_eq!(runs() == program, is_upgraded, "{source:?}");
        load(&mut driver, &memory, |round| round >= 20);
    }
    drop(driver);
    guest.end();
    backend.end();
    let log = proxy.stop();
    assert_eq!(
        log.iter().filter(|line| line.contains("going on with the old program")).count(),
        1,
        "{log:#?}"
    );
}

#[test]
fn a_worker_that_crashes_again_and_again_is_given_up() {
    let proxy = Proxy::start();
    for _ in 0..3 {
        let worker = proxy.worker();
        kill_process(worker, Signal::ABORT).expect("signal");
        wait_until("the worker has ended", || {
            (!Path::new(&format!("/proc/{}", worker.as_raw_pid())).exists()).then_some(())
        });
    }
    let log = proxy.end(1);
    assert!(log.last().is_some_and(|line| line.contains("crashed 3 times in a row")), "{log:#?}");
}

#[test]
fn a_worker_dies_with_its_supervisor() {
    let proxy = Proxy::start();
    let worker = proxy.worker();
    proxy.signal(Signal::KILL);
    let status = format!("/proc/{}/status", worker.as_raw_pid());
    wait_until("the worker is dead", || {
        // Whoever adopts it may take a while to wait for it.
        let status = fs::read_to_string(&status).unwrap_or_default();
        (status.is_empty() || status.contains("State:\tZ")).then_some(())
    });
}
