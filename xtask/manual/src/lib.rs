//! `cargo xtask vm`: one VM in this terminal, with a shell on its console.
//!
//! The manual steps of virtio-vhost-user, command for command, in two terminals: the device VM and its proxy in one,
//! the sibling VM in the other. With `--exec`, the same for scripts.

mod guest;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use vvu_artifacts::image::{DiskImage, OverlayEntry, Pattern, with_overlay};
use vvu_process::children;
use vvu_process::progress::Progress;
use vvu_testvm::leftover::RUN_VARIABLE;
use vvu_testvm::memory::ensure_free;
use vvu_testvm::rundir::RunDir;
use vvu_testvm::rundir::runs;
use vvu_testvm::setup::{Needs, Setup, SetupOptions};
use vvu_testvm::vm::ProxyPlan;
use vvu_testvm::vm::args::{Config, Device};
use vvu_testvm::vm::proxy::Proxy;
use vvu_testvm::vm::{Addr, Frontend, Iommu, Slot};

/// How long a proxy may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(60);

/// Where `--disk` is in the guest.
const DISK_PATH: &str = "/disk.img";

/// Options of `cargo xtask vm`.
#[derive(Debug, clap::Subcommand)]
pub enum Role {
    /// The VM with the back-end: a vvu device, and its proxy, which lives as long as the VM
    Device(DeviceOptions),
    /// The VM with the front-end
    Sibling(SiblingOptions),
}

/// Options of `cargo xtask vm device`.
#[derive(Debug, clap::Args)]
pub struct DeviceOptions {
    /// vhost-user socket to make for the sibling, and the PCI address of the vvu device
    #[arg(long, value_name = "SOCKET[,addr=BDF]")]
    vvu_proxy: VvuProxy,
    /// RAM of the sibling in MiB, which the proxy provides
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    sibling_memory: u64,
    /// IOMMU in front of the devices
    #[arg(long, value_enum, default_value_t = Iommu::Virtio)]
    iommu: Iommu,
    /// Disk image to put into the VM as /disk.img: a file, or a size such as 64M for one of zero bytes
    #[arg(long, value_name = "FILE|SIZE")]
    disk: Option<Disk>,
    #[command(flatten)]
    common: Common,
}

/// Options of `cargo xtask vm sibling`.
#[derive(Debug, clap::Args)]
pub struct SiblingOptions {
    /// vhost-user socket of a block back-end: that of a device VM's `--vvu-proxy`
    #[arg(long, value_name = "SOCKET")]
    vhost_user_blk: PathBuf,
    #[command(flatten)]
    common: Common,
}

/// What both have.
#[derive(Debug, clap::Args)]
struct Common {
    /// RAM in MiB
    #[arg(short, long, value_name = "MIB", default_value_t = 512)]
    memory: u64,
    /// Added to the kernel command line
    #[arg(short, long, value_name = "WORDS")]
    params: Vec<String>,
    /// Directory whose tree is laid over the VM's root
    #[arg(long, value_name = "DIR")]
    overlay: Vec<PathBuf>,
    /// Run this shell command in the VM instead of a shell on its console, pass its output on when it has ended,
    /// shut the VM down, and end with the command's exit code
    #[arg(long, value_name = "COMMAND")]
    exec: Option<String>,
    /// Seconds that --exec may take, boot included
    #[arg(long, value_name = "SECONDS", default_value_t = 600, requires = "exec",
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    #[command(flatten)]
    setup: SetupOptions,
}

/// `SOCKET[,addr=BDF]`.
#[derive(Debug, Clone)]
struct VvuProxy {
    socket: PathBuf,
    slot: Slot,
}

impl FromStr for VvuProxy {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (socket, slot) = match text.rsplit_once(",addr=") {
            None => (text, Addr::default()),
            Some((socket, addr)) => (socket, addr.parse()?),
        };
        let slot = match slot {
            Addr::Fixed(slot) => slot,
            Addr::Auto => Slot::DEFAULT,
        };
        Ok(Self { socket: std::path::absolute(socket).context("want a path")?, slot })
    }
}

/// `FILE` or a size.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Disk {
    /// An image of zero bytes, of so many.
    Size(u64),
    /// A raw image of the host.
    File(PathBuf),
}

impl FromStr for Disk {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (digits, shift) = match text.strip_suffix(['M', 'G']) {
            Some(digits) if text.ends_with('G') => (digits, 30),
            Some(digits) => (digits, 20),
            None => return Ok(Self::File(text.into())),
        };
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Ok(Self::File(text.into()));
        }
        let count: u64 =
            digits.parse().with_context(|| format!("{text:?} is no size: want one such as 64M"))?;
        let most = u64::MAX >> shift;
        ensure!((1..=most).contains(&count), "{text:?} is no size: want 1M or more");
        Ok(Self::Size(count << shift))
    }
}

impl Disk {
    fn image(&self) -> Result<DiskImage> {
        match self {
            Self::Size(bytes) => Ok(DiskImage::zero(*bytes)),
            Self::File(path) => {
                let unusable = || format!("--disk {}", path.display());
                let meta = path.metadata().with_context(unusable)?;
                let size = meta.len();
                ensure!(
                    meta.is_file() && size > 0 && size.is_multiple_of(512),
                    "{}: want a raw image whose size is a multiple of 512 bytes, or a size such as 64M",
                    unusable()
                );
                Ok(DiskImage { size, pattern: Pattern::Copy(path.clone()) })
            }
        }
    }
}

