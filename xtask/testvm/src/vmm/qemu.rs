//! QEMU: the words of its command line.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::json;
use vvu_artifacts::accel::Kind;
use vvu_artifacts::machine::Machine;
use vvu_artifacts::qemu::{EXPRESS_DEVICE, Qemu};

use super::cmdline::cmdline;
use super::interface::{Capabilities, Vmm, check_devices};
use super::qemu_hot_plug;
use super::words::Words;
use crate::qmp::Exchange;
use crate::vm::addr::Slot;
use crate::vm::config::{Boot, Config, Device, Serial};
use crate::vm::cpu::Cpu;
use crate::vm::frontend::Frontend;
use crate::vm::iommu::Iommu;

/// The slot of an IOMMU that is a PCI device.
const IOMMU_SLOT: Slot = Slot::new(5);
/// Milliseconds that QEMU waits for an answer of the proxy before it gives the vvu device up. Its own 5 s are too few
/// on a loaded machine.
const VFIO_USER_TIMEOUT_MS: u32 = 60_000;
/// Addresses that persistent memory takes are a multiple of this, in MiB, so that it fits wherever it begins.
const WINDOW_ADDRESSES_MIB: u64 = 1024;
/// How often RAM can be added to a VM.
const MEMORY_SLOTS: u32 = 8;

impl Vmm for Qemu {
    fn name(&self) -> &'static str {
        "QEMU"
    }

    fn program(&self) -> &Path {
        &self.path
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            accelerators: &[Kind::Kvm, Kind::Tcg],
            vvu_devices: self.vfio_user,
            inherited_ports: true,
            cpu_models: true,
            iommus: true,
            numa: true,
            hot_plug: true,
        }
    }

    fn failures(&self) -> &'static [&'static str] {
        &["emulation failure", "KVM internal error", "terminating on signal"]
    }

    fn command(&self) -> Command {
        Qemu::command(self)
    }

    fn argv_prefix(&self) -> Vec<String> {
        Qemu::argv_prefix(self)
    }

    fn attach(&self, config: &Config, index: usize) -> Result<Vec<Exchange>> {
        qemu_hot_plug::attach(config, index)
    }

    fn detach(&self, config: &Config, index: usize) -> Result<Vec<Exchange>> {
        qemu_hot_plug::detach(config, index)
    }

    fn arguments(
        &self,
        config: &Config,
        accelerator: Kind,
        boot: Boot<'_>,
        serial: Serial<'_>,
    ) -> Result<Vec<String>> {
        self.capabilities().check(self.name(), config, accelerator, serial)?;
        if self.express {
            return arguments(self.machine, config, accelerator, boot, serial);
        }
        let mut config = config.clone();
        config.devices.retain(|device| !matches!(device, Device::Express { .. }));
        arguments(self.machine, &config, accelerator, boot, serial)
    }
}

/// The arguments of the QEMU that emulates `machine`.
pub(super) fn arguments(
    machine: &Machine,
    config: &Config,
    accelerator: Kind,
    boot: Boot<'_>,
    serial: Serial<'_>,
) -> Result<Vec<String>> {
    let mut words = Words::default();
    words.flag("-no-user-config").flag("-nodefaults");
    if !config.reboots {
        words.flag("-no-reboot");
    }
    words.pair("-display", "none").pair("-name", escaped(&config.name));
    // Interrupt remapping needs the interrupt controller of the I/O bus in QEMU itself.
    let irqchip = if config.iommu == Some(Iommu::Intel) { ",kernel-irqchip=split" } else { "" };
    let whole = if config.numa_nodes > 1 { "" } else { ",memory-backend=mem" };
    words.pair("-machine", format!("{}{whole}{irqchip}", machine.qemu.machine));
    words.pair(
        "-accel",
        match accelerator {
            Kind::Kvm => "kvm",
            Kind::Tcg => "tcg,thread=multi",
        },
    );
    if let Some(model) = cpu(machine, config, accelerator)? {
        words.pair("-cpu", model);
    }
    words.pair("-smp", config.cpus.to_string()).pair("-m", memory_size(config));
    memory(&mut words, config);
    words.pair("-kernel", boot.kernel.display().to_string());
    words.pair("-initrd", boot.initramfs.display().to_string());
    words.pair("-append", cmdline(machine, config, serial));
    match serial {
        Serial::Inherited { management } => {
            words
                .pair("-chardev", "file,id=console,path=/proc/self/fd/1")
                .pair("-serial", "chardev:console")
                .pair("-chardev", "socket,id=control,fd=0")
                .pair("-serial", "chardev:control");
            if let Some(socket) = management {
                let socket = escaped(&socket.display().to_string());
                words
                    .pair("-chardev", format!("socket,id=management,path={socket}"))
                    .pair("-mon", "chardev=management,mode=control");
            }
        }
        Serial::Terminal => {
            words.pair("-serial", "mon:stdio");
        }
    }
    if let Some(iommu) = config.iommu {
        words.pair("-device", self::iommu(machine, config, iommu)?);
    }
    let taken = if config.iommu.is_some() { &[IOMMU_SLOT][..] } else { &[] };
    check_devices(config, taken)?;
    for (number, device) in config.devices.iter().enumerate() {
        self::device(&mut words, number, Place::Bus(device.slot()), device);
    }
    qemu_hot_plug::ports(&mut words, config);
    Ok(words.done())
}

