use vvu_artifacts::accel::Kind;
use vvu_artifacts::machine::{AARCH64, X86_64};

use super::super::qemu_hot_plug::{attach, detach};
use super::super::rig::{boot, device, sibling, with_frontend};
use super::*;
use crate::vm::cpu::CpuLevel;

/// Ports of a VM that is managed at this socket, or not at all.
fn inherited(management: Option<&str>) -> Serial<'_> {
    Serial::Inherited { management: management.map(Path::new) }
}

fn line_of(machine: &Machine, config: &Config, serial: Serial<'_>) -> String {
    arguments(machine, config, Kind::Tcg, boot(), serial).expect("valid").join(" ")
}

fn line(config: &Config, serial: Serial<'_>) -> String {
    line_of(&X86_64, config, serial)
}

#[test]
fn the_device_vm_is_as_measured() {
    let line = line(&device(), inherited(None));
    assert_eq!(
        line,
        "-no-user-config -nodefaults -no-reboot -display none -name device \
         -machine q35,hpet=off,sata=off,smbus=off,memory-backend=mem -accel tcg,thread=multi -smp 1 -m 512M \
         -object memory-backend-memfd,id=mem,size=512M,share=on -kernel /c/vmlinux -initrd /c/device.cpio \
         -append console=ttyS0 loglevel=6 panic=-1 no_timer_check vvu.hostname=device vvu.control=ttyS1 \
         vfio_iommu_type1.allow_unsafe_interrupts=1 \
         -chardev file,id=console,path=/proc/self/fd/1 -serial chardev:console \
         -chardev socket,id=control,fd=0 -serial chardev:control \
         -device virtio-iommu-pci,addr=05.0,boot-bypass=off \
         -device {\"addr\":\"10.0\",\"driver\":\"vfio-user-pci\",\"rombar\":0,\
         \"socket\":{\"path\":\"/r/vfio-user.sock\",\"type\":\"unix\"},\"x-msg-timeout\":60000}"
    );
}

#[test]
fn another_machine_takes_nothing_but_its_profile() {
    let line = line_of(&AARCH64, &device(), inherited(None));
    assert!(line.contains(" -machine virt,gic-version=max,memory-backend=mem "), "{line}");
    assert!(
        line.contains("console=ttyAMA0 loglevel=6 panic=-1 vvu.hostname=device vvu.control=ttyAMA1 "),
        "{line}"
    );
    for word in ["q35", "ttyS", "no_timer_check"] {
        assert!(!line.contains(word), "{line}");
    }
    let refused = |config| {
        arguments(&AARCH64, &config, Kind::Tcg, boot(), Serial::Terminal).expect_err("refused").to_string()
    };
    let intel = refused(Config { iommu: Some(Iommu::Intel), ..device() });
    assert!(intel.contains("no intel-iommu: want one of virtio-iommu"), "{intel}");
    let level = refused(Config { cpu: Cpu::Level(CpuLevel::V2), ..device() });
    assert!(level.contains("no CPU of level x86-64-v2"), "{level}");
}

#[test]
fn the_siblings_ram_is_the_memory_file() {
    let line = line(&sibling(), Serial::Terminal);
    assert!(line.contains("-object memory-backend-file,id=mem,size=256M,share=on,mem-path=/r/a,,b/memory "));
    assert!(line.contains("-chardev socket,id=vhost0,path=/r/a,,b/v.sock,reconnect-ms=100 "));
    assert!(!line.contains("-no-reboot"), "{line}");
    assert!(line.ends_with("-device vhost-user-blk-pci,chardev=vhost0,addr=10.0,num-queues=2"), "{line}");
    assert!(line.contains("vvu.hostname=sibling vvu.shell debug -serial mon:stdio"), "{line}");
}

