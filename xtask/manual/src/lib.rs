//! `cargo xtask vm`: runs one VM in this terminal, with a shell on its console.
//!
//! Two terminals follow the manual steps of virtio-vhost-user command by command: one holds the device VM and its
//! proxy, the other the sibling VM. `--exec` does the same for scripts.

mod run;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vvu_artifacts::image::{DiskImage, OverlayEntry, Pattern, with_overlay};
use vvu_process::interrupt;
use vvu_process::progress::Progress;
use vvu_testvm::memory::{ensure_files_fit, ensure_free};
use vvu_testvm::{
    Addr, BlockFrontend, Boot, Device, Express, Frontend, Iommu, KernelId, Lab, Needs, ProxyConfig, RunDir,
    Setup, SetupOptions, Slot, VmConfig, runs,
};

/// vhost queues of the vvu device: enough for any front-end that a person tries.
const QUEUES: u16 = 16;
/// Descriptors of the disk's queues. crosvm's back-end announces requests of up to 254 pieces and takes no indirect
/// descriptors: with QEMU's 128 a large one would never fit.
const QUEUE_SIZE: u16 = 256;
/// Where `--disk` is in the guest.
const DISK_PATH: &str = "/disk.img";

/// Options of `cargo xtask vm`.
#[derive(Debug, clap::Subcommand)]
pub enum Role {
    /// Run the VM with the back-end: it has a vvu device, whose proxy lives as long as the VM
    Device(DeviceOptions),
    /// Run the VM with the front-end
    Sibling(SiblingOptions),
}

/// Options of `cargo xtask vm device`.
#[derive(Debug, clap::Args)]
pub struct DeviceOptions {
    /// vhost-user socket to make for the sibling, and PCI address of the vvu device
    #[arg(long, value_name = "SOCKET[,addr=BDF]")]
    vvu_proxy: VvuProxy,
    /// RAM of the sibling in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    sibling_memory: u64,
    /// Whether the VM has an express device, through which its guest notifies the sibling without the proxy
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    express: bool,
    /// Give the VM the sibling's memory as persistent memory too; its kernel needs --kernel-fragment window
    #[arg(long)]
    window: bool,
    /// IOMMU in front of the devices [default: virtio-iommu; intel-iommu with a distribution's kernel]
    #[arg(long, value_enum)]
    iommu: Option<Iommu>,
    /// Disk image to put into the VM as /disk.img: a file, or a size such as 64M for an empty image
    #[arg(long, value_name = "FILE|SIZE")]
    disk: Option<Disk>,
    #[command(flatten)]
    common: Common,
}

/// Options of `cargo xtask vm sibling`.
#[derive(Debug, clap::Args)]
pub struct SiblingOptions {
    /// vhost-user socket of the block back-end: the --vvu-proxy of the device VM
    #[arg(long, value_name = "SOCKET")]
    vhost_user_blk: PathBuf,
    /// Request queues of the disk; the vvu device carries 16
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES)))]
    queues: u16,
    /// Descriptors of each queue, a power of two; at least two more than the pieces of the back-end's longest request
    #[arg(long, value_name = "N", default_value_t = QUEUE_SIZE)]
    queue_size: u16,
    /// The device VM has --window
    #[arg(long)]
    window: bool,
    #[command(flatten)]
    common: Common,
}

/// Options of both.
#[derive(Debug, clap::Args)]
struct Common {
    /// RAM in MiB
    #[arg(short, long, value_name = "MIB", default_value_t = 512)]
    memory: u64,
    /// VMM that runs the VM, by its name in guest-images/versions.json [default: QEMU]
    #[arg(long, value_name = "NAME", conflicts_with_all = ["qemu", "prepared"])]
    vmm: Option<String>,
    /// Words to add to the kernel command line
    #[arg(short, long, value_name = "WORDS")]
    params: Vec<String>,
    /// Directory whose tree is laid over the VM's root
    #[arg(long, value_name = "DIR")]
    overlay: Vec<PathBuf>,
    /// Run a shell command in the VM in place of a shell on its console, print its output, shut the VM down and end with
    /// the command's exit code
    #[arg(long, value_name = "COMMAND")]
    exec: Option<String>,
    /// Seconds that --exec may take, including the boot
    #[arg(long, value_name = "SECONDS", default_value_t = 600, requires = "exec",
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    #[command(flatten)]
    setup: SetupOptions,
}

