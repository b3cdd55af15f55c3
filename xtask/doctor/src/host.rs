//! The facts about a machine that the requirements ask for.

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
use vvu_artifacts::host_system::HostSystem;
use vvu_artifacts::packages::{self, Brings};
use vvu_process::children;

/// How long a program may take to print its version.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Size of the memory file that is tried, as large as the memory of a VM. It is sparse.
const MEMFD_BYTES: u64 = 1 << 30;

/// A machine as the requirements see it. Tests make one up.
pub(super) struct Host {
    /// Directories in which programs are searched for.
    pub(super) programs: Vec<PathBuf>,
    /// The directory that stands for `/` when a package's file is searched for.
    pub(super) root: PathBuf,
    /// The processor's architecture, as Rust names it.
    pub(super) arch: &'static str,
    /// How its distribution installs packages, if that is known.
    pub(super) system: Option<&'static HostSystem>,
    /// apt can install packages without a password.
    pub(super) installs: bool,
    /// Memory that is available, in MiB.
    pub(super) free_mib: Result<u64>,
    /// The accelerator that would run the VMs.
    pub(super) accelerator: Result<Accelerator>,
    /// This user may open /dev/kvm; `None` if it does not exist.
    pub(super) kvm_opens: Option<bool>,
    /// The error of memfd_create, if this machine cannot make shared memory without a name.
    pub(super) memfd: Result<()>,
    /// Resource limits that are too low, each with the value that is wanted.
    pub(super) low_limits: Vec<String>,
    /// The cache and its entries.
    pub(super) cache: Place<Vec<Surveyed>>,
    /// The directory of the run directories.
    pub(super) runs: Place<()>,
}

/// A directory that runs write to. It need not exist.
pub(super) struct Place<T> {
    /// Absolute path of the directory.
    pub(super) path: PathBuf,
    /// The directory can be written, or made if it does not exist.
    pub(super) writable: bool,
    /// Free space on the file system in MiB.
    pub(super) free_mib: u64,
    /// Entries of the cache; nothing for other directories.
    pub(super) content: T,
}

impl Host {
    /// This machine.
    ///
    /// # Errors
    ///
    /// Fails if there is no directory for a cache or the cache cannot be read.
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
            system: HostSystem::this(),
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

    /// The path of a program.
    pub(super) fn program(&self, name: &str) -> Option<PathBuf> {
        self.programs.iter().map(|dir| dir.join(name)).find(|path| path.is_file())
    }

    /// Returns true if the file by which a package is recognised exists.
    pub(super) fn has(&self, brings: Brings) -> bool {
        match brings {
            Brings::Program(name) => self.program(name).is_some(),
            Brings::File(path) => self.root.join(path.trim_start_matches('/')).exists(),
        }
    }

    /// The trimmed output of a program; `None` if it fails or takes too long.
    pub(super) fn answer<W: AsRef<OsStr>>(&self, program: &str, args: &[W]) -> Option<String> {
        let mut output = tempfile::tempfile().ok()?;
        let mut command = Command::new(self.program(program)?);
        command.args(args).stdin(Stdio::null()).stdout(output.try_clone().ok()?).stderr(Stdio::null());
        let mut running = children::spawn(command).ok()?;
        // Dropping it kills it.
        let status = running.wait_timeout(ANSWER_LIMIT).ok()??;
        output.rewind().ok()?;
        let mut text = String::new();
        output.read_to_string(&mut text).ok()?;
        status.success().then(|| text.trim().to_owned())
    }
}

impl<T> Place<T> {
    fn of(path: PathBuf, content: T) -> Self {
        // A directory that does not exist yet is judged by the one in which it would be made.
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

/// Compares the limits that matter for a VM and its proxy with what they need. Only guests lock memory.
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
