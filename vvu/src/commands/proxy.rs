//! `vvu proxy`: runs a vvu device for a device VM.

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail};
use rustix::rand::{GetRandomFlags, getrandom};
use uuid::Uuid;
use vvu::PROXY_READY;
use vvu::device::{DeviceConfig, MemoryOptions, SiblingMemory, Trace, VvuDevice};
use vvu::listening_socket::ListeningSocket;
use vvu::spec::PAGE_SIZE;
use vvu::vfio_user::server::Server;

mod supervised;

use super::names::NameRemover;
use crate::{sandbox, service, stop};

/// Options of `vvu proxy`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Socket that the device VM's VMM connects to (QEMU's vfio-user-pci device).
    #[arg(long, value_name = "PATH")]
    vfio_user: PathBuf,
    /// Socket that the sibling's vhost-user front-end connects to.
    #[arg(long, value_name = "PATH")]
    vhost_user: PathBuf,
    /// Socket that the device VM's VMM connects to for notifications without the proxy (QEMU's ivshmem-doorbell
    /// device).
    #[arg(long, value_name = "PATH")]
    express: Option<PathBuf>,
    #[command(flatten)]
    memory: Memory,
    /// Write every vhost-user message to this file, as JSON; vvu trace prints it.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Number of vhost queues that the device can carry.
    #[arg(long, value_name = "N", default_value_t = 16)]
    queues: u16,
    /// UUID that identifies the device to its driver [default: random with --express, else all zeroes]
    #[arg(long, value_name = "UUID")]
    uuid: Option<Uuid>,
    /// Whether to refuse system calls and file access that a running proxy does not need.
    #[arg(long, value_enum, default_value_t = Sandbox::On)]
    sandbox: Sandbox,
    /// Run the device in a worker process. When the worker dies, another one takes over, and both VMs go on; on SIGUSR2 the
    /// new one runs the program that is then in the place of this one.
    #[arg(long)]
    supervised: bool,
}

/// Whether the proxy runs in its sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Sandbox {
    /// Refuse them.
    On,
    /// Refuse nothing, to debug the proxy.
    Off,
}

/// The sibling memory file: a new one, or the one of another proxy for the same sibling.
#[derive(Debug, clap::Args)]
#[group(required = true)]
struct Memory {
    /// Size of the sibling VM's memory in bytes, or with K, M or G.
    #[arg(long, value_name = "SIZE", requires = "memory_link")]
    memory_size: Option<Size>,
    /// Use huge pages of 2 MiB for the sibling's memory; the host must have reserved them.
    #[arg(long, requires = "memory_size")]
    huge_pages: bool,
    /// Let the device VM have the sibling's memory as persistent memory too, which is cached and takes direct I/O: put 2 MiB in
    /// front of it, so that the sibling needs memory-backend-file,offset=2M.
    #[arg(long, requires = "memory_size")]
    window: bool,
    /// Symbolic link to create for the sibling memory file: the sibling's memory-backend-file,mem-path. It works for
    /// processes of the same user and PID namespace.
    #[arg(long, value_name = "PATH", requires = "memory_size")]
    memory_link: Option<PathBuf>,
    /// Use the sibling memory file of another proxy: its --memory-link.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["memory_size", "memory_link"])]
    memory: Option<PathBuf>,
}

impl Memory {
    /// Creates or opens the file; a new file has a link.
    fn open(&self) -> anyhow::Result<(SiblingMemory, Option<MemoryLink>)> {
        match (self.memory_size, &self.memory_link, &self.memory) {
            (Some(Size(size)), Some(path), _) => {
                let options = MemoryOptions { huge_pages: self.huge_pages, window: self.window };
                let memory = SiblingMemory::create_as(size, options)
                    .with_context(|| format!("cannot create a sibling memory file for {size} bytes"))?;
                let link = MemoryLink::new(path, memory.file())?;
                Ok((memory, Some(link)))
            }
            (_, _, Some(path)) => {
                let context =
                    || format!("cannot use {}: is the proxy that created it running?", path.display());
                let file = fs::File::options().read(true).write(true).open(path).with_context(context)?;
                Ok((SiblingMemory::open(file).with_context(context)?, None))
            }
            _ => bail!("want --memory-size and --memory-link, or --memory"),
        }
    }
}

impl Args {
    /// Whether the device runs in a worker process.
    pub(crate) fn is_supervised(&self) -> bool {
        self.supervised
    }

    /// The UUID of the device. The guest finds the express device by it, so two devices must not share one.
    fn uuid(&self) -> anyhow::Result<Uuid> {
        match (self.uuid, &self.express) {
            (Some(uuid), _) => Ok(uuid),
            (None, None) => Ok(Uuid::nil()),
            (None, Some(_)) => {
                let mut bytes = [0; 16];
                getrandom(&mut bytes, GetRandomFlags::empty())
                    .context("cannot get random bytes for a UUID")?;
                Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
            }
        }
    }
}

/// Serves the device until a signal asks the process to end.
pub(crate) fn run(args: Args, verbosity: u8) -> anyhow::Result<()> {
    if args.supervised { supervised::run(args, verbosity) } else { run_alone(&args) }
}

/// Prints the version of the state that supervised proxies save.
pub(crate) fn state_format() -> anyhow::Result<()> {
    writeln!(io::stdout(), "{}", vvu::durable::FORMAT).context("cannot write to standard output")
}

