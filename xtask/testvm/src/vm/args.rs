//! QEMU's command line for a VM. Pure: the same VM always gets the same words.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use serde_json::json;

use crate::rundir::MAX_SOCKET_PATH;
use crate::vm::{CpuLevel, Frontend, Iommu, Slot};
use vvu_artifacts::accel::Kind;

/// The IOMMU's slot.
const IOMMU_SLOT: Slot = Slot::new(5);
/// Milliseconds that QEMU waits for an answer of the proxy before it gives the device up; its own 5 s are too
/// short for a loaded machine.
const VFIO_USER_TIMEOUT_MS: u32 = 60_000;
/// For every guest. Without `quiet` the lines up to "notice" appear, among them the one that tells /dev/vda; the
/// rest saves boot time.
const CMDLINE: &str = "console=ttyS0 loglevel=6 panic=-1 no_timer_check";

/// What all VMs of a run have in common.
#[derive(Debug, Clone, Copy)]
pub struct Guest<'a> {
    /// What runs the guests' code.
    pub accelerator: Kind,
    /// The PVH `vmlinux`.
    pub kernel: &'a Path,
    /// The VM's initramfs.
    pub initramfs: &'a Path,
}

/// A VM as its scenario has it, with every path and address settled.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Its name.
    pub name: String,
    /// The QEMU that runs it, by name; `None` for the run's.
    pub qemu: Option<String>,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Their model as QEMU names it; `None` for the accelerator's best.
    pub cpu_model: Option<String>,
    /// The file that is its RAM; `None` for memory of its own, which is shared with vfio-user servers too.
    pub memory_file: Option<String>,
    /// The IOMMU in front of its devices.
    pub iommu: Option<Iommu>,
    /// Its devices.
    pub devices: Vec<Device>,
    /// Added to the kernel command line.
    pub cmdline: String,
    /// A reboot of the guest starts it again; else it ends QEMU.
    pub reboots: bool,
}

/// A PCI device of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// The vvu device, which a proxy serves over vfio-user.
    Vvu {
        /// Where it is.
        slot: Slot,
        /// The proxy's vfio-user socket.
        socket: String,
    },
    /// A virtio device whose back-end is behind a vhost-user socket.
    VhostUser {
        /// Where it is.
        slot: Slot,
        /// The socket.
        socket: String,
        /// What it is.
        frontend: Frontend,
        /// Milliseconds between attempts to make a lost connection again; 0: none are made.
        reconnect_ms: u32,
    },
    /// A virtio block device that QEMU itself serves.
    VirtioBlk {
        /// Where it is.
        slot: Slot,
        /// The disk image.
        file: String,
    },
}

impl Device {
    /// Where it is.
    pub fn slot(&self) -> Slot {
        match self {
            Device::Vvu { slot, .. } | Device::VhostUser { slot, .. } | Device::VirtioBlk { slot, .. } => {
                *slot
            }
        }
    }

    fn socket(&self) -> Option<&str> {
        match self {
            Device::Vvu { socket, .. } | Device::VhostUser { socket, .. } => Some(socket),
            Device::VirtioBlk { .. } => None,
        }
    }
}

/// What the two serial ports are connected to.
#[derive(Debug, Clone, Copy)]
pub enum Serial<'a> {
    /// The console is the pipe that QEMU inherits as its standard output, and goes to this log as well; the control
    /// port is the socket that it inherits as its standard input.
    ///
    /// Not a socket for the console: one holds some 270 of the single bytes that a serial port writes, and a guest
    /// kernel drops what does not leave its port within 10 ms.
    Inherited(&'a Path),
    /// The console is the terminal, with a shell on it; there is no control port.
    Terminal,
}