/// Where a device is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    /// On the root bus.
    Bus(Slot),
    /// In this port, to which it is attached while the VM runs.
    Port(usize),
}

impl Place {
    /// The name of the device that is attached to port `index`.
    pub(super) fn id(index: usize) -> String {
        format!("attached{index}")
    }

    /// The properties of a device that say where it is.
    fn properties(self) -> String {
        match self {
            Place::Bus(slot) => format!("addr={}", address(slot)),
            Place::Port(index) => format!("bus=port{index},id={}", Self::id(index)),
        }
    }
}

/// Adds the RAM: one piece, or one for each NUMA node.
fn memory(words: &mut Words, config: &Config) {
    let nodes = u64::from(config.numa_nodes.max(1));
    let size = config.memory_mib / nodes;
    for node in 0..nodes {
        let id = if nodes > 1 { format!("mem{node}") } else { "mem".to_owned() };
        let memory = format!("id={id},size={size}M,share=on");
        let begin = config.memory_offset_mib + node * size;
        let offset = if begin > 0 { format!(",offset={begin}M") } else { String::new() };
        words.pair(
            "-object",
            match &config.memory_file {
                None => format!("memory-backend-memfd,{memory}"),
                Some(path) => format!("memory-backend-file,{memory},mem-path={}{offset}", escaped(path)),
            },
        );
        if nodes > 1 {
            words.pair("-numa", format!("node,memdev={id}"));
        }
    }
}

/// The value of `-m`. Each addition of RAM takes a slot. Persistent memory takes none, but addresses.
fn memory_size(config: &Config) -> String {
    let windows = config.devices.iter().map(|device| match device {
        Device::Window { size_mib, .. } => size_mib.next_multiple_of(WINDOW_ADDRESSES_MIB),
        _ => 0,
    });
    let windows: u64 = windows.sum();
    match config.max_memory_mib {
        None if windows == 0 => format!("{}M", config.memory_mib),
        None => format!("{0}M,maxmem={1}M", config.memory_mib, config.memory_mib + windows),
        Some(max) => format!("{}M,slots={MEMORY_SLOTS},maxmem={}M", config.memory_mib, max + windows),
    }
}

/// The CPU model; `None` for QEMU's default.
fn cpu(machine: &Machine, config: &Config, accelerator: Kind) -> Result<Option<&'static str>> {
    Ok(match (config.cpu, accelerator) {
        (Cpu::Best, Kind::Kvm) => Some("host"),
        (Cpu::Best, Kind::Tcg) => None,
        (Cpu::Level(level), _) => Some(machine.qemu_cpu(level.name())?),
        (Cpu::Hypervisor, _) => Some(machine.qemu_hypervisor_cpu()?),
    })
}

/// The value of `-device` for an IOMMU.
fn iommu(machine: &Machine, config: &Config, iommu: Iommu) -> Result<String> {
    ensure!(
        machine.iommus.contains(&iommu.name()),
        "{}: a machine of {} has no {}: want one of {}",
        config.name,
        machine.title,
        iommu.name(),
        machine.iommus.join(", ")
    );
    // Without it QEMU takes what a guest maps for VFIO devices to be guest-physical addresses.
    let has_vvu = config.devices.iter().any(|device| matches!(device, Device::Vvu { .. }));
    let remap = if has_vvu { ",dma-remap=on" } else { "" };
    Ok(match iommu {
        Iommu::Virtio => format!("virtio-iommu-pci,addr={},boot-bypass=off", address(IOMMU_SLOT)),
        Iommu::Intel => "intel-iommu,intremap=on,caching-mode=on,aw-bits=48".to_owned(),
        Iommu::Amd => format!("amd-iommu,intremap=on{remap}"),
    })
}