#[test]
fn a_window_is_persistent_memory_of_the_siblings_file() {
    let window = Device::Window { slot: Slot::new(0x1c), file: "/r/a,b/memory".into(), size_mib: 1058 };
    let mut config = device();
    config.devices.push(window);
    let line = line(&config, inherited(None));
    assert!(line.contains(" -m 512M,maxmem=2560M "), "{line}");
    assert!(
        line.ends_with(
            " -object memory-backend-file,id=window1,size=1058M,share=on,mem-path=/r/a,,b/memory \
             -device virtio-pmem-pci,memdev=window1,addr=1c.0"
        ),
        "{line}"
    );
    config.max_memory_mib = Some(1024);
    assert!(self::line(&config, inherited(None)).contains(" -m 512M,slots=8,maxmem=3072M "));
}

#[test]
fn the_siblings_ram_begins_behind_the_header() {
    let mut config = Config { memory_offset_mib: 2, ..sibling() };
    let one = line(&config, Serial::Terminal);
    assert!(one.contains("size=256M,share=on,mem-path=/r/a,,b/memory,offset=2M "), "{one}");
    config.numa_nodes = 2;
    let two = line(&config, Serial::Terminal);
    assert!(two.contains(",offset=2M -numa") && two.contains(",offset=130M -numa"), "{two}");
}

#[test]
fn interrupt_remapping_needs_no_unsafe_flag() {
    for (iommu, want) in
        [(Iommu::Intel, "intel-iommu,intremap=on"), (Iommu::Amd, "amd-iommu,intremap=on,dma-remap=on")]
    {
        let line = line(&Config { iommu: Some(iommu), ..device() }, Serial::Terminal);
        assert!(line.contains(want) && !line.contains("allow_unsafe"), "{line}");
        assert_eq!(line.contains("kernel-irqchip=split"), iommu == Iommu::Intel, "{line}");
    }
}

#[test]
fn a_cpu_is_the_accelerators_best_or_has_what_is_asked_for() {
    let cpu = |cpu, accelerator| {
        let config = Config { cpu, ..device() };
        let words = arguments(&X86_64, &config, accelerator, boot(), Serial::Terminal).expect("valid");
        words.iter().skip_while(|word| *word != "-cpu").nth(1).cloned()
    };
    assert_eq!(cpu(Cpu::Best, Kind::Tcg), None);
    assert_eq!(cpu(Cpu::Best, Kind::Kvm).as_deref(), Some("host"));
    assert_eq!(cpu(Cpu::Level(CpuLevel::V2), Kind::Kvm).as_deref(), Some("Nehalem"));
    assert_eq!(cpu(Cpu::Hypervisor, Kind::Tcg).as_deref(), Some("EPYC,+svm,+npt"));
    for level in [CpuLevel::V1, CpuLevel::V2, CpuLevel::V3, CpuLevel::V4] {
        X86_64.qemu_cpu(level.name()).expect("every level has a model");
    }
}

