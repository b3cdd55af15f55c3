use super::*;
use std::os::unix::fs::symlink;
use tempfile::TempDir;

/// A sysfs in a directory. Files take what is written to them; nothing else happens.
struct FakeSysfs {
    root: TempDir,
    sysfs: PciSysfs,
}

impl FakeSysfs {
    fn new() -> Self {
        let root = tempfile::tempdir().expect("directory");
        let sysfs = PciSysfs::under(root.path());
        for directory in ["sys/bus/pci/devices", "sys/bus/pci/drivers/vfio-pci", "dev/vfio"] {
            fs::create_dir_all(root.path().join(directory)).expect("directory");
        }
        Self { root, sysfs }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn add(&self, bdf: &str, device: u16) -> Bdf {
        let directory = self.path("sys/bus/pci/devices").join(bdf);
        fs::create_dir(&directory).expect("directory");
        fs::write(directory.join("vendor"), "0x1af4\n").expect("vendor");
        fs::write(directory.join("device"), format!("{device:#06x}\n")).expect("device");
        bdf.parse().expect("address")
    }

    fn link(&self, bdf: Bdf, name: &str, target: &str) {
        let target = self.path("sys").join(target);
        fs::create_dir_all(&target).expect("target");
        symlink(target, self.sysfs.device(bdf).join(name)).expect("link");
    }

    fn vvu(&self) -> Bdf {
        self.add("0000:00:10.0", 0x107d)
    }

    fn bind(&self, bdf: Bdf) -> Result<VfioReady, SysfsError> {
        self.sysfs.bind(bdf, Duration::ZERO)
    }
}

#[test]
fn what_is_not_there_is_named_with_what_is() {
    let fake = FakeSysfs::new();
    let absent: Bdf = "0000:00:11.0".parse().expect("address");
    let error = fake.sysfs.ready(absent).expect_err("absent").to_string();
    assert!(error.starts_with("no PCI device 0000:00:11.0; this machine has no vvu device"), "{error}");
    fake.vvu();
    let error = fake.bind(absent).expect_err("absent").to_string();
    assert_eq!(error, "no PCI device 0000:00:11.0; the vvu devices of this machine: 0000:00:10.0");
    let other = fake.add("0000:00:01.0", 0x1041);
    let error = fake.sysfs.ready(other).expect_err("another device").to_string();
    assert!(error.contains("its PCI id is 1af4:1041, want 1af4:107d; the vvu devices"), "{error}");
}

#[test]
fn a_device_must_be_bound_to_vfio_pci_and_have_a_group() {
    let fake = FakeSysfs::new();
    let bdf = fake.vvu();
    let error = fake.sysfs.ready(bdf).expect_err("no driver").to_string();
    let want = "0000:00:10.0 is bound to no driver instead of vfio-pci: run `vvu bind 0000:00:10.0` first";
    assert_eq!(error, want);
    fake.link(bdf, "driver", "bus/pci/drivers/virtio-pci");
    let error = fake.sysfs.ready(bdf).expect_err("another driver").to_string();
    assert!(error.contains("bound to virtio-pci instead"), "{error}");
    fs::remove_file(fake.sysfs.device(bdf).join("driver")).expect("unbind");
    fake.link(bdf, "driver", "bus/pci/drivers/vfio-pci");
    assert!(matches!(fake.sysfs.ready(bdf), Err(SysfsError::NoGroup { .. })));
    fake.link(bdf, "iommu_group", "kernel/iommu_groups/7");
    let ready = fake.sysfs.ready(bdf).expect("ready");
    assert_eq!(ready, VfioReady { directory: fake.path("sys/bus/pci/devices/0000:00:10.0"), group: 7 });
}

#[test]
fn binding_takes_the_device_from_its_driver() {
    let fake = FakeSysfs::new();
    let bdf = fake.vvu();
    fake.link(bdf, "driver", "bus/pci/drivers/virtio-pci");
    fake.link(bdf, "iommu_group", "kernel/iommu_groups/3");
    let error = fake.bind(bdf).expect_err("no file").to_string();
    assert!(error.contains("dev/vfio/3 did not appear"), "{error}");
    fs::write(fake.path("dev/vfio/3"), "").expect("group file");
    assert_eq!(fake.bind(bdf).expect("bound").group, 3);
    let written = |path: &str| fs::read_to_string(fake.path("sys/bus/pci").join(path)).expect("written");
    assert_eq!(written("devices/0000:00:10.0/driver_override"), "vfio-pci");
    assert_eq!(written("drivers/virtio-pci/unbind"), "0000:00:10.0");
    assert_eq!(written("drivers/vfio-pci/bind"), "0000:00:10.0");
}

#[test]
fn binding_a_bound_device_writes_nothing() {
    let fake = FakeSysfs::new();
    let bdf = fake.vvu();
    fake.link(bdf, "driver", "bus/pci/drivers/vfio-pci");
    fake.link(bdf, "iommu_group", "kernel/iommu_groups/3");
    fs::write(fake.path("dev/vfio/3"), "").expect("group file");
    fake.bind(bdf).expect("bound");
    assert!(!fake.path("sys/bus/pci/drivers/vfio-pci/bind").exists());
    assert!(!fake.sysfs.device(bdf).join("driver_override").exists());
}

#[test]
fn binding_says_what_the_vm_lacks() {
    let fake = FakeSysfs::new();
    let bdf = fake.vvu();
    let error = fake.bind(bdf).expect_err("no group").to_string();
    assert!(error.contains("-device virtio-iommu-pci"), "{error}");
    fs::remove_file(fake.path("sys/bus/pci/drivers/vfio-pci/bind")).expect("was written");
    fs::remove_dir(fake.path("sys/bus/pci/drivers/vfio-pci")).expect("directory");
    assert!(matches!(fake.bind(bdf), Err(SysfsError::NoVfioPci)));
}

#[test]
fn reserved_ranges_are_read() {
    let fake = FakeSysfs::new();
    let file = fake.path("sys/kernel/iommu_groups/4/reserved_regions");
    assert!(matches!(fake.sysfs.reserved(4), Err(SysfsError::Io { .. })));
    fs::create_dir_all(file.parent().expect("parent")).expect("directory");
    let text = "0x0000000008000000 0x00000000080fffff msi\n0x00000000fee00000 0x00000000feefffff msi\n";
    fs::write(&file, text).expect("regions");
    let want = [(0x800_0000, 0x80f_ffff), (0xfee0_0000, 0xfeef_ffff)];
    assert_eq!(fake.sysfs.reserved(4).expect("ranges"), want);
    fs::write(&file, "nonsense\n").expect("regions");
    assert!(matches!(fake.sysfs.reserved(4), Err(SysfsError::Io { .. })));
}

#[test]
fn a_configuration_space_is_read_whole() {
    let fake = FakeSysfs::new();
    let bdf = fake.vvu();
    let path = fake.sysfs.device(bdf).join("config");
    let space: Vec<u8> = (0..=255).collect();
    fs::write(&path, &space).expect("config");
    assert_eq!(fake.sysfs.config_space(bdf).expect("read")[..], space);
    fs::write(&path, &space[..64]).expect("config");
    let error = fake.sysfs.config_space(bdf).expect_err("cut off").to_string();
    assert!(error.contains("only its start can be read; run as root"), "{error}");
}

#[test]
fn a_bar_without_an_address_is_named_with_its_remedy() {
    let fake = FakeSysfs::new();
    let bdf = fake.vvu();
    let file = fake.sysfs.device(bdf).join("resource");
    let line = |start: u64, end: u64, flags: u64| format!("{start:#018x} {end:#018x} {flags:#018x}\n");
    let none = line(0, 0, 0).repeat(4);
    for (memory, size) in [(line(0, (128 << 30) - 1, 0x2014_220c), " (128 GiB)"), (line(0, 0, 0), "")] {
        fs::write(&file, format!("{none}{memory}")).expect("resource");
        let error = fake.bind(bdf).expect_err("no address").to_string();
        let want = format!("as large as the sibling's RAM{size}: give the VM more");
        assert!(error.contains(&want) && error.contains("pci-hole64-size"), "{error}");
    }
    fs::write(&file, format!("{none}{}", line(0x380_0000_0000, 0x39f_ffff_ffff, 0x14_220c)))
        .expect("resource");
    let error = fake.bind(bdf).expect_err("no group");
    assert!(matches!(error, SysfsError::NoGroup { .. }), "{error}");
}