/// The words after the program's name.
///
/// # Errors
///
/// Two devices in one slot, or a socket path too long for a unix socket.
pub fn arguments(config: &Config, guest: Guest<'_>, serial: Serial<'_>) -> Result<Vec<String>> {
    let mut args = Args::default();
    args.flag("-no-user-config").flag("-nodefaults");
    if !config.reboots {
        args.flag("-no-reboot");
    }
    args.pair("-display", "none").pair("-name", escaped(&config.name));
    let irqchip = if config.iommu == Some(Iommu::Intel) { ",kernel-irqchip=split" } else { "" };
    args.pair("-machine", format!("q35,hpet=off,sata=off,smbus=off,memory-backend=mem{irqchip}"));
    let cpu_model = match guest.accelerator {
        Kind::Kvm => {
            args.pair("-accel", "kvm");
            config.cpu_model.as_deref().or(Some("host"))
        }
        Kind::Tcg => {
            args.pair("-accel", "tcg,thread=multi");
            config.cpu_model.as_deref()
        }
    };
    if let Some(model) = cpu_model {
        args.pair("-cpu", model);
    }
    args.pair("-smp", config.cpus.to_string()).pair("-m", format!("{}M", config.memory_mib));
    let memory = format!("id=mem,size={}M,share=on", config.memory_mib);
    args.pair(
        "-object",
        match &config.memory_file {
            None => format!("memory-backend-memfd,{memory}"),
            Some(path) => format!("memory-backend-file,{memory},mem-path={}", escaped(path)),
        },
    );
    args.pair("-kernel", guest.kernel.display().to_string());
    args.pair("-initrd", guest.initramfs.display().to_string());
    args.pair("-append", cmdline(config, serial));
    match serial {
        Serial::Inherited(log) => {
            let log = escaped(&log.display().to_string());
            args.pair("-chardev", format!("file,id=console,path=/proc/self/fd/1,logfile={log},logappend=on"))
                .pair("-serial", "chardev:console")
                .pair("-chardev", "socket,id=control,fd=0")
                .pair("-serial", "chardev:control");
        }
        Serial::Terminal => {
            args.pair("-serial", "mon:stdio");
        }
    }
    args.devices(config)?;
    Ok(args.0)
}

fn cmdline(config: &Config, serial: Serial<'_>) -> String {
    let mut words = format!("{CMDLINE} vvu.hostname={}", config.name);
    let extra = match config.iommu {
        Some(Iommu::Virtio) => " vfio_iommu_type1.allow_unsafe_interrupts=1",
        Some(Iommu::Intel) => " intel_iommu=on",
        Some(Iommu::Amd) | None => "",
    };
    words.push_str(extra);
    if matches!(serial, Serial::Terminal) {
        words.push_str(" vvu.shell");
    }
    if !config.cmdline.is_empty() {
        words.push(' ');
        words.push_str(&config.cmdline);
    }
    words
}

/// QEMU's CPU model of a level: the oldest that has all of it.
#[must_use]
pub fn cpu_model(level: CpuLevel) -> &'static str {
    match level {
        CpuLevel::V1 => "qemu64",
        CpuLevel::V2 => "Nehalem",
        CpuLevel::V3 => "Haswell",
        CpuLevel::V4 => "Skylake-Server",
    }
}

/// QEMU's words for a front-end: `number` tells the back-ends of a VM apart, `addr` is the slot.
fn front_end(frontend: &Frontend, number: usize, addr: &str) -> Vec<String> {
    let chardev = format!("chardev=vhost{number},addr={addr}");
    let mut words = Vec::new();
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
            let netdev = format!("vhost-user,id=net{number},chardev=vhost{number},queues={queues}");
            words.extend(["-netdev".to_owned(), netdev]);
            let multiqueue = if queues > 1 { ",mq=on" } else { "" };
            let device = format!("virtio-net-pci,netdev=net{number},addr={addr},romfile={multiqueue}");
            (device, &["rx_queue_size", "tx_queue_size"][..])
        }
    };
    if let Some(size) = frontend.queue_size() {
        for name in queue_size {
            device.push_str(&format!(",{name}={size}"));
        }
    }
    let features = frontend.features();
    for (name, feature) in [
        ("indirect_desc", features.indirect_desc),
        ("event_idx", features.event_idx),
        ("iommu_platform", features.access_platform),
        ("packed", features.ring_packed),
    ] {
        if let Some(offered) = feature {
            device.push_str(&format!(",{name}={}", if offered { "on" } else { "off" }));
        }
    }
    for (name, value) in frontend.vmm_properties() {
        device.push_str(&format!(",{name}={value}"));
    }
    words.extend(["-device".to_owned(), device]);
    words
}

/// `text` as a value in a `key=value,...` list, where a comma is doubled.
fn escaped(text: &str) -> String {
    text.replace(',', ",,")
}

#[derive(Default)]
struct Args(Vec<String>);

