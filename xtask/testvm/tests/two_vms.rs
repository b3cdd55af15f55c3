//! Drives two VMs through the library, without a scenario.

use std::time::Duration;

use regex::Regex;
use rustix::process::{Pid, Signal, kill_process};
use vvu_process::progress::Progress;
use vvu_testvm::{Device, Frontend, Iommu, Lab, Needs, ProxyConfig, RunDir, Setup, SetupOptions, VmConfig};

/// RAM of each VM in MiB.
const MEMORY_MIB: u64 = 256;

fn setup() -> Setup {
    let needs = Needs::default();
    Setup::obtain(&SetupOptions::default(), &needs, &Progress::new(true)).expect("QEMU, kernel and images")
}

fn device_vm(devices: Vec<Device>) -> VmConfig {
    VmConfig { iommu: Some(Iommu::Virtio), devices, ..VmConfig::new("device", MEMORY_MIB) }
}

#[test]
fn a_disk_of_the_device_vm_appears_in_the_sibling_vm() -> anyhow::Result<()> {
    let (setup, dir) = (setup(), tempfile::tempdir()?);
    let run = RunDir::create(dir.path(), "two-vms")?;
    let lab = Lab::new(&run, &setup)?;

    let vvu = ProxyConfig::new("vvu", MEMORY_MIB, lab.sockets());
    let proxy = lab.proxy(&vvu)?;
    let device = lab.vm(&device_vm(vvu.devices()))?;
    device.run("vvu bind 0000:00:10.0 && truncate -s 64M /disk.img && echo from the device > /first")?;
    device.run("dd if=/first of=/disk.img conv=notrunc")?;
    let serve = "vvu device block --vfio 0000:00:10.0 --file /disk.img";
    device.spawn("back-end", serve, 0, lab.deadline(Duration::from_secs(10)))?;

    let sibling = lab.vm(&VmConfig {
        memory_file: Some(vvu.memory_file()),
        devices: vec![vvu.vhost_user_device(Frontend::default())],
        ..VmConfig::new("sibling", MEMORY_MIB)
    })?;
    let vda =
        sibling.wait_for(&Regex::new(r"\[vda\] (\d+) 512-byte")?, lab.deadline(Duration::from_secs(30)))?;
    assert_eq!(vda.value, "131072");
    assert_eq!(sibling.run("head -n 1 /dev/vda")?, "from the device\n");

    drop((sibling, device));
    proxy.stop()?;
    lab.check_leftovers().map(drop)
}

#[test]
fn a_wait_for_one_vm_ends_when_another_one_is_gone() -> anyhow::Result<()> {
    let (setup, dir) = (setup(), tempfile::tempdir()?);
    let run = RunDir::create(dir.path(), "two-vms")?;
    let lab = Lab::new(&run, &setup)?;
    let (one, two) = (lab.vm(&VmConfig::new("one", 128))?, lab.vm(&VmConfig::new("two", 128))?);
    one.ready(lab.deadline(Duration::from_secs(20)))?;
    let pid = i32::try_from(two.id()).ok().and_then(Pid::from_raw).expect("a process id");
    kill_process(pid, Signal::KILL)?;
    let far = lab.deadline(Duration::from_secs(600));
    let error = one.wait_for(&Regex::new("never")?, far).expect_err("the other VM is gone").to_string();
    assert!(error.contains("VM two: the VMM ended"), "{error}");
    Ok(())
}
