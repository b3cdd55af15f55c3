//! What the tests of driver and bridge stand on: the vvu device in the process of its driver, and one that lies.

pub(crate) use liar::Liar;
pub(crate) use local::LocalDevice;

use std::os::unix::net::UnixListener;

use crate::device::{DeviceConfig, SiblingMemory, VvuDevice};

mod liar;
mod local;

/// Bytes of the sibling's memory.
pub(crate) const MEMORY: u64 = 1 << 20;

/// A vvu device after power-on, whose socket nobody can connect to.
pub(crate) fn vvu_device(queues: u16) -> VvuDevice {
    let directory = tempfile::tempdir().expect("directory");
    let listener = UnixListener::bind(directory.path().join("s")).expect("bind");
    let memory = SiblingMemory::create(MEMORY).expect("memory");
    VvuDevice::new(DeviceConfig { memory, listener, queues, uuid: [7; 16] }).expect("device")
}
