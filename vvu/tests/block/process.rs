//! `vvu device block` as a process.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use crate::common::disk;
use crate::with::arguments;

/// A running back-end, killed when it is dropped.
pub struct Process {
    pub child: Child,
    _dir: tempfile::TempDir,
    pub socket: PathBuf,
    pub disk: PathBuf,
}

impl Process {
    pub fn start(content: &[u8]) -> Self {
        let (dir, disk) = disk(content).expect("disk");
        let socket = dir.path().join("s");
        Self { child: launch(&socket, &disk), _dir: dir, socket, disk }
    }

    /// Kills the back-end, whatever it is doing, and starts another one in its place.
    pub fn replace(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
        self.child = launch(&self.socket, &self.disk);
    }

    pub fn limit(&self, resource: Resource, most: u64) {
        let limit = Rlimit { current: Some(most), maximum: getrlimit(resource).maximum };
        prlimit(Some(Pid::from_child(&self.child)), resource, limit).expect("limit");
    }

    pub fn open_files(&self) -> u64 {
        let list = Path::new("/proc").join(self.child.id().to_string()).join("fd");
        std::fs::read_dir(list).expect("/proc").count() as u64
    }
}

fn launch(socket: &Path, disk: &Path) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_vvu"))
        .args(["device", "block", "--socket"])
        .arg(socket)
        .arg("--file")
        .arg(disk)
        .args(arguments())
        .stdout(Stdio::piped())
        .spawn()
        .expect("vvu");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("standard output");
    assert!(line.contains("ready"), "{line}");
    child
}

impl Drop for Process {
    fn drop(&mut self) {
        // Neither works on a process that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
