//! A PCI device behind a vfio-user server, for a driver in a process that is no VMM.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::event::Event;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use vm_memory::{FileOffset, MmapRegion};

use connection::{Connection, RegionView};
pub(crate) use doorbells::Doorbells;

use crate::pci::{BarFile, DeviceError, DmaBuffer, Doorbell, PciDevice, check_access, vfio_region_index};
use crate::spec::PAGE_SIZE;
use crate::spec::addr::Iova;
use crate::spec::pci::{Region, cap_id, config, msix};
use crate::vfio_user::protocol::REGION_COUNT;

mod connection;
mod doorbells;

/// First I/O virtual address given out.
const FIRST_IOVA: u64 = 1 << 32;

/// A device that a vfio-user server hosts. Dropping it disconnects, which takes all DMA maps and
/// interrupts away.
#[derive(Debug)]
pub struct VfioUserDevice {
    connection: Arc<Connection>,
    regions: Vec<RegionView>,
    vectors: u32,
    next_iova: Mutex<u64>,
    doorbells: Doorbells,
}

impl VfioUserDevice {
    /// Connects to the server that listens at `path`.
    ///
    /// # Errors
    /// [`DeviceError`] when there is none, or when it does not speak vfio-user for a PCI device.
    pub fn connect(path: &Path) -> Result<Self, DeviceError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| DeviceError::Io { what: format!("connect to {}", path.display()), source })?;
        Self::from_stream(stream)
    }

    /// Uses a stream that is connected to a server.
    ///
    /// # Errors
    /// [`DeviceError`] when the server does not speak vfio-user for a PCI device.
    pub fn from_stream(stream: UnixStream) -> Result<Self, DeviceError> {
        let connection = Arc::new(Connection::new(stream)?);
        connection.device_info()?;
        let regions = (0..REGION_COUNT).map(|index| connection.region(index)).collect::<Result<_, _>>()?;
        let vectors = connection.vector_count()?;
        let doorbells = Doorbells::new({
            let connection = Arc::clone(&connection);
            move |doorbell: Doorbell| {
                doorbell.ring(|region, offset, data| connection.write(region, offset, data))
            }
        })?;
        Ok(Self { connection, regions, vectors, next_iova: Mutex::new(FIRST_IOVA), doorbells })
    }

    fn region(&self, region: Region) -> Option<&RegionView> {
        self.regions.get(usize::try_from(vfio_region_index(region)).ok()?)
    }

    fn check(&self, region: Region, offset: u64, len: usize) -> Result<(), DeviceError> {
        check_access(region, offset, len, self.region_size(region))
    }

    /// Turns the device's MSI-X capability on, as the kernel does for VFIO.
    fn set_msix_enable(&self) -> Result<(), DeviceError> {
        let read_byte = |at: u8| {
            let mut byte = [0];
            self.read(Region::Config, at.into(), &mut byte).map(|()| byte[0])
        };
        let [pointer, ..] = config::CAPABILITIES.to_le_bytes();
        let mut at = read_byte(pointer)?;
        // Each capability takes four bytes at least, so there are no more than this.
        for _ in 0..48 {
            if at < 0x40 {
                break;
            }
            if read_byte(at)? == cap_id::MSIX {
                let control_at = u64::from(at) + msix::CONTROL as u64;
                let mut control = [0; 2];
                self.read(Region::Config, control_at, &mut control)?;
                let enabled = (u16::from_le_bytes(control) | msix::CONTROL_ENABLE) & !msix::CONTROL_MASK_ALL;
                return self.write(Region::Config, control_at, &enabled.to_le_bytes());
            }
            at = read_byte(at.saturating_add(1))?;
        }
        Err(DeviceError::other("enable MSI-X", "the device has no MSI-X capability"))
    }
}

impl PciDevice for VfioUserDevice {
    fn region_size(&self, region: Region) -> u64 {
        self.region(region).map_or(0, |view| view.size)
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        self.check(region, offset, data.len())?;
        self.connection.read(region, offset, data)
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.check(region, offset, data.len())?;
        self.connection.write(region, offset, data)
    }

    fn bar_file(&self, bar: u8) -> Result<BarFile, DeviceError> {
        let what = || format!("map BAR {bar}");
        let view = self.region(Region::Bar(bar)).and_then(|view| view.file.as_ref());
        let (file, offset) =
            view.ok_or_else(|| DeviceError::other(what(), "the server gives no file for it"))?;
        let file = file.try_clone().map_err(|source| DeviceError::Io { what: what(), source })?;
        Ok(BarFile { file, offset: *offset })
    }

    fn map_registers(&self, _bar: u8) -> Option<Arc<MmapRegion>> {
        None
    }

    fn allocate_dma(&self, len: usize) -> Result<DmaBuffer, DeviceError> {
        let what = || format!("allocate {len} bytes for DMA");
        let size = u64::try_from(len).ok().and_then(|len| len.max(1).checked_next_multiple_of(PAGE_SIZE));
        let size = size.ok_or_else(|| DeviceError::other(what(), Errno::NOMEM))?;
        let file =
            memfd_create("dma", MemfdFlags::CLOEXEC).map_err(|error| DeviceError::other(what(), error))?;
        ftruncate(&file, size).map_err(|error| DeviceError::other(what(), error))?;
        let for_server = file.try_clone().map_err(|error| DeviceError::other(what(), error))?;
        let length = usize::try_from(size).map_err(|error| DeviceError::other(what(), error))?;
        let memory = MmapRegion::from_file(FileOffset::new(File::from(file), 0), length)
            .map_err(|error| DeviceError::other(what(), error))?;
        let iova = {
            let mut next = self.next_iova.lock().unwrap_or_else(PoisonError::into_inner);
            let iova = *next;
            // A page that is never mapped keeps overruns from reaching the next buffer.
            *next = size
                .checked_add(PAGE_SIZE)
                .and_then(|size| iova.checked_add(size))
                .ok_or_else(|| DeviceError::other(what(), Errno::NOMEM))?;
            iova
        };
        self.connection.map_dma(iova, size, for_server)?;
        Ok(DmaBuffer { memory, iova: Iova(iova) })
    }

    fn enable_msix(&self, vectors: &[&Event]) -> Result<(), DeviceError> {
        let count = u32::try_from(vectors.len()).ok().filter(|count| *count <= self.vectors);
        let count = count.ok_or_else(|| {
            let what = format!("enable {} MSI-X vectors", vectors.len());
            DeviceError::other(what, format!("the device has {}", self.vectors))
        })?;
        self.connection.set_vectors(vectors)?;
        self.connection.clear_vectors(count, self.vectors - count)?;
        self.set_msix_enable()
    }

    fn bind_doorbell(&self, doorbell: Doorbell, event: &Event) -> Result<(), DeviceError> {
        self.check(Region::Bar(doorbell.bar), doorbell.offset, doorbell.width())?;
        self.doorbells.bind(doorbell, event)
    }

    fn unbind_doorbell(&self, doorbell: Doorbell) -> Result<(), DeviceError> {
        self.doorbells.unbind(doorbell);
        Ok(())
    }
}
