//! `vvu proxy`, in its sandbox. The test is the device VM and the sibling.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use vvu::StopToken;
use vvu::backend::block::{BlockBackend, BlockOptions};
use vvu::driver::Driver as GuestDriver;
use vvu::vfio_user::client::VfioUserDevice;

use crate::calls::KINDS;
use crate::common::{DEADLINE, Piece, Setup, SiblingMemory, Task, pattern};
use crate::frontend::{Outcome, attempt};
use crate::interceptor::{Filter, Interceptor};
use crate::process::Process;
use crate::walk;

pub const ARGUMENTS: &[&str] = &[
    "-v",
    "proxy",
    "--vfio-user",
    "vmm",
    "--vhost-user",
    "sibling",
    "--memory-size",
    "4M",
    "--memory-link",
    "memory",
    "--trace",
    "trace",
    "--express",
    "express",
];
pub const RAM: [Piece; 1] = [Piece { gpa: 0, size: 4 << 20, offset: 0 }];

pub struct Proxy {
    pub process: Process,
    directory: tempfile::TempDir,
}

impl Proxy {
    fn start(filter: Filter, prepare: impl FnOnce(&Interceptor) + Send + 'static) -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let process = Process::start(filter, directory.path(), ARGUMENTS, prepare);
        Self::of(process, directory)
    }

    pub fn of(process: Process, directory: tempfile::TempDir) -> Self {
        Self { process, directory }
    }

    pub fn ready(filter: Filter) -> Self {
        let mut proxy = Self::start(filter, |_| {});
        assert!(proxy.process.wait_ready(), "{}", proxy.process.errors());
        proxy
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The sibling memory file.
    pub fn memory(&self) -> File {
        File::options().read(true).write(true).open(self.path("memory")).expect("memory")
    }

    pub fn errors(&self) -> String {
        self.process.errors()
    }
}

/// A device VM that is started again whenever it ends, and the sibling.
struct Vms {
    stop: StopToken,
    device_vm: Task<()>,
    memory: Arc<SiblingMemory>,
    content: Vec<u8>,
    socket: PathBuf,
    _disk: tempfile::TempDir,
}

impl Vms {
    fn start(proxy: &Proxy) -> Self {
        let content = pattern(41, 16 << 10);
        let (disk_directory, disk) = crate::common::disk(&content).expect("disk");
        let block = BlockBackend::open(&BlockOptions::new(&disk)).expect("disk");
        let memory = Arc::new(SiblingMemory::of(proxy.memory(), &RAM));
        let stop = StopToken::new().expect("token");
        let (stopped, vmm) = (stop.clone(), proxy.path("vmm"));
        let device_vm = Task::spawn("device VM", move || {
            while !stopped.is_stopped() {
                // What the proxy refuses it, it tries again.
                let Ok(device) = VfioUserDevice::connect(&vmm) else { continue };
                let Ok(driver) = GuestDriver::new(device) else { continue };
                let served = vvu::serve(
                    driver,
                    &stopped,
                    || {},
                    |frontend| {
                        block.serve_frontend(frontend, &stopped);
                        Ok::<_, String>(())
                    },
                );
                drop(served);
            }
        });
        Self { stop, device_vm, memory, content, socket: proxy.path("sibling"), _disk: disk_directory }
    }

    fn attempt(&self) -> Outcome {
        let setup = Setup { inflight: true, ..Setup::default() };
        attempt(&self.socket, &self.memory, setup, &self.content)
    }

    /// Connects until it is served, as a VMM does that lost its back-end.
    fn attempt_persistently(&self) -> Outcome {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let outcome = self.attempt();
            if matches!(outcome, Outcome::Served | Outcome::Hung) || Instant::now() > deadline {
                return outcome;
            }
        }
    }

    fn end(self) {
        self.stop.stop();
        self.device_vm.join();
    }
}

#[test]
fn every_call_of_a_serving_proxy_is_of_a_known_kind() {
    let proxy = Proxy::ready(Filter::All);
    proxy.process.calls.reset();
    let vms = Vms::start(&proxy);
    assert_eq!(vms.attempt(), Outcome::Served, "{}", proxy.errors());
    vms.end();
    walk::assert_known(&proxy.process.calls.seen());
    proxy.process.stop();
}

#[test]
fn the_next_front_end_of_a_proxy_is_served_whatever_failed_before() {
    walk::each_kind(KINDS, |kind| {
        let mut proxy = Proxy::ready(Filter::One(kind.1));
        let mut vms = Vms::start(&proxy);
        assert_eq!(vms.attempt_persistently(), Outcome::Served, "{}", proxy.errors());
        walk::each(kind, |nth, errno, what| {
            proxy.process.calls.fail(kind.1, nth, errno);
            for _ in 0..2 {
                let outcome = vms.attempt();
                assert_ne!(outcome, Outcome::Hung, "{what}: {}", proxy.errors());
                if proxy.process.calls.has_failed() {
                    break;
                }
            }
            if !proxy.process.calls.relent() {
                return false;
            }
            if proxy.process.survives(what) {
                assert_eq!(vms.attempt_persistently(), Outcome::Served, "{what}: {}", proxy.errors());
            } else {
                vms.stop.stop();
                proxy = Proxy::ready(Filter::One(kind.1));
                vms = Vms::start(&proxy);
            }
            true
        });
        vms.end();
        proxy.process.stop();
    });
}

#[test]
fn a_proxy_that_cannot_start_says_what_helps() {
    walk::each_kind(KINDS, |kind| {
        walk::each(kind, |nth, errno, what| {
            let number = kind.1;
            let prepare = move |calls: &Interceptor| calls.fail(number, nth, errno);
            let mut proxy = Proxy::start(Filter::OneOnceThreaded(number), prepare);
            if !proxy.process.wait_ready() {
                proxy.process.assert_gave_up(errno, what);
                return true;
            }
            let failed = proxy.process.calls.relent();
            let vms = Vms::start(&proxy);
            assert_eq!(vms.attempt_persistently(), Outcome::Served, "{what}: {}", proxy.errors());
            vms.end();
            proxy.process.stop();
            failed
        });
    });
}