fn run_alone(args: &Args) -> anyhow::Result<()> {
    let stop = stop::on_signal().context("cannot catch signals")?;
    let (memory, link) = args.memory.open()?;
    let vhost_user = ListeningSocket::bind(&args.vhost_user)?;
    let vfio_user = ListeningSocket::bind(&args.vfio_user)?;
    let express = args.express.as_deref().map(ListeningSocket::bind).transpose()?;
    let mut device = VvuDevice::new(DeviceConfig {
        memory,
        listener: vhost_user.listener().try_clone()?,
        queues: args.queues,
        uuid: args.uuid()?.into_bytes(),
    })
    .context("cannot make the vvu device")?;
    if let Some(socket) = &express {
        device.serve_express(socket.listener().try_clone()?).context("cannot serve the express device")?;
    }
    if let Some(path) = &args.trace {
        let file = trace_file(path).with_context(|| format!("cannot write {}", path.display()))?;
        device.set_trace(Trace::new(file).context("cannot start the thread of the trace")?);
    }
    let server = Server::new(vfio_user.listener().try_clone()?, stop, &device)?;
    // Before the sandbox, which opens no sockets. Who connects now waits in the backlog.
    service::ready();
    let serve = || -> anyhow::Result<()> {
        writeln!(io::stdout(), "{PROXY_READY}").context("cannot write to standard output")?;
        server.serve(&mut device)?;
        Ok(())
    };
    match args.sandbox {
        Sandbox::On => {
            let mut names = vec![args.vhost_user.as_path(), &args.vfio_user];
            names.extend(args.memory.memory_link.as_deref());
            names.extend(args.express.as_deref());
            let remover = NameRemover::start(&names)
                .context("cannot start the process that removes the proxy's names at its end")?;
            let served = sandbox::enter().context("cannot enter the sandbox").and_then(|()| serve());
            remover.remove();
            // Their destructors would remove the names once more, which the sandbox forbids.
            std::mem::forget((vhost_user, vfio_user, express, link));
            served
        }
        Sandbox::Off => {
            log::warn!("the proxy runs without its sandbox");
            serve()
        }
    }
}

/// The symbolic link to the sibling memory file, which has no other name. It is removed with the value.
#[derive(Debug)]
struct MemoryLink {
    path: PathBuf,
    target: PathBuf,
}

impl MemoryLink {
    fn new(path: &Path, memory: &fs::File) -> anyhow::Result<Self> {
        match fs::symlink_metadata(path) {
            Ok(found) if found.is_symlink() => fs::remove_file(path)
                .with_context(|| format!("cannot replace {}, which an earlier proxy left", path.display()))?,
            Ok(_) => bail!(
                "{} exists and is not a link of vvu proxy: remove it or choose another --memory-link",
                path.display()
            ),
            Err(_) => {}
        }
        // The name of this process in /proc, which may be that of another PID namespace.
        let own = fs::read_link("/proc/self").context("cannot read /proc/self: is /proc mounted?")?;
        let target = Path::new("/proc").join(own).join("fd").join(memory.as_raw_fd().to_string());
        symlink(&target, path)
            .with_context(|| format!("cannot make {}: does its directory exist?", path.display()))?;
        let link = Self { path: path.to_owned(), target };
        let identity = |found: fs::Metadata| (found.dev(), found.ino());
        let leads_to =
            fs::metadata(path).map(identity).with_context(|| format!("cannot use {}", path.display()))?;
        if leads_to != identity(memory.metadata()?) {
            bail!(
                "{} does not lead to the sibling memory file: mount /proc in this PID namespace",
                path.display()
            );
        }
        Ok(link)
    }

    /// Takes over the link that an earlier program of this process made.
    fn inherit(path: &Path, memory: i32) -> Self {
        let target = PathBuf::from(format!("/proc/{}/fd/{memory}", std::process::id()));
        Self { path: path.to_owned(), target }
    }
}

impl Drop for MemoryLink {
    fn drop(&mut self) {
        if fs::read_link(&self.path).is_ok_and(|target| target == self.target)
            && let Err(error) = fs::remove_file(&self.path)
        {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// A number of bytes, from a text such as `512M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Size(u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
            Some(at) => text.split_at(at),
            None => (text, ""),
        };
        let shift = match unit {
            "" => Some(0),
            "K" | "k" => Some(10),
            "M" | "m" => Some(20),
            "G" | "g" => Some(30),
            _ => None,
        };
        let bytes = shift.and_then(|shift| number.parse::<u64>().ok()?.checked_mul(1 << shift));
        let bytes = bytes.filter(|bytes| *bytes > 0 && bytes.is_multiple_of(PAGE_SIZE) && *bytes <= 1 << 46);
        bytes
            .map(Self)
            .ok_or_else(|| format!("{text:?}: want a multiple of {PAGE_SIZE} bytes, for example 512M"))
    }
}

/// Makes the file for the trace. Only its owner may read it, since messages can hold keys of sessions.
fn trace_file(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_its_owner_may_read_a_trace() {
        let dir = tempfile::tempdir().expect("directory");
        let file = trace_file(&dir.path().join("trace")).expect("made");
        let mode = file.metadata().expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn sizes_have_units_and_whole_pages() {
        assert_eq!("512M".parse(), Ok(Size(512 << 20)));
        assert_eq!("4096".parse(), Ok(Size(4096)));
        assert_eq!("64G".parse(), Ok(Size(64 << 30)));
        for text in ["", "M", "0", "4095", "1T", "-1M", "99999999999999999999", "1G1", "18014398509481984K"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_link_replaces_a_stale_one_only_and_goes_away() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("memory");
        symlink("/proc/1/fd/3", &path).expect("stale");
        let memory = tempfile::tempfile().expect("file");
        let link = MemoryLink::new(&path, &memory).expect("link");
        assert!(fs::metadata(&path).is_ok());
        drop(link);
        assert!(fs::symlink_metadata(&path).is_err());
        fs::write(&path, "precious").expect("file");
        assert!(MemoryLink::new(&path, &memory).is_err());
        assert_eq!(fs::read(&path).expect("kept"), b"precious");
    }
}
