//! Measures the two ways to the sibling's memory: the shared memory BAR and the window.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result};
use regex::Regex;
use serde_json::Value;
use tempfile::TempDir;
use vvu_artifacts::image::{OverlayEntry, with_overlay};
use vvu_process::progress::Progress;
use vvu_testvm::{Boot, Device, Frontend, Iommu, KernelId, Lab, Needs, ProxyConfig, Vm, VmConfig};

use super::options::Options;
use super::usage::Usage;

/// The VMs' kernel: a distribution's, as a user has it.
const KERNEL: &str = "debian-13-cloud";
/// The back-end that does direct I/O.
const STORAGE_DAEMON: &str = "qemu-storage-daemon";
/// RAM of each VM in MiB.
const MEMORY_MIB: u64 = 384;
/// Size of the disk in MiB: more than the device VM can keep in its page cache.
const DISK_MIB: u64 = 2048;
/// How long anything but a test may take, at native speed.
const LIMIT: Duration = Duration::from_secs(30);

/// The ways in which a disk of the device VM is served: name, options of the bridge, options of the disk.
const WAYS: [(&str, &str, &str); 2] = [
    ("BAR, buffered", "--window off", ""),
    ("window, direct", "--window required", ",cache.direct=on,aio=native"),
];
/// Options of `vvu-load`, by what they measure.
const TESTS: [(&str, &str); 2] = [
    ("128 KiB sequential", "--pattern read --block 131072 --depth 1"),
    ("4 KiB random", "--pattern randread --block 4096 --depth 1"),
];

/// What the VMs need.
pub(super) fn needs() -> Needs {
    Needs { kernels: [kernel()].into(), ..Needs::programs([STORAGE_DAEMON]) }
}

fn kernel() -> KernelId {
    KernelId::Packaged(KERNEL.to_owned())
}

/// Measures each way once a round, and returns the lines to print.
///
/// # Errors
///
/// Fails if a VM or a program in it does.
pub(super) fn measure(options: &Options, lab: &Lab<'_>, progress: &Progress) -> Result<String> {
    let disk = Disk::new()?;
    let stage = progress.stage("mappings");
    let mut text = mappings(options, lab)?;
    stage.done("");
    for round in 1..=options.rounds {
        for (name, window, cache) in WAYS {
            let stage = progress.stage(format!("{name} {round}"));
            for line in served(options, lab, &disk, (window, cache))? {
                text += &format!("round {round}, {name}: {line}\n");
            }
            stage.done("");
        }
    }
    lab.check_leftovers()?;
    Ok(text)
}

/// A disk of the device VM, in memory of the host: what is measured is not the host's disk.
struct Disk {
    _dir: TempDir,
    path: String,
}

impl Disk {
    fn new() -> Result<Self> {
        let dir = TempDir::with_prefix_in("vvu-bench-", "/dev/shm").or_else(|_| TempDir::new());
        let dir = dir.context("cannot make a directory for the disk")?;
        let path = dir.path().join("disk.img");
        File::create(&path).and_then(|file| file.set_len(DISK_MIB << 20)).context("cannot make a disk")?;
        Ok(Self { path: path.display().to_string(), _dir: dir })
    }
}

/// Starts a device VM with a window and, if it is given, a disk.
fn device_vm(lab: &Lab<'_>, vvu: &ProxyConfig, disk: Option<&Disk>) -> Result<Vm> {
    let mut devices = vvu.devices();
    let free = |devices: &[Device]| Device::last_free_slot(devices).context("no PCI slot is left");
    if let Some(disk) = disk {
        devices.push(Device::VirtioBlk { slot: free(&devices)?, file: disk.path.clone() });
    }
    devices.push(vvu.window_device(free(&devices)?, MEMORY_MIB));
    let iommu = Some(Iommu::default_for(lab.setup().kernel(&kernel())?));
    let vm = start(lab, &VmConfig { iommu, devices, ..VmConfig::new("device", MEMORY_MIB) })?;
    vm.ready(lab.deadline(LIMIT))?;
    vm.run_until(&format!("vvu bind {}", vvu.slot), lab.deadline(LIMIT))?;
    Ok(vm)
}

