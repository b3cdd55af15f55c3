//! The disk of a sibling VM, served in different ways.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use regex::Regex;
use serde_json::Value;
use tempfile::TempDir;
use vvu_init::protocol::{End, READY_LINE};

use vvu_process::children;
use vvu_process::interrupt;
use vvu_process::progress::Progress;
use vvu_testvm::leftover;
use vvu_testvm::rundir::{RunDir, SocketDir};
use vvu_testvm::setup::{KernelId, Setup};
use vvu_testvm::vm::ProxyPlan;
use vvu_testvm::vm::args::{Config, Device, Guest, Serial, arguments};
use vvu_testvm::vm::proxy::Proxy;
use vvu_testvm::vm::{Frontend, Iommu, Slot};
use vvu_testvm::vm::{Logs, Vm, ending, printed};

use super::Options;
use super::back_end::BackEnd;
use super::results::{Bench, Better, Key};
use super::usage::Usage;

/// Size of the disk.
pub(super) const DISK_MIB: u64 = 64;
/// RAM of each VM.
pub(super) const MEMORY_MIB: u64 = 512;
/// Time for anything but a test, at native speed.
const LIMIT: Duration = Duration::from_secs(30);
/// How much longer than asked for a test may take, at native speed.
const GRACE: Duration = Duration::from_secs(5);
/// QEMU's daemon, looked for in `PATH`.
pub(super) const STORAGE_DAEMON: &str = "qemu-storage-daemon";
/// Appears when the sibling has its disk.
const VDA: &str = r"virtio_blk virtio\d+: \[vda\] \d+ 512-byte logical blocks";

/// The tests, the rate that each is about, and how `vvu-load` takes them.
const TESTS: [(&str, &str, &str); 5] = [
    ("randread-4k-depth1", "iops", "--pattern randread --block 4096 --depth 1"),
    ("randread-4k-depth32", "iops", "--pattern randread --block 4096 --depth 32"),
    ("randwrite-4k-depth1", "iops", "--pattern randwrite --block 4096 --depth 1"),
    ("randwrite-4k-depth32", "iops", "--pattern randwrite --block 4096 --depth 32"),
    ("read-128k-depth8", "mb_per_s", "--pattern read --block 131072 --depth 8"),
];
/// Gives every block of the disk, which is all hole at first, a content of its own.
const FILL: &str = "dd if=/dev/urandom of=/dev/vda bs=1M conv=fsync 2>&1 | tail -n 1";
/// Before the first test: under TCG the code of every guest on the path has yet to be translated.
const WARM_UP: &str = "vvu-load measure --file /dev/vda --seconds 1 --seed 2 --pattern randread";
/// What is taken of `vvu-load`'s output beside the rate.
const LATENCIES: [&str; 2] = ["latency_p50_us", "latency_p99_us"];

/// Who serves the sibling's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Variant {
    /// `vvu device block` in the device VM.
    Vvu,
    /// `vvu device block` on the host.
    Plain,
    /// QEMU's storage daemon on the host.
    StorageDaemon(PathBuf),
    /// The sibling's own QEMU.
    Qemu,
}

impl Variant {
    fn name(&self) -> &'static str {
        match self {
            Self::Vvu => "vvu",
            Self::Plain => "plain",
            Self::StorageDaemon(_) => "qsd",
            Self::Qemu => "qemu",
        }
    }
}

/// Measures all variants in turns.
pub(super) fn measure(
    options: &Options,
    setup: &Setup,
    run: &RunDir,
    progress: &Progress,
    bench: &mut Bench,
) -> Result<()> {
    let mut variants = vec![Variant::Vvu, Variant::Plain, Variant::Qemu];
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path).map(|dir| dir.join(STORAGE_DAEMON)).find(|path| path.is_file()) {
        Some(program) => variants.push(Variant::StorageDaemon(program)),
        None => bench.skip("qsd", format!("there is no {STORAGE_DAEMON} in PATH")),
    }
    if !options.only.is_empty() {
        variants.retain(|variant| options.only.iter().any(|name| name == variant.name()));
    }
    let lab = Lab::new(options.seconds, options.poll_us, setup, run, progress)?;
    for round in 1..=options.rounds {
        bench.add(round, start_up("launch-to-vda"), Better::Lower, "bare-boot", lab.bare_boot()?);
        // Each goes first once in as many rounds as there are variants.
        variants.rotate_left(1);
        for variant in &variants {
            let name = variant.name();
            let stage = progress.stage(format!("{name} {round}"));
            match lab.variant(variant, |text| stage.update(text)) {
                Ok(figures) => {
                    for (key, better, value) in figures {
                        bench.add(round, key, better, name, value);
                    }
                    stage.done("");
                }
                Err(error) if children::interrupted() => return Err(error),
                // The rest is worth its time all the same.
                Err(error) => bench.skip(&format!("{name} in round {round}"), format!("{error:#}")),
            }
        }
    }
    leftover::check(&run.id(), &[]).map(drop)
}