/// Runs `cargo xtask vm`: ends when the VM does, with the exit code of its QEMU.
///
/// # Errors
///
/// The set-up fails, or something cannot be started.
pub fn main(role: &Role) -> Result<ExitCode> {
    match role {
        Role::Device(options) => device(options),
        Role::Sibling(options) => sibling(options),
    }
}

fn device(options: &DeviceOptions) -> Result<ExitCode> {
    if let Some(disk) = &options.disk {
        disk.image()?;
    }
    let (setup, run) = set_up("vm-device", &options.common)?;
    let VvuProxy { socket, slot } = &options.vvu_proxy;
    let plan = ProxyPlan {
        slot: *slot,
        vfio_user: with_suffix(socket, ".vfio"),
        vhost_user: socket.clone(),
        memory_link: memory_link(socket),
        memory_mib: Some(options.sibling_memory),
        huge_pages: false,
        trace: None,
        queues: 16,
    };
    let words = plan.words(&setup.binaries.vvu);
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).env(RUN_VARIABLE, run.id());
    let mut proxy = Proxy::start("vvu", command, run.file("proxy-vvu.log"))?;
    proxy.ready(Instant::now() + START_LIMIT)?;
    let config = Config {
        name: "device".to_owned(),
        iommu: Some(options.iommu),
        devices: vec![Device::Vvu { slot: *slot, socket: plan.vfio_user.display().to_string() }],
        ..options.common.config()
    };
    let code = options.common.run(&setup, &run, &config, options.disk.as_ref(), Some(&mut proxy));
    if children::interrupted() {
        return code;
    }
    proxy.stop()?;
    code
}

fn sibling(options: &SiblingOptions) -> Result<ExitCode> {
    let socket = std::path::absolute(&options.vhost_user_blk).context("want a path")?;
    let link = memory_link(&socket);
    if !link.exists() {
        bail!(
            "{} is not there: start the device VM first, with --vvu-proxy {}",
            link.display(),
            socket.display()
        );
    }
    let (setup, run) = set_up("vm-sibling", &options.common)?;
    let device = Device::VhostUser {
        slot: Slot::DEFAULT,
        socket: socket.display().to_string(),
        frontend: Frontend::default(),
        reconnect_ms: 0,
    };
    let config = Config {
        name: "sibling".to_owned(),
        memory_file: Some(link.display().to_string()),
        devices: vec![device],
        ..options.common.config()
    };
    options.common.run(&setup, &run, &config, None, None)
}

fn set_up(name: &str, common: &Common) -> Result<(Setup, RunDir)> {
    ensure_free(common.memory, 1)?;
    let setup = Setup::obtain(&common.setup, &Needs::default(), &Progress::new(false))?;
    Ok((setup, RunDir::create(&runs(), name)?))
}

impl Common {
    fn config(&self) -> Config {
        Config { memory_mib: self.memory, cpus: 1, cmdline: self.params.join(" "), ..Config::default() }
    }

    /// Runs the VM to its end.
    fn run(
        &self,
        setup: &Setup,
        run: &RunDir,
        config: &Config,
        disk: Option<&Disk>,
        proxy: Option<&mut Proxy>,
    ) -> Result<ExitCode> {
        let mut initramfs = setup.base.path.clone();
        let mut overlay: Vec<_> = self.overlay.iter().map(|tree| OverlayEntry::Tree(tree.clone())).collect();
        if let Some(disk) = disk {
            overlay.push(OverlayEntry::Disk { path: DISK_PATH.to_owned(), image: disk.image()? });
        }
        if !overlay.is_empty() {
            initramfs = run.file("overlay.cpio");
            with_overlay(&setup.base, &overlay, &initramfs)?;
        }
        let bench = guest::Bench { setup, run, config, initramfs: &initramfs };
        match &self.exec {
            Some(command) => bench.exec(command, Duration::from_secs(self.timeout), proxy),
            None => bench.terminal(),
        }
    }
}

/// The name of the sibling's memory file belongs to that of the socket, so that one option tells both.
fn memory_link(socket: &Path) -> PathBuf {
    with_suffix(socket, ".mem")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proxy_option_has_a_socket_and_maybe_an_address() {
        let parsed: VvuProxy = "/run/s,addr=00:11.0".parse().expect("valid");
        assert_eq!((parsed.socket, parsed.slot.to_string().as_str()), ("/run/s".into(), "0000:00:11.0"));
        let parsed: VvuProxy = "/run/s".parse().expect("valid");
        assert_eq!(parsed.slot, Slot::DEFAULT);
        assert_eq!(memory_link(&parsed.socket), Path::new("/run/s.mem"));
        "/run/s,addr=10".parse::<VvuProxy>().expect_err("no address");
    }

    #[test]
    fn a_disk_is_a_size_or_a_file() {
        let disk = |text: &str| text.parse::<Disk>().expect("valid");
        assert_eq!((disk("64M"), disk("2G")), (Disk::Size(64 << 20), Disk::Size(2 << 30)));
        assert_eq!((disk("disk.M"), disk("64")), (Disk::File("disk.M".into()), Disk::File("64".into())));
        for text in ["M", "0M", "99999999999999G", "99999999999999999999999G"] {
            text.parse::<Disk>().expect_err(text);
        }
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("d");
        std::fs::write(&file, [0; 1000]).expect("written");
        let error = Disk::File(file.clone()).image().expect_err("odd size").to_string();
        assert!(error.contains("multiple of 512") && error.contains("64M"), "{error}");
        std::fs::write(&file, [0; 1024]).expect("written");
        assert_eq!(Disk::File(file).image().expect("fine").size, 1024);
    }
}