/// Starts a VM whose initramfs has the back-end, and the modules that the VM needs.
fn start(lab: &Lab<'_>, config: &VmConfig) -> Result<Vm> {
    let setup = lab.setup();
    let programs = setup.programs.values().map(|tree| OverlayEntry::Tree(tree.clone()));
    let modules = setup.kernel_modules(&kernel(), config)?;
    let initramfs = lab.run().file(&format!("{}.cpio", config.name));
    with_overlay(&setup.base, &programs.chain(modules).collect::<Vec<_>>(), &initramfs)?;
    lab.vm_with(config, Boot { kernel: &setup.kernel(&kernel())?.vmlinux, initramfs: &initramfs })
}

/// What the device VM says of its two mappings.
fn mappings(options: &Options, lab: &Lab<'_>) -> Result<String> {
    let vvu = ProxyConfig { window: true, ..ProxyConfig::new("mappings", MEMORY_MIB, lab.sockets()) };
    let proxy = lab.proxy(&vvu)?;
    let vm = device_vm(lab, &vvu, None)?;
    let command = format!(
        "mkdir -p /sys/kernel/debug && mount -t debugfs none /sys/kernel/debug; \
         vvu device memory --vfio {} --overwrite --seconds {}",
        vvu.slot, options.seconds
    );
    let deadline = lab.deadline(LIMIT) + Duration::from_secs(8 * options.seconds);
    let text = vm.run_until(&command, deadline)?;
    drop(vm);
    proxy.stop()?;
    Ok(text + "\n")
}

/// Serves the disk of the device VM to a sibling, and returns a line for each test.
fn served(
    options: &Options,
    lab: &Lab<'_>,
    disk: &Disk,
    (window, cache): (&str, &str),
) -> Result<Vec<String>> {
    let vvu = ProxyConfig { window: true, ..ProxyConfig::new("memory", MEMORY_MIB, lab.sockets()) };
    let proxy = lab.proxy(&vvu)?;
    let vm = device_vm(lab, &vvu, Some(disk))?;
    let serve = format!(
        "exec vvu device bridge {window} --vfio {} -- {STORAGE_DAEMON} --blockdev \
         driver=host_device,node-name=disk,filename=/dev/vda{cache} --export \
         type=vhost-user-blk,id=export,node-name=disk,num-queues=1,addr.type=unix,addr.path={{socket}}",
        vvu.slot
    );
    vm.spawn("backend", &serve, 0, lab.deadline(LIMIT))?;
    vm.wait_for(&Regex::new(r"^\[backend\] .*ready")?, lab.deadline(LIMIT))?;
    let device = vvu.vhost_user_device(Frontend::default());
    let announcement = device.announcement().context("the sibling has no disk")?;
    let config = VmConfig {
        memory_file: Some(vvu.memory_file()),
        memory_offset_mib: vvu.memory_offset_mib(),
        devices: vec![device],
        ..VmConfig::new("sibling", MEMORY_MIB)
    };
    let sibling = start(lab, &config)?;
    sibling.wait_for(&Regex::new(announcement)?, lab.deadline(LIMIT))?;
    sibling.ready(lab.deadline(LIMIT))?;
    let mut lines = Vec::new();
    for (test, load) in TESTS {
        let command = format!("vvu-load measure --file /dev/vda --seconds {} {load}", options.seconds);
        let usage = || [vm.id(), proxy.id()].map(Usage::of).into_iter().sum::<Usage>();
        let before = usage();
        let deadline = lab.deadline(LIMIT) + Duration::from_secs(options.seconds);
        let output = sibling.run_until(&command, deadline)?;
        let used = usage().since(before);
        let got: Value = serde_json::from_str(output.lines().next_back().unwrap_or_default())
            .with_context(|| format!("`{command}` printed {output:?}"))?;
        let figure = |name: &str| got[name].as_f64().with_context(|| format!("no {name} in {output}"));
        lines.push(format!(
            "{test}: {:.0} IOPS, {:.0} MB/s, p50 {:.0} us, {:.0} us of processor time a request in device VM and proxy",
            figure("iops")?,
            figure("mb_per_s")?,
            figure("latency_p50_us")?,
            used.cpu_us / figure("requests")?
        ));
    }
    drop((sibling, vm));
    proxy.stop()?;
    Ok(lines)
}
