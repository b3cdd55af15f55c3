//! Measures the disk of a sibling VM, served in different ways.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use regex::Regex;
use serde_json::Value;
use tempfile::TempDir;
use vvu_process::interrupt;
use vvu_process::progress::Progress;
use vvu_testvm::{Device, Frontend, Iommu, KernelId, Lab, Process, ProxyConfig, Slot, Vm, VmConfig};

use super::back_end::{BackEnd, STORAGE_DAEMON};
use super::options::Options;
use super::results::{Better, Key, Results};
use super::usage::{self, Usage};

/// Size of the disk in MiB.
pub(super) const DISK_MIB: u64 = 64;
/// RAM of each VM in MiB.
pub(super) const MEMORY_MIB: u64 = 512;
/// How long anything but a test may take, at native speed.
const LIMIT: Duration = Duration::from_secs(30);
/// How much longer than its seconds a test may take, at native speed.
const GRACE: Duration = Duration::from_secs(5);

/// The tests: name, rate that is measured, options of `vvu-load`.
const TESTS: [(&str, &str, &str); 5] = [
    ("randread-4k-depth1", "iops", "--pattern randread --block 4096 --depth 1"),
    ("randread-4k-depth32", "iops", "--pattern randread --block 4096 --depth 32"),
    ("randwrite-4k-depth1", "iops", "--pattern randwrite --block 4096 --depth 1"),
    ("randwrite-4k-depth32", "iops", "--pattern randwrite --block 4096 --depth 32"),
    ("read-128k-depth8", "mb_per_s", "--pattern read --block 131072 --depth 8"),
];
/// Writes different data to every block of the disk, which is empty at first.
const FILL: &str = "dd if=/dev/urandom of=/dev/vda bs=1M conv=fsync 2>&1 | tail -n 1";
/// Runs before the first test, so that TCG has translated the code of all guests on the path.
const WARM_UP: &str = "vvu-load measure --file /dev/vda --seconds 1 --seed 2 --pattern randread";
/// Latencies in the output of `vvu-load`.
const LATENCIES: [&str; 2] = ["latency_p50_us", "latency_p99_us"];

/// Time from the launch of the first VM until the sibling's kernel has its disk.
const LAUNCH: &str = "launch-to-vda";
/// The same if both VMs boot at the same time and the disk is attached to the running sibling.
const ATTACHED_LAUNCH: &str = "attached-launch-to-vda";

/// Succeeds if the guest's kernel notices a disk that is attached.
const HOT_PLUG: &str = "zcat /proc/config.gz | grep -q ^CONFIG_HOTPLUG_PCI_ACPI=y";

/// What serves the sibling's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Variant {
    /// `vvu device block` in the device VM, with the express device.
    Vvu,
    /// The same without: all notifications take the proxy.
    VvuNoExpress,
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
            Self::VvuNoExpress => "vvu-no-express",
            Self::Plain => "plain",
            Self::StorageDaemon(_) => "qsd",
            Self::Qemu => "qemu",
        }
    }
}