/// Adds a device; `number` tells the back-ends of a VM apart.
pub(super) fn device(words: &mut Words, number: usize, place: Place, device: &Device) {
    let properties = place.properties();
    match device {
        Device::Vvu { slot, socket } => {
            let device = json!({
                "driver": "vfio-user-pci",
                "socket": {"type": "unix", "path": socket},
                "addr": address(*slot),
                "rombar": 0,
                "x-msg-timeout": VFIO_USER_TIMEOUT_MS,
            });
            words.pair("-device", device.to_string());
        }
        Device::Express { socket, .. } => {
            words.pair("-chardev", format!("socket,id=express{number},path={}", escaped(socket)));
            words.pair("-device", format!("{EXPRESS_DEVICE},chardev=express{number},vectors=2,{properties}"));
        }
        Device::Window { file, size_mib, .. } => {
            let file = escaped(file);
            words.pair(
                "-object",
                format!("memory-backend-file,id=window{number},size={size_mib}M,share=on,mem-path={file}"),
            );
            words.pair("-device", format!("virtio-pmem-pci,memdev=window{number},{properties}"));
        }
        Device::VhostUser { socket, frontend, reconnect_ms, .. } => {
            let mut chardev = format!("socket,id=vhost{number},path={}", escaped(socket));
            if *reconnect_ms > 0 {
                chardev.push_str(&format!(",reconnect-ms={reconnect_ms}"));
            }
            words.pair("-chardev", chardev);
            self::frontend(words, number, &properties, frontend);
        }
        Device::VirtioBlk { file, .. } => {
            let disk = json!({
                "driver": "raw",
                "node-name": format!("disk{number}"),
                "file": {"driver": "file", "filename": file},
            });
            words.pair("-blockdev", disk.to_string());
            words.pair("-device", format!("virtio-blk-pci,drive=disk{number},{properties},num-queues=1"));
        }
    }
}

/// Adds the front-end whose socket is the character device `vhost{number}`.
fn frontend(words: &mut Words, number: usize, place: &str, frontend: &Frontend) {
    let chardev = format!("chardev=vhost{number},{place}");
    let (mut device, queue_size) = match frontend {
        Frontend::Block(block) => {
            (format!("vhost-user-blk-pci,{chardev},num-queues={}", block.queues), &["queue-size"][..])
        }
        Frontend::Fs(fs) => {
            let queues = fs.request_queues;
            let device = format!("vhost-user-fs-pci,{chardev},num-request-queues={queues},tag={}", fs.tag);
            (device, &["queue-size"][..])
        }
        Frontend::Rng(_) => (format!("vhost-user-rng-pci,{chardev}"), &[][..]),
        Frontend::Vsock(_) => (format!("vhost-user-vsock-pci,{chardev}"), &[][..]),
        // QEMU has no front-end for consoles, but one that is told its type: virtio 1.2, 5.3, is device 3, with two
        // queues for each of two ports and 12 bytes of configuration.
        Frontend::Console(_) => {
            let device = "vhost-user-test-device-pci";
            (format!("{device},{chardev},virtio-id=3,num_vqs=4,config_size=12"), &[][..])
        }
        Frontend::Net(net) => {
            let queues = net.queue_pairs;
            words.pair("-netdev", format!("vhost-user,id=net{number},chardev=vhost{number},queues={queues}"));
            let multiqueue = if queues > 1 { ",mq=on" } else { "" };
            let device = format!("virtio-net-pci,netdev=net{number},{place},romfile={multiqueue}");
            (device, &["rx_queue_size", "tx_queue_size"][..])
        }
    };
    let mut property = |name: &str, value: &str| device.push_str(&format!(",{name}={value}"));
    if let Some(size) = frontend.queue_size() {
        queue_size.iter().for_each(|name| property(name, &size.to_string()));
    }
    let features = frontend.features();
    for (name, feature) in [
        ("indirect_desc", features.indirect_desc),
        ("event_idx", features.event_idx),
        ("iommu_platform", features.access_platform),
        ("packed", features.ring_packed),
    ] {
        if let Some(offered) = feature {
            property(name, if offered { "on" } else { "off" });
        }
    }
    frontend.vmm_properties().iter().for_each(|(name, value)| property(name, value));
    words.pair("-device", device);
}

/// A slot as the property `addr` has it: device and function, `10.0`.
pub(super) fn address(slot: Slot) -> String {
    format!("{:02x}.0", slot.device())
}

/// `text` as a value in a `key=value,...` list, where a comma is doubled.
fn escaped(text: &str) -> String {
    text.replace(',', ",,")
}

#[cfg(test)]
#[path = "qemu_test.rs"]
mod tests;
