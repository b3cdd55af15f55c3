//! The PCI device: dispatches accesses to its registers, queues and doorbells.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;

use super::Host;
use crate::spec::pci::Region;

/// What a vvu device is made of.
#[derive(Debug)]
pub struct DeviceConfig {
    /// The sibling memory file, of the size of the sibling's RAM.
    pub memory: File,
    /// Where the sibling's front-end connects.
    pub listener: UnixListener,
    /// vhost queues, 1 to 128.
    pub queues: u16,
    /// Identifies the device to its driver.
    pub uuid: [u8; 16],
}

/// A vvu device.
#[derive(Debug)]
pub struct Device {
    config: DeviceConfig,
}

impl Device {
    /// Makes a device in its reset state.
    ///
    /// # Errors
    /// When the kernel refuses to poll the listener.
    pub fn new(config: DeviceConfig) -> std::io::Result<Self> {
        Ok(Self { config })
    }

    /// Size in bytes of `region`: a power of two for a BAR, 0 if there is none.
    #[must_use]
    pub fn region_size(&self, _region: Region) -> u64 {
        0
    }

    /// The sibling memory file, and how many of its bytes the shared memory BAR shows, from the start
    /// of both.
    #[must_use]
    pub fn shared_memory(&self) -> (BorrowedFd<'_>, u64) {
        (self.config.memory.as_fd(), 0)
    }

    /// MSI-X vectors of the device.
    #[must_use]
    pub fn vector_count(&self) -> u16 {
        crate::spec::pci::vector_count(self.config.queues)
    }

    /// Answers a guest's read; what is not there reads as zeroes.
    pub fn read<H: Host>(&mut self, _host: &H, _region: Region, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Carries out a guest's write; what is not there ignores it.
    pub fn write<H: Host>(&mut self, _host: &H, _region: Region, _offset: u64, _data: &[u8]) {}

    /// Puts the device into its state after power-on; a connected front-end is disconnected.
    pub fn reset<H: Host>(&mut self, _host: &H) {}

    /// Readable whenever [`process`](Self::process) has something to do.
    #[must_use]
    pub fn events(&self) -> BorrowedFd<'_> {
        self.config.listener.as_fd()
    }

    /// Does what is due: connections, messages of the front-end, kicks.
    pub fn process<H: Host>(&mut self, _host: &H) {}
}