fn start_up(test: &str) -> Key {
    Key { group: "start-up".into(), test: test.into(), metric: "seconds".into() }
}

/// A value of one round.
type Figure = (Key, Better, f64);

/// What all rounds share.
struct Lab<'a> {
    seconds: u64,
    poll_us: Option<u32>,
    setup: &'a Setup,
    run: &'a RunDir,
    sockets: SocketDir,
    /// Where the host's back-ends have their disk.
    disks: TempDir,
}

impl<'a> Lab<'a> {
    fn new(
        seconds: u64,
        poll_us: Option<u32>,
        setup: &'a Setup,
        run: &'a RunDir,
        progress: &Progress,
    ) -> Result<Self> {
        let stage = progress.stage("disks");
        // In memory like the device VM's, so that no host disk takes part.
        let shm = Path::new("/dev/shm");
        let disks = if shm.is_dir() { TempDir::with_prefix_in("vvu-bench-", shm) } else { TempDir::new() };
        let disks = disks.context("cannot make a directory for the disks")?;
        stage.done(format!("those of the host in {}", disks.path().display()));
        Ok(Self { seconds, poll_us, setup, run, sockets: SocketDir::for_run(run)?, disks })
    }

    fn deadline(&self) -> Instant {
        Instant::now() + LIMIT * self.setup.slowness
    }

    fn launch(&self, config: &Config) -> Result<Vm> {
        let name = &config.name;
        let logs = Logs {
            console: self.run.file(&format!("{name}-console.log")),
            qemu: self.run.file(&format!("{name}-qemu.log")),
        };
        let guest = Guest {
            accelerator: self.setup.accelerator.kind,
            kernel: &self.setup.kernel(&KernelId::default())?.vmlinux,
            initramfs: &self.setup.base.path,
        };
        let args = arguments(config, guest, Serial::Inherited(&logs.console))?;
        let mut command = self.setup.qemu.command();
        command.args(args).env(leftover::RUN_VARIABLE, self.run.id());
        Vm::launch(name, command, logs)
    }

    /// Seconds from the launch of a VM without devices to the first line of its init.
    fn bare_boot(&self) -> Result<f64> {
        let mut vm = self.launch(&config("bare"))?;
        let pattern = Regex::new(&regex::escape(READY_LINE))?;
        vm.wait_for(&pattern, self.deadline(), &mut interrupt::check)?;
        let seconds = vm.launched().elapsed().as_secs_f64();
        vm.end();
        Ok(seconds)
    }