/// Measures all variants in each round.
///
/// # Errors
///
/// Fails on a signal and if a bare VM does not boot. A variant that fails is added to what was not measured.
pub(super) fn measure(
    options: &Options,
    lab: &Lab<'_>,
    progress: &Progress,
    results: &mut Results,
) -> Result<()> {
    let mut variants = vec![Variant::Vvu, Variant::VvuNoExpress, Variant::Plain, Variant::Qemu];
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path).map(|dir| dir.join(STORAGE_DAEMON)).find(|path| path.is_file()) {
        Some(program) => variants.push(Variant::StorageDaemon(program)),
        None => results.skip("qsd", format!("there is no {STORAGE_DAEMON} in PATH")),
    }
    if !options.only.is_empty() {
        variants.retain(|variant| options.only.iter().any(|name| name == variant.name()));
    }
    let comparison = Comparison::new(options, lab, progress)?;
    for round in (options.first_round..).take(usize::try_from(options.rounds)?) {
        let bare_boot = lab.bare_boot(lab.plain()?)?.as_secs_f64();
        for test in [LAUNCH, ATTACHED_LAUNCH] {
            results.add(round, start_up(test), Better::Lower, "bare-boot", bare_boot);
        }
        // Over the rounds each variant goes first equally often.
        let first = usize::try_from(round)? % variants.len();
        if variants.contains(&Variant::Vvu) {
            let stage = progress.stage(format!("attached {round}"));
            match comparison.attached() {
                Ok(figures) => {
                    for (key, better, value) in figures {
                        results.add(round, key, better, Variant::Vvu.name(), value);
                    }
                    stage.done("");
                }
                Err(error) if interrupt::requested() => return Err(error),
                Err(error) => results.skip(&format!("attached in round {round}"), format!("{error:#}")),
            }
        }
        for variant in variants[first..].iter().chain(&variants[..first]) {
            let name = variant.name();
            let stage = progress.stage(format!("{name} {round}"));
            match comparison.variant(variant, |text| stage.update(text)) {
                Ok(figures) => {
                    for (key, better, value) in figures {
                        results.add(round, key, better, name, value);
                    }
                    stage.done("");
                }
                Err(error) if interrupt::requested() => return Err(error),
                // The other variants are worth measuring all the same.
                Err(error) => results.skip(&format!("{name} in round {round}"), format!("{error:#}")),
            }
        }
        results.write(lab.run())?;
    }
    lab.check_leftovers().map(drop)
}

fn start_up(test: &str) -> Key {
    Key { group: "start-up".into(), test: test.into(), metric: "seconds".into() }
}

/// A value of one round.
type Figure = (Key, Better, f64);

/// What all variants and rounds share.
struct Comparison<'a> {
    seconds: u64,
    poll_us: Option<u32>,
    lab: &'a Lab<'a>,
    /// Directory for the disks of back-ends on the host.
    disks: TempDir,
}

impl<'a> Comparison<'a> {
    fn new(options: &Options, lab: &'a Lab<'a>, progress: &Progress) -> Result<Self> {
        let stage = progress.stage("disks");
        // In memory, as the device VM's disk is, so that no disk of the host takes part.
        let shm = Path::new("/dev/shm");
        let disks = if shm.is_dir() { TempDir::with_prefix_in("vvu-bench-", shm) } else { TempDir::new() };
        let disks = disks.context("cannot make a directory for the disks")?;
        stage.done(format!("those of the host in {}", disks.path().display()));
        Ok(Self { seconds: options.seconds, poll_us: options.poll_us, lab, disks })
    }

    fn variant(&self, variant: &Variant, update: impl Fn(String)) -> Result<Vec<Figure>> {
        update("starting".to_owned());
        let mut served = self.serve(variant)?;
        let sibling = self.lab.vm(&VmConfig {
            memory_file: served.memory.clone(),
            devices: vec![served.device.clone()],
            ..VmConfig::new("sibling", MEMORY_MIB)
        })?;
        let started = served.device_vm.as_ref().map_or(sibling.launched(), Vm::launched);
        let disk = served.device.announcement().context("the sibling has no disk")?;
        sibling.wait_for(&Regex::new(disk)?, self.lab.deadline(LIMIT))?;
        let launched = started.elapsed();
        let mut figures = std::mem::take(&mut served.figures);
        figures.push((start_up(LAUNCH), Better::Lower, launched.as_secs_f64()));

        let mut processes = served.processes();
        processes.push(("sibling", sibling.id()));
        sibling.ready(self.lab.deadline(LIMIT))?;
        for command in [FILL, WARM_UP] {
            sibling.run_until(command, self.lab.deadline(LIMIT))?;
        }
        for (test, rate, options) in TESTS {
            update(test.to_owned());
            let key = |metric: &str| Key { group: "vms".into(), test: test.into(), metric: metric.into() };
            let command =
                format!("vvu-load measure --file /dev/vda --seconds {} --seed 1 {options}", self.seconds);
            let usage = || processes.iter().map(|(_, id)| Usage::of(*id)).collect::<Vec<_>>();
            // First, since the commands that count take processor time in the VMs themselves.
            let had = self.interrupts(&sibling, &served)?;
            let before = usage();
            let deadline = self.lab.deadline(GRACE) + Duration::from_secs(self.seconds);
            let output = sibling.run_until(&command, deadline)?;
            let used: Vec<_> = usage().iter().zip(&before).map(|(now, before)| now.since(*before)).collect();
            let had_since = self.interrupts(&sibling, &served)?;
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
            for ((vm, now), (_, before)) in had_since.into_iter().zip(had) {
                let key = key(&format!("{vm}_interrupts_per_request"));
                figures.push((key, Better::Lower, (now - before) / requests));
            }
            for ((process, _), used) in processes.iter().zip(&used) {
                let key = |metric: &str| key(&format!("{process}_{metric}"));
                figures.push((key("cpu_per_request_us"), Better::Lower, used.cpu_us / requests));
                figures.push((key("wake_ups_per_request"), Better::Lower, used.wake_ups / requests));
            }
        }
        drop(sibling);
        served.end()?;
        Ok(figures)
    }

