use std::fs;
use std::os::unix::fs::PermissionsExt;

use vvu_artifacts::accel::Kind;
use vvu_artifacts::machine::X86_64;

use super::super::rig::{boot, device, sibling, with_frontend};
use super::*;

fn vmm() -> CloudHypervisor {
    CloudHypervisor { program: "/b/cloud-hypervisor".into(), version: "v48.0.0".into(), machine: &X86_64 }
}

fn line(config: &Config) -> String {
    vmm().arguments(config, Kind::Kvm, boot(), Serial::Terminal).expect("valid").join(" ")
}

fn refused(config: &Config, accelerator: Kind, serial: Serial<'_>) -> String {
    vmm().arguments(config, accelerator, boot(), serial).expect_err("refused").to_string()
}

#[test]
fn the_siblings_ram_is_a_memory_zone_of_the_memory_file() {
    assert_eq!(
        line(&sibling()),
        "--kernel /c/vmlinux --initramfs /c/device.cpio \
         --cmdline console=ttyS0 loglevel=6 panic=-1 no_timer_check vvu.hostname=sibling vvu.shell debug \
         --cpus boot=2 --memory size=0 --memory-zone id=mem0,size=256M,file=\"/r/a,b/memory\",shared=on \
         --serial tty --console off \
         --disk vhost_user=on,socket=\"/r/a,b/v.sock\",num_queues=2,queue_size=256,pci_device_id=16"
    );
    let own = line(&Config { memory_file: None, devices: Vec::new(), ..sibling() });
    assert!(own.contains(" --memory size=256M,shared=on --serial tty"), "{own}");
}

#[test]
fn each_front_end_becomes_a_device_of_cloud_hypervisor() {
    let device = |text: &str| {
        let line = line(&with_frontend(text));
        line.split_once("--console off ").expect("before the devices").1.to_owned()
    };
    assert_eq!(
        device(r#"{"net": {"queue_pairs": 2, "queue_size": 64}}"#),
        "--net vhost_user=on,vhost_mode=client,socket=/s,num_queues=4,queue_size=64,pci_device_id=17"
    );
    assert_eq!(
        device(r#"{"fs": {"tag": "t"}}"#),
        "--fs tag=t,socket=/s,num_queues=1,queue_size=256,pci_device_id=17"
    );
    assert_eq!(
        device(r#"{"vsock": {}}"#),
        "--generic-vhost-user device_type=vsock,socket=/s,queue_sizes=[256,256,256],pci_device_id=17"
    );
    let config = with_frontend(r#"{"block": {"features": {"event_idx": false}}}"#);
    let error = refused(&config, Kind::Kvm, Serial::Terminal);
    assert!(error.contains("no options for `features`"), "{error}");
}

#[test]
fn a_run_that_it_cannot_do_is_refused_with_the_reason() {
    let tcg = refused(&sibling(), Kind::Tcg, Serial::Terminal);
    assert_eq!(tcg, "sibling: Cloud Hypervisor does not run on tcg: it needs kvm");
    let ports = refused(&sibling(), Kind::Kvm, Serial::Inherited { management: None });
    assert!(ports.contains("cannot inherit a control port"), "{ports}");
    let device = refused(&device(), Kind::Kvm, Serial::Terminal);
    assert!(device.contains("such as QEMU 10.1 or later"), "{device}");
    let quote =
        refused(&Config { memory_file: Some("/a\"b".into()), ..sibling() }, Kind::Kvm, Serial::Terminal);
    assert!(quote.contains("no quotation mark"), "{quote}");
}

#[test]
fn only_a_program_that_answers_as_cloud_hypervisor_is_taken() {
    let dir = tempfile::tempdir().expect("a directory");
    let program = |text: &str| {
        let path = dir.path().join(PROGRAM);
        fs::write(&path, format!("#!/bin/sh\necho {text}\n")).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("made executable");
        CloudHypervisor::at(path)
    };
    assert_eq!(program("cloud-hypervisor v48.0.0").expect("it is").version(), "v48.0.0");
    let error = program("something else").expect_err("it is not").to_string();
    assert!(error.contains("does not answer as Cloud Hypervisor"), "{error}");
}