    fn variant(&self, variant: &Variant, update: impl Fn(String)) -> Result<Vec<Figure>> {
        update("starting".to_owned());
        let mut served = self.serve(variant)?;
        let sibling = Config {
            memory_file: served.memory.clone(),
            devices: vec![served.device.clone()],
            ..config("sibling")
        };
        let mut sibling = self.launch(&sibling)?;
        let started = served.device_vm.as_ref().map_or(sibling.launched(), Vm::launched);
        let vda = Regex::new(VDA)?;
        sibling.wait_for(&vda, self.deadline(), &mut || served.look())?;
        let launched = started.elapsed();
        let mut figures = std::mem::take(&mut served.figures);
        figures.push((start_up("launch-to-vda"), Better::Lower, launched.as_secs_f64()));

        let mut processes = served.processes();
        processes.push(("sibling", sibling.id()));
        sibling.ready(self.deadline(), &mut || served.look())?;
        for command in [FILL, WARM_UP] {
            run(&mut sibling, command, LIMIT * self.setup.slowness, &mut || served.look())?;
        }
        for (test, rate, options) in TESTS {
            update(test.to_owned());
            let key = |metric: &str| Key { group: "vms".into(), test: test.into(), metric: metric.into() };
            let command =
                format!("vvu-load measure --file /dev/vda --seconds {} --seed 1 {options}", self.seconds);
            let usage = || processes.iter().map(|(_, id)| Usage::of(*id)).collect::<Vec<_>>();
            let before = usage();
            let limit = Duration::from_secs(self.seconds) + GRACE * self.setup.slowness;
            let output = run(&mut sibling, &command, limit, &mut || served.look())?;
            let used: Vec<_> = usage().iter().zip(&before).map(|(now, before)| now.since(*before)).collect();
            let line = output.lines().next_back().unwrap_or_default();
            let got: Value =
                serde_json::from_str(line).with_context(|| format!("`{command}` printed {line:?}"))?;
            let figure = |name: &str| got[name].as_f64().with_context(|| format!("no {name} in {line}"));
            figures.push((key(rate), Better::Higher, figure(rate)?));
            for metric in LATENCIES {
                figures.push((key(metric), Better::Lower, figure(metric)?));
            }
            let requests = figure("requests")?;
            let all: Usage = used.iter().copied().sum();
            figures.push((key("host_cpu_per_request_us"), Better::Lower, all.cpu_us / requests));
            figures.push((key("host_wake_ups_per_request"), Better::Lower, all.wake_ups / requests));
            for ((process, _), used) in processes.iter().zip(&used) {
                let key = |metric: &str| key(&format!("{process}_{metric}"));
                figures.push((key("cpu_per_request_us"), Better::Lower, used.cpu_us / requests));
                figures.push((key("wake_ups_per_request"), Better::Lower, used.wake_ups / requests));
            }
        }
        sibling.end();
        served.end()?;
        Ok(figures)
    }

    /// Starts whatever serves the disk.
    fn serve(&self, variant: &Variant) -> Result<Served> {
        let socket = self.sockets.socket(&format!("{}.vhost", variant.name()));
        let over = |socket: &Path| Device::VhostUser {
            slot: Slot::DEFAULT,
            socket: socket.display().to_string(),
            frontend: Frontend::default(),
            reconnect_ms: 0,
        };
        let log = self.run.file(&format!("back-end-{}.log", variant.name()));
        let mut back_end = match variant {
            Variant::Vvu => return self.serve_in_vm(&socket, over(&socket)),
            Variant::Qemu => {
                let file = self.disk_file()?.display().to_string();
                return Ok(Served::new(Device::VirtioBlk { slot: Slot::DEFAULT, file }));
            }
            Variant::Plain => {
                let program = &self.setup.binaries.vvu;
                let block = self.block(&self.disk_file()?);
                BackEnd::vvu(program, &block, &socket, &self.run.id(), log)?
            }
            Variant::StorageDaemon(program) => {
                BackEnd::storage_daemon(program, &self.disk_file()?, &socket, &self.run.id(), log)?
            }
        };
        back_end.ready(self.deadline())?;
        Ok(Served { back_end: Some(back_end), ..Served::new(over(&socket)) })
    }

