//! VMs and machines that the tests of all VMMs use.

use std::path::Path;

use crate::vm::addr::Slot;
use crate::vm::config::{Boot, Config, Device};
use crate::vm::frontend::{BlockFrontend, Frontend};
use crate::vm::iommu::Iommu;

/// What every VM boots.
pub(super) fn boot() -> Boot<'static> {
    Boot { kernel: Path::new("/c/vmlinux"), initramfs: Path::new("/c/device.cpio") }
}

/// A device VM.
pub(super) fn device() -> Config {
    Config {
        name: "device".into(),
        memory_mib: 512,
        cpus: 1,
        iommu: Some(Iommu::Virtio),
        devices: vec![Device::Vvu { slot: Slot::DEFAULT, socket: "/r/vfio-user.sock".into() }],
        ..Config::default()
    }
}

/// A sibling VM with a disk, whose paths have a comma.
pub(super) fn sibling() -> Config {
    Config {
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
    }
}

/// A sibling VM with this front-end, in scenario JSON, at slot 0x11.
pub(super) fn with_frontend(text: &str) -> Config {
    let frontend: Frontend = serde_json::from_str(text).expect("a front-end");
    frontend.check().expect("valid");
    let (slot, socket) = (Slot::new(0x11), "/s".to_owned());
    Config { devices: vec![Device::VhostUser { slot, socket, frontend, reconnect_ms: 0 }], ..sibling() }
}
