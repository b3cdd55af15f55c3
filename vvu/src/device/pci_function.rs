//! Serves the vvu device as a PCI function.

use std::os::fd::BorrowedFd;

use super::vvu_device::VvuDevice;
use crate::pci::{Host, MappableBar, PciFunction};
use crate::spec::pci::{Region, SHARED_MEMORY_BAR};

impl PciFunction for VvuDevice {
    fn region_size(&self, region: Region) -> u64 {
        self.region_size(region)
    }

    fn vector_count(&self) -> u16 {
        self.vector_count()
    }

    fn mappable_bar(&self) -> Option<MappableBar<'_>> {
        let (file, size) = self.shared_memory();
        (size > 0).then_some(MappableBar { bar: SHARED_MEMORY_BAR, file, size })
    }

    fn events(&self) -> BorrowedFd<'_> {
        self.events()
    }

    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        self.read(region, offset, data);
    }

    fn write<H: Host>(&mut self, host: &H, region: Region, offset: u64, data: &[u8]) {
        self.write(host, region, offset, data);
    }

    fn process<H: Host>(&mut self, host: &H) {
        self.process(host);
    }

    fn reset(&mut self) {
        self.reset();
    }
}