impl Args {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.to_owned());
        self
    }

    fn pair(&mut self, name: &str, value: impl Into<String>) -> &mut Self {
        self.0.push(name.to_owned());
        self.0.push(value.into());
        self
    }

    fn devices(&mut self, config: &Config) -> Result<()> {
        let mut taken = Vec::new();
        if let Some(iommu) = config.iommu {
            taken.push(IOMMU_SLOT);
            let addr = IOMMU_SLOT.qemu();
            // Without it QEMU takes what a guest maps for VFIO devices to be guest-physical addresses.
            let has_vvu = config.devices.iter().any(|device| matches!(device, Device::Vvu { .. }));
            let remap = if has_vvu { ",dma-remap=on" } else { "" };
            self.pair(
                "-device",
                match iommu {
                    Iommu::Virtio => format!("virtio-iommu-pci,addr={addr},boot-bypass=off"),
                    Iommu::Intel => "intel-iommu,intremap=on,caching-mode=on,aw-bits=48".to_owned(),
                    Iommu::Amd => format!("amd-iommu,intremap=on{remap}"),
                },
            );
        }
        for (number, device) in config.devices.iter().enumerate() {
            let slot = device.slot();
            if taken.contains(&slot) {
                bail!("{}: two devices at {slot}: give one of them another address", config.name);
            }
            taken.push(slot);
            if let Some(socket) = device.socket() {
                ensure!(
                    socket.len() <= MAX_SOCKET_PATH,
                    "{socket} has {} bytes: a unix socket's path may have {MAX_SOCKET_PATH}",
                    socket.len()
                );
            }
            let addr = slot.qemu();
            match device {
                Device::Vvu { socket, .. } => {
                    let device = json!({
                        "driver": "vfio-user-pci",
                        "socket": {"type": "unix", "path": socket},
                        "addr": addr,
                        "rombar": 0,
                        "x-msg-timeout": VFIO_USER_TIMEOUT_MS,
                    });
                    self.pair("-device", device.to_string());
                }
                Device::VhostUser { socket, frontend, reconnect_ms, .. } => {
                    let mut chardev = format!("socket,id=vhost{number},path={}", escaped(socket));
                    if *reconnect_ms > 0 {
                        chardev.push_str(&format!(",reconnect-ms={reconnect_ms}"));
                    }
                    self.pair("-chardev", chardev);
                    self.0.extend(front_end(frontend, number, &addr));
                }
                Device::VirtioBlk { file, .. } => {
                    let disk = json!({
                        "driver": "raw",
                        "node-name": format!("disk{number}"),
                        "file": {"driver": "file", "filename": file},
                    });
                    self.pair("-blockdev", disk.to_string());
                    let device = format!("virtio-blk-pci,drive=disk{number},addr={addr},num-queues=1");
                    self.pair("-device", device);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::BlockFrontend;

    fn words(text: &str) -> String {
        let frontend: Frontend = serde_json::from_str(text).expect("a front-end");
        frontend.check().expect("valid");
        front_end(&frontend, 1, "11.0").join(" ")
    }

    #[test]
    fn each_front_end_becomes_a_device_of_qemu() {
        let fs = r#"{"fs": {"tag": "t", "request_queues": 2, "queue_size": 64}}"#;
        assert_eq!(
            words(fs),
            "-device vhost-user-fs-pci,chardev=vhost1,addr=11.0,num-request-queues=2,tag=t,queue-size=64"
        );
        assert_eq!(words(r#"{"rng": {}}"#), "-device vhost-user-rng-pci,chardev=vhost1,addr=11.0");
        assert_eq!(
            words(r#"{"net": {"queue_pairs": 2}}"#),
            "-netdev vhost-user,id=net1,chardev=vhost1,queues=2 -device virtio-net-pci,netdev=net1,addr=11.0,romfile=,mq=on"
        );
        let block = r#"{"block": {"features": {"access_platform": true, "event_idx": false, "indirect_desc": false,
            "ring_packed": true}, "vmm_properties": {"disable-legacy": "on"}}}"#;
        assert_eq!(
            words(block),
            "-device vhost-user-blk-pci,chardev=vhost1,addr=11.0,num-queues=1,indirect_desc=off,event_idx=off,\
             iommu_platform=on,packed=on,disable-legacy=on"
        );
    }

    fn guest() -> Guest<'static> {
        Guest {
            accelerator: Kind::Tcg,
            kernel: Path::new("/c/vmlinux"),
            initramfs: Path::new("/c/device.cpio"),
        }
    }

    fn device() -> Config {
        Config {
            name: "device".into(),
            memory_mib: 512,
            cpus: 1,
            iommu: Some(Iommu::Virtio),
            devices: vec![Device::Vvu { slot: Slot::DEFAULT, socket: "/r/vfio-user.sock".into() }],
            ..Config::default()
        }
    }

    fn line(config: &Config, serial: Serial<'_>) -> String {
        arguments(config, guest(), serial).expect("valid").join(" ")
    }

    #[test]
    fn the_device_vm_is_as_measured() {
        let line = line(&device(), Serial::Inherited(Path::new("/r/console.log")));
        assert_eq!(
            line,
            "-no-user-config -nodefaults -no-reboot -display none -name device \
             -machine q35,hpet=off,sata=off,smbus=off,memory-backend=mem -accel tcg,thread=multi -smp 1 -m 512M \
             -object memory-backend-memfd,id=mem,size=512M,share=on -kernel /c/vmlinux -initrd /c/device.cpio \
             -append console=ttyS0 loglevel=6 panic=-1 no_timer_check vvu.hostname=device \
             vfio_iommu_type1.allow_unsafe_interrupts=1 \
             -chardev file,id=console,path=/proc/self/fd/1,logfile=/r/console.log,logappend=on -serial chardev:console \
             -chardev socket,id=control,fd=0 -serial chardev:control \
             -device virtio-iommu-pci,addr=05.0,boot-bypass=off \
             -device {\"addr\":\"10.0\",\"driver\":\"vfio-user-pci\",\"rombar\":0,\
             \"socket\":{\"path\":\"/r/vfio-user.sock\",\"type\":\"unix\"},\"x-msg-timeout\":60000}"
        );
    }

    #[test]
    fn the_siblings_ram_is_the_memory_file() {
        let config = Config {
            name: "sibling".into(),
            memory_mib: 256,
            cpus: 2,
            memory_file: Some("/r/a,b/memory".into()),
            devices: vec![Device::VhostUser {
                slot: Slot::DEFAULT,
                socket: "/r/a,b/v.sock".into(),
                frontend: Frontend::Block(BlockFrontend { queues: 2, ..BlockFrontend::default() }),
                reconnect_ms: 100,
            }],
            cmdline: "debug".into(),
            reboots: true,
            ..Config::default()
        };
        let line = line(&config, Serial::Terminal);
        assert!(
            line.contains("-object memory-backend-file,id=mem,size=256M,share=on,mem-path=/r/a,,b/memory ")
        );
        assert!(line.contains("-chardev socket,id=vhost0,path=/r/a,,b/v.sock,reconnect-ms=100 "));
        assert!(!line.contains("-no-reboot"), "{line}");
        assert!(line.ends_with("-device vhost-user-blk-pci,chardev=vhost0,addr=10.0,num-queues=2"), "{line}");
        assert!(line.contains("vvu.hostname=sibling vvu.shell debug -serial mon:stdio"), "{line}");
    }

    #[test]
    fn interrupt_remapping_needs_no_unsafe_flag() {
        for (iommu, want) in
            [(Iommu::Intel, "intel-iommu,intremap=on"), (Iommu::Amd, "amd-iommu,intremap=on,dma-remap=on")]
        {
            let line = line(&Config { iommu: Some(iommu), ..device() }, Serial::Terminal);
            assert!(line.contains(want) && !line.contains("allow_unsafe"), "{line}");
        }
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let refused =
            |config: &Config| arguments(config, guest(), Serial::Terminal).expect_err("refused").to_string();
        let mut config = device();
        config.devices.push(config.devices[0].clone());
        assert!(refused(&config).contains("two devices at 0000:00:10.0"));
        let mut config = device();
        config.devices = vec![Device::Vvu { slot: IOMMU_SLOT, socket: "/s".into() }];
        assert!(refused(&config).contains("two devices at 0000:00:05.0"));
        let mut config = device();
        config.devices = vec![Device::Vvu { slot: Slot::DEFAULT, socket: "/".repeat(108) }];
        assert!(refused(&config).contains("108 bytes"));
    }
}
