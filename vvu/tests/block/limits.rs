//! `vvu device block` as a process at the limits of its resources.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_T_OUT;

use crate::common::{Driver, Setup, disk, pattern, wait_until};
use crate::{DATA, IO_ERROR, OK, memory};

/// A running back-end, killed when it is dropped.
struct Process {
    child: Child,
    _dir: tempfile::TempDir,
    socket: PathBuf,
    disk: PathBuf,
}

impl Process {
    fn start(content: &[u8]) -> Self {
        let (dir, disk) = disk(content).expect("disk");
        let socket = dir.path().join("s");
        let mut child = Command::new(env!("CARGO_BIN_EXE_vvu"))
            .args(["device", "block", "--socket"])
            .arg(&socket)
            .arg("--file")
            .arg(&disk)
            .stdout(Stdio::piped())
            .spawn()
            .expect("vvu");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("standard output");
        assert!(line.contains("ready"), "{line}");
        Self { child, _dir: dir, socket, disk }
    }

    fn limit(&self, resource: Resource, most: u64) {
        let limit = Rlimit { current: Some(most), maximum: getrlimit(resource).maximum };
        prlimit(Some(Pid::from_child(&self.child)), resource, limit).expect("limit");
    }

    fn open_files(&self) -> u64 {
        let list = Path::new("/proc").join(self.child.id().to_string()).join("fd");
        std::fs::read_dir(list).expect("/proc").count() as u64
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Neither works on a process that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_shortage_of_descriptors_passes() {
    let content = pattern(30, 4096);
    let mut process = Process::start(&content);
    let memory = memory();
    let serve = |process: &Process| {
        let mut driver =
            Driver::connect(&process.socket, &memory, Setup { inflight: true, ..Setup::default() })?;
        assert_eq!(driver.read(0, 0, DATA, 4096), content);
        Ok::<_, vhost::Error>(())
    };
    // The server opens one descriptor of its own after it has said that it is ready, and one with its first signal.
    let idle = process.open_files() + 2;
    serve(&process).expect("no shortage");
    wait_until("the connection is gone", || (process.open_files() <= idle).then_some(()));
    let mut refused = 0;
    let mut spare = 0;
    // Each further descriptor lets the front-end get a little further, until it is served.
    loop {
        process.limit(Resource::Nofile, idle + spare);
        let served = serve(&process);
        assert!(
            process.child.try_wait().expect("wait").is_none(),
            "the back-end ended with {spare} to spare"
        );
        if served.is_ok() {
            break;
        }
        (refused, spare) = (refused + 1, spare + 1);
        assert!(spare < 64, "a front-end needs more than 64 descriptors");
    }
    assert!(refused > 5, "{refused} refusals");
    process.limit(Resource::Nofile, 512);
    serve(&process).expect("the shortage is over");
}

#[test]
fn a_limit_on_the_size_of_files_gives_io_errors() {
    let mut process = Process::start(&pattern(31, 64 << 10));
    process.limit(Resource::Fsize, 8192);
    let memory = memory();
    let mut driver = Driver::connect(&process.socket, &memory, Setup::default()).expect("connection");
    assert_eq!(driver.request(0, VIRTIO_BLK_T_OUT, 100, &[(DATA, 4096)]), IO_ERROR);
    assert!(process.child.try_wait().expect("wait").is_none(), "the back-end ended");
    assert_eq!(driver.request(0, VIRTIO_BLK_T_OUT, 0, &[(DATA, 4096)]), OK);
    assert_eq!(std::fs::read(&process.disk).expect("disk")[..4096], memory.read(DATA, 4096));
}
