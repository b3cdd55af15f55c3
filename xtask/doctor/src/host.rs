//! What the machine is asked.

use std::ffi::OsStr;
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Result;
use rustix::fs::{Access, MemfdFlags};
use rustix::process::{Resource, getrlimit};

use vvu_artifacts::accel::{self, Accelerator};
use vvu_artifacts::cache::{self, Surveyed};
use vvu_artifacts::packages::{self, Brings};
use vvu_process::children;

/// How long a program may take to tell its version.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// As large as the memory of a VM; sparse.
const MEMFD_BYTES: u64 = 1 << 30;

/// The machine, as far as the requirements ask. Tests make one up.
pub(super) struct Host {
    /// Directories of programs.
    pub(super) programs: Vec<PathBuf>,
    /// What absolute paths of files begin with.
    pub(super) root: PathBuf,
    /// The processor's architecture, as Rust names it.
    pub(super) arch: &'static str,
    /// Whether apt can install packages without a password.
    pub(super) installs: bool,
    /// Memory that may still be used, in MiB, or why it cannot be told.
    pub(super) free_mib: Result<u64>,
    /// What would run the VMs.
    pub(super) accelerator: Result<Accelerator>,
    /// Whether /dev/kvm may be opened; none if there is none.
    pub(super) kvm_opens: Option<bool>,
    /// Whether shared memory without a name can be had.
    pub(super) memfd: Result<()>,
    /// Limits that are lower than they need to be, with what is wanted.
    pub(super) low_limits: Vec<String>,
    /// Where the cache is and what is in it.
    pub(super) cache: Place<Vec<Surveyed>>,
    /// Where the run directories go.
    pub(super) runs: Place<()>,
}

/// A directory that is going to be written to, whether or not it exists.
pub(super) struct Place<T> {
    /// Where it is.
    pub(super) path: PathBuf,
    /// Whether it can be written, or made.
    pub(super) writable: bool,
    /// Room on its file system in MiB.
    pub(super) free_mib: u64,
    /// What it holds.
    pub(super) content: T,
}

impl Host {
    /// This machine.
    ///
    /// # Errors
    ///
    /// There is no place for a cache, or it cannot be read.
    pub(super) fn this() -> Result<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cargo"));
        let cargo = std::env::var_os("CARGO_HOME").map(PathBuf::from).or(home);
        let more = cargo.map(|cargo| cargo.join("bin")).into_iter();
        let more = more.chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
        let cache = cache::place()?;
        let content = cache::survey(&cache)?;
        let kvm = Path::new("/dev/kvm");
        Ok(Self {
            programs: std::env::split_paths(&path).chain(more).collect(),
            root: "/".into(),
            arch: std::env::consts::ARCH,
            installs: packages::privilege().is_some(),
            free_mib: vvu_testvm::memory::free_mib(),
            accelerator: accel::choose(accel::Request::Auto),
            kvm_opens: kvm
                .exists()
                .then(|| rustix::fs::access(kvm, Access::READ_OK | Access::WRITE_OK).is_ok()),
            memfd: memfd(),
            low_limits: low_limits(),
            cache: Place::of(cache, content),
            runs: Place::of(vvu_testvm::runs(), ()),
        })
    }

    /// The program of that name.
    pub(super) fn program(&self, name: &str) -> Option<PathBuf> {
        self.programs.iter().map(|dir| dir.join(name)).find(|path| path.is_file())
    }

    /// Whether a package's sign is there.
    pub(super) fn has(&self, brings: Brings) -> bool {
        match brings {
            Brings::Program(name) => self.program(name).is_some(),
            Brings::File(path) => self.root.join(path.trim_start_matches('/')).exists(),
        }
    }

    /// What a program prints, trimmed; `None` if it fails or does not answer in time.
    pub(super) fn answer<W: AsRef<OsStr>>(&self, program: &str, args: &[W]) -> Option<String> {
        let mut output = tempfile::tempfile().ok()?;
        let mut command = Command::new(self.program(program)?);
        command.args(args).stdin(Stdio::null()).stdout(output.try_clone().ok()?).stderr(Stdio::null());
        let mut running = children::spawn(command).ok()?;
        // Dropping it ends it.
        let status = running.wait_timeout(ANSWER_LIMIT).ok()??;
        output.rewind().ok()?;
        let mut text = String::new();
        output.read_to_string(&mut text).ok()?;
        status.success().then(|| text.trim().to_owned())
    }
}

impl<T> Place<T> {
    fn of(path: PathBuf, content: T) -> Self {
        // Of what does not exist yet, the directory in which it would be made counts.
        let there = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        let free = rustix::fs::statvfs(there).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
        let writable =
            there.is_dir() && rustix::fs::access(there, Access::WRITE_OK | Access::EXEC_OK).is_ok();
        Self { writable, free_mib: free >> 20, content, path }
    }
}

fn memfd() -> Result<()> {
    let fd = rustix::fs::memfd_create("vvu-doctor", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(fd.as_fd(), MEMFD_BYTES)?;
    Ok(())
}

/// What a VM and its proxy need; everything else has no limit that matters. Memory is locked only inside guests.
fn low_limits() -> Vec<String> {
    const WANTED: [(Resource, &str, u64); 4] = [
        (Resource::Nofile, "open files (ulimit -n)", 512),
        (Resource::Fsize, "file size in bytes (ulimit -f)", 4 << 30),
        (Resource::As, "address space in bytes (ulimit -v)", 16 << 30),
        (Resource::Nproc, "processes (ulimit -u)", 256),
    ];
    let low = |(resource, name, want)| {
        let current = getrlimit(resource).current?;
        (current < want).then(|| format!("{name}: {current}, want {want}"))
    };
    WANTED.into_iter().filter_map(low).collect()
}