    /// Counts the interrupts so far: those of the sibling's disk, and those of the device VM's vvu device, which are the
    /// sibling's kicks and messages.
    fn interrupts(&self, sibling: &Vm, served: &Served) -> Result<Vec<(&'static str, f64)>> {
        let device_vm = served.device_vm.as_ref().map(|vm| ("device_vm", vm, "vfio-msi"));
        let all = [("sibling", sibling, "virtio")].into_iter().chain(device_vm);
        all.map(|(name, vm, word)| {
            let command = format!("grep {word} /proc/interrupts || true");
            Ok((name, usage::interrupts(&vm.run_until(&command, self.lab.deadline(LIMIT))?)))
        })
        .collect()
    }

    /// Starts whatever serves the disk.
    fn serve(&self, variant: &Variant) -> Result<Served> {
        let mut vvu = ProxyConfig::new(variant.name(), MEMORY_MIB, self.lab.sockets());
        let socket = vvu.vhost_user.clone();
        let device = vvu.vhost_user_device(Frontend::default());
        let log = format!("back-end-{}", variant.name());
        let back_end = match variant {
            Variant::Vvu => return self.serve_in_vm(&vvu, device),
            Variant::VvuNoExpress => {
                vvu.express = None;
                return self.serve_in_vm(&vvu, device);
            }
            Variant::Qemu => {
                let file = self.disk_file()?.display().to_string();
                return Ok(Served::new(Device::VirtioBlk { slot: Slot::DEFAULT, file }));
            }
            Variant::Plain => {
                let words = self.block(&self.disk_file()?);
                BackEnd::vvu(self.lab, &words, &socket, &log)?
            }
            Variant::StorageDaemon(program) => {
                BackEnd::storage_daemon(self.lab, program, &self.disk_file()?, &socket, &log)?
            }
        };
        Ok(Served { back_end: Some(back_end), ..Served::new(device) })
    }