#[test]
fn each_front_end_becomes_a_device_of_qemu() {
    let words = |text: &str| {
        let line = line(&with_frontend(text), Serial::Terminal);
        line.split_once("path=/s ").expect("the socket").1.to_owned()
    };
    assert_eq!(
        words(r#"{"fs": {"tag": "t", "request_queues": 2, "queue_size": 64}}"#),
        "-device vhost-user-fs-pci,chardev=vhost0,addr=11.0,num-request-queues=2,tag=t,queue-size=64"
    );
    assert_eq!(words(r#"{"rng": {}}"#), "-device vhost-user-rng-pci,chardev=vhost0,addr=11.0");
    assert_eq!(
        words(r#"{"net": {"queue_pairs": 2}}"#),
        "-netdev vhost-user,id=net0,chardev=vhost0,queues=2 -device virtio-net-pci,netdev=net0,addr=11.0,romfile=,mq=on"
    );
    let block = r#"{"block": {"features": {"access_platform": true, "event_idx": false, "indirect_desc": false,
        "ring_packed": true}, "vmm_properties": {"disable-legacy": "on"}}}"#;
    assert_eq!(
        words(block),
        "-device vhost-user-blk-pci,chardev=vhost0,addr=11.0,num-queues=1,indirect_desc=off,event_idx=off,\
         iommu_platform=on,packed=on,disable-legacy=on"
    );
}

#[test]
fn what_cannot_work_is_refused() {
    let refused = |config: &Config| {
        arguments(&X86_64, config, Kind::Tcg, boot(), Serial::Terminal).expect_err("refused").to_string()
    };
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

/// The sibling VM, whose disk is attached while it runs.
fn attachable() -> Config {
    let Config { devices, .. } = sibling();
    Config {
        devices: Vec::new(),
        attachable: devices,
        managed: true,
        max_memory_mib: Some(1024),
        ..sibling()
    }
}

#[test]
fn a_device_that_comes_later_has_a_port_and_its_vm_a_monitor() {
    let line = line(&attachable(), inherited(Some("/r/a,b/s.qmp")));
    assert!(
        line.ends_with(
            "-chardev socket,id=management,path=/r/a,,b/s.qmp -mon chardev=management,mode=control \
             -device pcie-root-port,id=port0,chassis=1,slot=1,addr=10.0"
        ),
        "{line}"
    );
    assert!(
        line.contains(" -m 256M,slots=8,maxmem=1024M ") && line.contains(",size=256M,share=on,"),
        "{line}"
    );
    assert!(!line.contains("vhost0"), "{line}");
}

#[test]
fn a_device_is_attached_in_the_words_of_the_command_line() {
    let words = |words: &str| Exchange::Words(words.to_owned());
    let command = |execute, arguments| Exchange::Command { execute, arguments };
    assert_eq!(
        attach(&attachable(), 0).expect("attached"),
        [
            words(r#"chardev-add "socket,id=vhost0,path=/r/a,,b/v.sock,reconnect-ms=100""#),
            words(r#"device_add "vhost-user-blk-pci,chardev=vhost0,bus=port0,id=attached0,num-queues=2""#),
        ]
    );
    assert_eq!(
        detach(&attachable(), 0).expect("detached"),
        [
            command("device_del", json!({"id": "attached0"})),
            Exchange::Event { name: "DEVICE_DELETED", data: json!({"device": "attached0"}) },
            command("chardev-remove", json!({"id": "vhost0"})),
        ]
    );
    let net = Config { attachable: with_frontend(r#"{"net": {}}"#).devices, ..attachable() };
    assert_eq!(
        attach(&net, 0).expect("attached")[1..],
        [
            words(r#"netdev_add "vhost-user,id=net0,chardev=vhost0,queues=1""#),
            words(r#"device_add "virtio-net-pci,netdev=net0,bus=port0,id=attached0,romfile=""#),
        ]
    );
    assert_eq!(detach(&net, 0).expect("detached")[2], command("netdev_del", json!({"id": "net0"})));
    let file = "/d \"q\".img".to_owned();
    let disk = Device::VirtioBlk { slot: Slot::DEFAULT, file: file.clone() };
    let disk = Config { attachable: vec![disk], devices: sibling().devices, ..attachable() };
    let node = json!({"driver": "raw", "node-name": "disk1", "file": {"driver": "file", "filename": file}});
    assert_eq!(
        attach(&disk, 0).expect("attached"),
        [
            command("blockdev-add", node),
            words(r#"device_add "virtio-blk-pci,drive=disk1,bus=port0,id=attached0,num-queues=1""#),
        ]
    );
    assert!(attach(&attachable(), 1).is_err());
    let vvu = Config { attachable: device().devices, ..attachable() };
    let error = attach(&vvu, 0).expect_err("refused").to_string();
    assert!(error.contains("a vvu device cannot be attached"), "{error}");
}

#[test]
fn numa_nodes_have_pieces_of_one_memory_file() {
    let line = line(&Config { numa_nodes: 2, ..sibling() }, Serial::Terminal);
    assert!(line.contains("-machine q35,hpet=off,sata=off,smbus=off -accel"), "{line}");
    assert!(
        line.contains(
            "-object memory-backend-file,id=mem0,size=128M,share=on,mem-path=/r/a,,b/memory -numa node,memdev=mem0 \
             -object memory-backend-file,id=mem1,size=128M,share=on,mem-path=/r/a,,b/memory,offset=128M \
             -numa node,memdev=mem1 "
        ),
        "{line}"
    );
}