    /// A fresh file: the tests of the last variant wrote to it.
    fn disk_file(&self) -> Result<PathBuf> {
        let path = self.disks.path().join("disk.img");
        let made = File::create(&path).and_then(|file| file.set_len(DISK_MIB << 20));
        made.with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    /// The words after `vvu` for our own back-end with the disk in `file`, but for its place.
    fn block(&self, file: &Path) -> Vec<String> {
        let mut words = ["device", "block", "--file"].map(str::to_owned).to_vec();
        words.push(file.display().to_string());
        words.extend(self.poll_us.map(|poll| format!("--poll-us={poll}")));
        words
    }

    fn serve_in_vm(&self, socket: &Path, device: Device) -> Result<Served> {
        let plan = ProxyPlan {
            slot: Slot::DEFAULT,
            vfio_user: self.sockets.socket("vvu.vfio"),
            vhost_user: socket.to_owned(),
            memory_link: self.sockets.socket("vvu.mem"),
            memory_mib: Some(MEMORY_MIB),
            huge_pages: false,
            trace: None,
            queues: 1,
        };
        let words = plan.words(&self.setup.binaries.vvu);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).env(leftover::RUN_VARIABLE, self.run.id());
        let mut proxy = Proxy::start("vvu", command, self.run.file("proxy-vvu.log"))?;
        proxy.ready(self.deadline())?;
        let config = Config {
            iommu: Some(Iommu::Virtio),
            devices: vec![Device::Vvu { slot: Slot::DEFAULT, socket: plan.vfio_user.display().to_string() }],
            ..config("device")
        };
        let mut vm = self.launch(&config)?;
        let bdf = Slot::DEFAULT;
        vm.ready(self.deadline(), &mut || proxy.look())?;
        let mut figures = Vec::new();
        let mut stage = |test: &str, vm: &Vm| {
            figures.push((start_up(test), Better::Lower, vm.launched().elapsed().as_secs_f64()));
        };
        stage("launch-to-device-vm", &vm);
        let bind = format!(
            "cd /sys/bus/pci && echo vfio-pci > devices/{bdf}/driver_override && \
             echo {bdf} > drivers/virtio-pci/unbind && echo {bdf} > drivers/vfio-pci/bind && \
             truncate -s {DISK_MIB}M /disk.img"
        );
        run(&mut vm, &bind, LIMIT * self.setup.slowness, &mut || proxy.look())?;
        let serve = ["vvu".to_owned()].into_iter().chain(self.block(Path::new("/disk.img")));
        let serve = serve.chain(["--vfio".to_owned(), bdf.to_string()]).collect::<Vec<_>>().join(" ");
        vm.spawn("backend", &serve, 0, self.deadline(), &mut || proxy.look())?;
        let ready = Regex::new(r"^\[backend\] .*ready")?;
        vm.wait_for(&ready, self.deadline(), &mut || proxy.look())?;
        stage("launch-to-back-end", &vm);
        let memory = Some(plan.memory_link.display().to_string());
        Ok(Served { memory, figures, proxy: Some(proxy), device_vm: Some(vm), ..Served::new(device) })
    }
}

fn config(name: &str) -> Config {
    Config { name: name.to_owned(), memory_mib: MEMORY_MIB, cpus: 1, ..Config::default() }
}

/// Runs a command in a guest, which must end well, and returns what it printed.
fn run(vm: &mut Vm, command: &str, limit: Duration, look: &mut dyn FnMut() -> Result<()>) -> Result<String> {
    let exit = vm.run(command, limit, look)?;
    if exit.end != End::Code(0) {
        bail!("{}: `{command}` ended with {}{}", vm.name(), ending(exit.end), printed(&exit.output));
    }
    Ok(exit.output.stdout)
}

/// What serves the sibling's disk.
struct Served {
    /// The sibling's device.
    device: Device,
    /// The sibling's RAM, if it is not its own.
    memory: Option<String>,
    /// How long it took to start.
    figures: Vec<Figure>,
    // In this order they end.
    device_vm: Option<Vm>,
    proxy: Option<Proxy>,
    back_end: Option<BackEnd>,
}

impl Served {
    fn new(device: Device) -> Self {
        Self { device, memory: None, figures: Vec::new(), device_vm: None, proxy: None, back_end: None }
    }

    fn look(&mut self) -> Result<()> {
        interrupt::check()?;
        self.proxy.as_mut().map_or(Ok(()), Proxy::look)?;
        self.device_vm.as_mut().map_or(Ok(()), Vm::look)
    }

    /// Every process on the host that takes part, but the sibling's QEMU.
    fn processes(&self) -> Vec<(&'static str, u32)> {
        let vm = self.device_vm.as_ref().map(|vm| ("device_vm", vm.id()));
        let proxy = self.proxy.as_ref().map(|proxy| ("proxy", proxy.id()));
        let back_end = self.back_end.as_ref().map(|back_end| ("back_end", back_end.id()));
        vm.into_iter().chain(proxy).chain(back_end).collect()
    }

    fn end(mut self) -> Result<()> {
        if let Some(vm) = &mut self.device_vm {
            vm.end();
        }
        self.proxy.as_mut().map_or(Ok(()), Proxy::stop)
    }
}