impl SiblingOptions {
    /// The disk.
    fn frontend(&self) -> Result<Frontend> {
        let (queues, queue_size) = (self.queues, Some(self.queue_size));
        let frontend = Frontend::Block(BlockFrontend { queues, queue_size, ..BlockFrontend::default() });
        frontend.check()?;
        Ok(frontend)
    }
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
    /// An empty image of so many bytes.
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

/// Runs `cargo xtask vm`: returns when the VM has ended, with the exit code of its QEMU or of the command of `--exec`.
///
/// # Errors
///
/// Fails if the set-up cannot be made or the VM or its proxy cannot be started.
pub fn main(role: &Role) -> Result<ExitCode> {
    match role {
        Role::Device(options) => device(options),
        Role::Sibling(options) => sibling(options),
    }
}

fn device(options: &DeviceOptions) -> Result<ExitCode> {
    if let Some(disk) = &options.disk {
        ensure_files_fit("device", options.common.memory, disk.image()?.size)?;
    }
    let (setup, run) = set_up("vm-device", &options.common)?;
    let lab = Lab::new(&run, &setup)?;
    let VvuProxy { socket, slot } = &options.vvu_proxy;
    let express = Slot::last_free(|free| free == *slot).context("a bus has more than one slot")?;
    let vvu = ProxyConfig {
        slot: *slot,
        vfio_user: with_suffix(socket, ".vfio"),
        vhost_user: socket.clone(),
        express: options.express.then(|| Express { slot: express, socket: with_suffix(socket, ".express") }),
        memory_link: memory_link(socket),
        queues: QUEUES.into(),
        window: options.window,
        ..ProxyConfig::new("vvu", options.sibling_memory, lab.sockets())
    };
    let mut devices = vvu.devices();
    if options.window {
        let free = Device::last_free_slot(&devices).context("a bus has more than two slots")?;
        devices.push(vvu.window_device(free, options.sibling_memory));
    }
    let proxy = lab.proxy(&vvu)?;
    let iommu =
        options.iommu.map_or_else(|| setup.kernel(&KernelId::default()).map(Iommu::default_for), Ok)?;
    let config = VmConfig { iommu: Some(iommu), devices, ..options.common.config("device") };
    let code = options.common.run(&lab, &config, options.disk.as_ref());
    if interrupt::requested() {
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
    let lab = Lab::new(&run, &setup)?;
    // The proxy runs in the other terminal.
    let vvu = ProxyConfig {
        vhost_user: socket,
        memory_link: link,
        window: options.window,
        ..ProxyConfig::new("vvu", options.common.memory, lab.sockets())
    };
    let config = VmConfig {
        memory_file: Some(vvu.memory_file()),
        memory_offset_mib: vvu.memory_offset_mib(),
        devices: vec![vvu.vhost_user_device(options.frontend()?)],
        ..options.common.config("sibling")
    };
    options.common.run(&lab, &config, None)
}

fn set_up(name: &str, common: &Common) -> Result<(Setup, RunDir)> {
    ensure_free(common.memory, 1)?;
    let needs = Needs { vmms: common.vmm.clone().into_iter().collect(), ..Needs::default() };
    let setup = Setup::obtain(&common.setup, &needs, &Progress::new(false))?;
    Ok((setup, RunDir::create(&runs(), name)?))
}

impl Common {
    fn config(&self, name: &str) -> VmConfig {
        let (vmm, cmdline) = (self.vmm.clone(), self.params.join(" "));
        VmConfig { vmm, cmdline, ..VmConfig::new(name, self.memory) }
    }

    /// Runs the VM until it ends.
    fn run(&self, lab: &Lab<'_>, config: &VmConfig, disk: Option<&Disk>) -> Result<ExitCode> {
        let mut overlay: Vec<_> = self.overlay.iter().map(|tree| OverlayEntry::Tree(tree.clone())).collect();
        if let Some(disk) = disk {
            overlay.push(OverlayEntry::Disk { path: DISK_PATH.to_owned(), image: disk.image()? });
        }
        overlay.extend(lab.setup().kernel_modules(&KernelId::default(), config)?);
        let mut boot = lab.plain()?;
        let file = lab.run().file("overlay.cpio");
        if !overlay.is_empty() {
            with_overlay(&lab.setup().base, &overlay, &file)?;
            boot = Boot { initramfs: &file, ..boot };
        }
        match &self.exec {
            Some(command) => {
                run::exec(lab, config, boot, command, Instant::now() + Duration::from_secs(self.timeout))
            }
            None => run::terminal(lab, config, boot),
        }
    }
}

/// The link to the sibling memory file: its name follows from the socket, so that one option names both.
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
    fn a_siblings_disk_has_long_queues_unless_told_otherwise() {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            options: SiblingOptions,
        }
        let frontend = |words: &[&str]| {
            let words = ["sibling", "--vhost-user-blk", "s"].iter().chain(words);
            <Cli as clap::Parser>::try_parse_from(words).map(|cli| cli.options.frontend())
        };
        let block = |queues, size| {
            Frontend::Block(BlockFrontend { queues, queue_size: Some(size), ..BlockFrontend::default() })
        };
        assert_eq!(frontend(&[]).expect("parsed").expect("valid"), block(1, 256));
        let given = frontend(&["--queues", "4", "--queue-size", "128"]).expect("parsed");
        assert_eq!(given.expect("valid"), block(4, 128));
        frontend(&["--queue-size", "100"]).expect("parsed").expect_err("no power of two");
        assert!(frontend(&["--queues", "17"]).is_err());
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