    /// Makes a new file, since the tests of the variant before have written to the old one.
    fn disk_file(&self) -> Result<PathBuf> {
        let path = self.disks.path().join("disk.img");
        let made = File::create(&path).and_then(|file| file.set_len(DISK_MIB << 20));
        made.with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    /// The words after `vvu` for our back-end with the disk in `file`, without the place where it serves.
    fn block(&self, file: &Path) -> Vec<String> {
        let mut words = ["device", "block", "--file"].map(str::to_owned).to_vec();
        words.push(file.display().to_string());
        words.extend(self.poll_us.map(|poll| format!("--poll-us={poll}")));
        words
    }

    /// Measures how long it takes to the disk if both VMs boot at the same time and the disk is attached.
    fn attached(&self) -> Result<Vec<Figure>> {
        let vvu = ProxyConfig::new("attached", MEMORY_MIB, self.lab.sockets());
        let proxy = self.lab.proxy(&vvu)?;
        let figures = self.attach_through(&vvu);
        // It removes its sockets in any case.
        proxy.stop()?;
        figures
    }

    fn attach_through(&self, vvu: &ProxyConfig) -> Result<Vec<Figure>> {
        let device_vm = self.launch_device_vm(vvu)?;
        let config = VmConfig {
            memory_file: Some(vvu.memory_file()),
            attachable: vec![vvu.vhost_user_device(Frontend::default())],
            managed: true,
            ..VmConfig::new("sibling", MEMORY_MIB)
        };
        let sibling = self.lab.vm(&config)?;
        device_vm.ready(self.lab.deadline(LIMIT))?;
        let mut figures = Vec::new();
        let mut stage = |test: &str| {
            let seconds = device_vm.launched().elapsed().as_secs_f64();
            figures.push((start_up(test), Better::Lower, seconds));
        };
        self.start_back_end(&device_vm, vvu)?;
        stage("attached-launch-to-back-end");
        sibling.ready(self.lab.deadline(LIMIT))?;
        stage("attached-launch-to-both");
        sibling
            .run_until(HOT_PLUG, self.lab.deadline(LIMIT))
            .context("the kernel has no hot-plug: add --kernel-fragment hotplug")?;
        let attached = self.lab.attach(&sibling, &config, 0, self.lab.deadline(LIMIT))?;
        let launched = attached.at - device_vm.launched();
        figures.push((start_up(ATTACHED_LAUNCH), Better::Lower, launched.as_secs_f64()));
        Ok(figures)
    }

    fn serve_in_vm(&self, vvu: &ProxyConfig, device: Device) -> Result<Served> {
        let proxy = self.lab.proxy(vvu)?;
        let vm = self.launch_device_vm(vvu)?;
        vm.ready(self.lab.deadline(LIMIT))?;
        let mut figures = Vec::new();
        let mut stage = |test: &str, vm: &Vm| {
            figures.push((start_up(test), Better::Lower, vm.launched().elapsed().as_secs_f64()));
        };
        stage("launch-to-device-vm", &vm);
        self.start_back_end(&vm, vvu)?;
        stage("launch-to-back-end", &vm);
        let memory = Some(vvu.memory_file());
        Ok(Served { memory, figures, proxy: Some(proxy), device_vm: Some(vm), ..Served::new(device) })
    }

    fn launch_device_vm(&self, vvu: &ProxyConfig) -> Result<Vm> {
        let kernel = self.lab.setup().kernel(&KernelId::default())?;
        self.lab.vm(&VmConfig {
            iommu: Some(Iommu::default_for(kernel)),
            devices: vvu.devices(),
            ..VmConfig::new("device", MEMORY_MIB)
        })
    }

    /// Serves a new disk in the device VM and waits until the back-end is ready.
    fn start_back_end(&self, vm: &Vm, vvu: &ProxyConfig) -> Result<()> {
        let bdf = vvu.slot;
        let block = self.block(Path::new("/disk.img")).join(" ");
        // One command for all: each is a round trip over a serial port.
        let serve = format!(
            "cd /sys/bus/pci && echo vfio-pci > devices/{bdf}/driver_override && \
             echo {bdf} > drivers/virtio-pci/unbind && echo {bdf} > drivers/vfio-pci/bind && \
             truncate -s {DISK_MIB}M /disk.img && exec vvu {block} --vfio {bdf}"
        );
        vm.spawn("backend", &serve, 0, self.lab.deadline(LIMIT))?;
        vm.wait_for(&Regex::new(r"^\[backend\] .*ready")?, self.lab.deadline(LIMIT))?;
        Ok(())
    }
}

/// What serves the sibling's disk.
struct Served {
    /// The sibling's device.
    device: Device,
    /// The file that is the sibling's RAM; `None` if the sibling has RAM of its own.
    memory: Option<String>,
    /// How long it took to start.
    figures: Vec<Figure>,
    // Dropped, and so killed, in this order.
    device_vm: Option<Vm>,
    proxy: Option<Process>,
    back_end: Option<BackEnd>,
}

impl Served {
    fn new(device: Device) -> Self {
        Self { device, memory: None, figures: Vec::new(), device_vm: None, proxy: None, back_end: None }
    }

    /// Every process on the host that takes part, except the sibling's QEMU.
    fn processes(&self) -> Vec<(&'static str, u32)> {
        let vm = self.device_vm.as_ref().map(|vm| ("device_vm", vm.id()));
        let proxy = self.proxy.as_ref().map(|proxy| ("proxy", proxy.id()));
        let back_end = self.back_end.as_ref().map(|back_end| ("back_end", back_end.id()));
        vm.into_iter().chain(proxy).chain(back_end).collect()
    }

    /// Ends everything; the proxy must end without an error.
    fn end(self) -> Result<()> {
        drop(self.device_vm);
        self.proxy.as_ref().map_or(Ok(()), Process::stop)
    }
}
