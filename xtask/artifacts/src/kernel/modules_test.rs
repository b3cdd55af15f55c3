//! Modules in these tests are object files that the host's assembler would make: an ELF header, `.modinfo` and the names of
//! the sections.

use super::*;

/// A module whose `.modinfo` has these fields.
fn module(fields: &[&str]) -> Vec<u8> {
    const NAMES: &[u8] = b"\0.modinfo\0.shstrtab\0";
    let info: Vec<u8> = fields.iter().flat_map(|field| field.bytes().chain([0])).collect();
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // Relocatable, x86-64.
    file.extend([1, 0, 62, 0, 1, 0, 0, 0]);
    file.resize(40, 0);
    let table = 64 + info.len() + NAMES.len();
    file.extend((table as u64).to_le_bytes());
    file.extend([0; 4]);
    // Sizes of the header, no segments, three sections of 64 bytes, names in the last one.
    file.extend([64, 0, 0, 0, 0, 0, 64, 0, 3, 0, 2, 0]);
    assert_eq!(file.len(), 64, "the length of an ELF header");
    file.extend(&info);
    file.extend(NAMES);
    file.extend([0; 64]);
    for (name, kind, offset, size) in [(1_u32, 1_u32, 64, info.len()), (10, 3, 64 + info.len(), NAMES.len())]
    {
        file.extend(name.to_le_bytes());
        file.extend(kind.to_le_bytes());
        file.extend([0; 16]);
        file.extend((offset as u64).to_le_bytes());
        file.extend((size as u64).to_le_bytes());
        file.extend([0; 8]);
        file.extend(1_u64.to_le_bytes());
        file.extend([0; 8]);
    }
    file
}

/// A directory with modules, each in a file of this name with these fields.
fn tree(files: &[(&str, &[&str])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    for (path, fields) in files {
        let path = dir.path().join("kernel").join(path);
        fs::create_dir_all(path.parent().expect("below")).expect("made");
        fs::write(path, module(fields)).expect("written");
    }
    dir
}

fn names(modules: &[Module]) -> Vec<&str> {
    modules.iter().map(|module| module.name.as_str()).collect()
}

#[test]
fn what_a_module_needs_comes_before_it_and_each_comes_once() {
    let dir = tree(&[
        (
            "drivers/vfio/pci/vfio-pci.ko",
            &["license=GPL", "depends=vfio-pci-core,irqbypass", "name=vfio_pci"],
        ),
        ("drivers/vfio/pci/vfio-pci-core.ko", &["depends=vfio,irqbypass,hid"]),
        ("drivers/vfio/vfio.ko", &["depends="]),
        ("virt/lib/irqbypass.ko", &["depends="]),
        ("drivers/vfio/vfio_iommu_type1.ko", &["depends=vfio"]),
    ]);
    fs::write(dir.path().join(BUILTIN), "kernel/drivers/hid/hid.ko\n").expect("written");
    std::os::unix::fs::symlink("..", dir.path().join("build")).expect("linked");
    let modules = Modules::open(dir.path()).expect("opened");
    assert_eq!(modules.len(), 5);
    let order = modules.load_order(["vfio_iommu_type1", "vfio-pci", "hid"]).expect("complete");
    assert_eq!(names(&order), ["vfio", "vfio_iommu_type1", "irqbypass", "vfio_pci_core", "vfio_pci"]);
    assert!(order.iter().all(|module| module.bytes.starts_with(b"\x7fELF")));
    assert_eq!(modules.load_order([]).expect("nothing"), []);
}

#[test]
fn a_compressed_module_is_decompressed() {
    let dir = tree(&[("a.ko", &["depends="])]);
    let plain = fs::read(dir.path().join("kernel/a.ko")).expect("read");
    let status = std::process::Command::new("xz").arg(dir.path().join("kernel/a.ko")).status();
    assert!(status.expect("xz runs").success());
    let order = Modules::open(dir.path()).and_then(|modules| modules.load_order(["a"])).expect("read");
    assert_eq!(order, [Module { name: "a".to_owned(), bytes: plain }]);
}

#[test]
fn a_missing_module_is_named_with_who_needs_it() {
    let dir = tree(&[("virtio_net.ko", &["depends=net_failover"])]);
    let modules = Modules::open(dir.path()).expect("opened");
    let error = format!("{:#}", modules.load_order(["virtio_net"]).expect_err("incomplete"));
    assert!(error.contains("virtio_net needs net_failover") && error.contains("no module"), "{error}");
}

#[test]
fn files_that_are_no_modules_are_refused_and_a_circle_ends() {
    let dir = tree(&[("a.ko", &["depends=b"]), ("b.ko", &["depends=a"])]);
    let modules = Modules::open(dir.path()).expect("opened");
    assert_eq!(names(&modules.load_order(["a"]).expect("ended")), ["b", "a"]);
    let whole = module(&["depends=b"]);
    for bytes in [&b"nothing"[..], b"", b"\x7fELF", &whole[..100], &whole[..whole.len() - 1]] {
        fs::write(dir.path().join("kernel/a.ko"), bytes).expect("written");
        let error = modules.load_order(["a"]).expect_err("refused").to_string();
        assert!(error.contains("a.ko"), "{error}");
    }
    let empty = tempfile::tempdir().expect("a directory");
    let error = Modules::open(empty.path()).expect_err("empty").to_string();
    assert!(error.contains("no kernel module"), "{error}");
}
