//! `cargo xtask vm`: one VM in this terminal, with a shell on its console.
//!
//! The manual steps of virtio-vhost-user, command for command, in two terminals: the device VM and its proxy in one,
//! the sibling VM in the other.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::children;
use crate::e2e::{ProxyPlan, Setup, SetupOptions, runs};
use crate::image::{OverlayEntry, with_overlay};
use crate::leftover::RUN_VARIABLE;
use crate::progress::Progress;
use crate::rundir::RunDir;
use crate::scenario::{Addr, Iommu, Slot};
use crate::vm::args::{Config, Device, Guest, Serial, arguments};
use crate::vm::proxy::Proxy;

/// How long a proxy may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How often to look whether the VM has ended or a signal came.
const LOOK: Duration = Duration::from_millis(100);

/// Options of `cargo xtask vm`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Role {
    /// The VM with the back-end: a vvu device, and its proxy, which lives as long as the VM
    Device(DeviceOptions),
    /// The VM with the front-end
    Sibling(SiblingOptions),
}

/// Options of `cargo xtask vm device`.
#[derive(Debug, clap::Args)]
pub(crate) struct DeviceOptions {
    /// vhost-user socket to make for the sibling, and the PCI address of the vvu device
    #[arg(long, value_name = "SOCKET[,addr=BDF]")]
    vvu_proxy: VvuProxy,
    /// RAM of the sibling in MiB, which the proxy provides
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    sibling_memory: u64,
    /// IOMMU in front of the devices
    #[arg(long, value_enum, default_value_t = Iommu::Virtio)]
    iommu: Iommu,
    #[command(flatten)]
    common: Common,
}

/// Options of `cargo xtask vm sibling`.
#[derive(Debug, clap::Args)]
pub(crate) struct SiblingOptions {
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
    #[command(flatten)]
    setup: SetupOptions,
}

/// `SOCKET[,addr=BDF]`.
#[derive(Debug, Clone)]
struct VvuProxy {
    socket: PathBuf,
    slot: Slot,
}

impl std::str::FromStr for VvuProxy {
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

/// Runs `cargo xtask vm`: ends when the VM does, with the exit code of its QEMU.
///
/// # Errors
///
/// The set-up fails, or something cannot be started.
pub(crate) fn main(role: &Role) -> Result<ExitCode> {
    match role {
        Role::Device(options) => device(options),
        Role::Sibling(options) => sibling(options),
    }
}

fn device(options: &DeviceOptions) -> Result<ExitCode> {
    let (setup, run) = set_up("vm-device", &options.common)?;
    let VvuProxy { socket, slot } = &options.vvu_proxy;
    let plan = ProxyPlan {
        slot: *slot,
        vfio_user: with_suffix(socket, ".vfio"),
        vhost_user: socket.clone(),
        memory_link: memory_link(socket),
        memory_mib: options.sibling_memory,
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
    let code = options.common.run(&setup, &run, &config)?;
    proxy.stop()?;
    Ok(code)
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
    let socket = socket.display().to_string();
    let device = Device::VhostUserBlk { slot: Slot::DEFAULT, socket, queues: 1, reconnect_ms: 0 };
    let config = Config {
        name: "sibling".to_owned(),
        memory_file: Some(link.display().to_string()),
        devices: vec![device],
        ..options.common.config()
    };
    options.common.run(&setup, &run, &config)
}

fn set_up(name: &str, common: &Common) -> Result<(Setup, RunDir)> {
    let setup = Setup::obtain(&common.setup, &Progress::new(false))?;
    Ok((setup, RunDir::create(&runs(), name)?))
}

impl Common {
    fn config(&self) -> Config {
        Config { memory_mib: self.memory, cpus: 1, cmdline: self.params.join(" "), ..Config::default() }
    }

    /// Runs the VM in this terminal.
    fn run(&self, setup: &Setup, run: &RunDir, config: &Config) -> Result<ExitCode> {
        let mut initramfs = setup.base.path.clone();
        if !self.overlay.is_empty() {
            initramfs = run.file("overlay.cpio");
            let trees: Vec<_> = self.overlay.iter().map(|tree| OverlayEntry::Tree(tree.clone())).collect();
            with_overlay(&setup.base, &trees, &initramfs)?;
        }
        let guest = Guest {
            accelerator: setup.accelerator.kind,
            kernel: &setup.kernel.vmlinux,
            initramfs: &initramfs,
        };
        let args = arguments(config, guest, Serial::Terminal)?;
        // In our own process group, as QEMU reads the terminal; so a signal to us has to be passed on.
        let mut qemu = setup.qemu.command().args(args).spawn().context("cannot start QEMU")?;
        let status = loop {
            if let Some(status) = qemu.try_wait().context("cannot wait for QEMU")? {
                break status;
            }
            if children::interrupted() {
                qemu.kill().context("cannot end QEMU")?;
            }
            std::thread::sleep(LOOK);
        };
        Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
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
}
