//! A PCI device of this machine through VFIO, for the driver in the guest.
#![expect(
    unsafe_code,
    reason = "maps memory for DMA, and uses a descriptor and an ioctl vfio-ioctls keeps to itself"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_IOEVENTFD_16, VFIO_DEVICE_IOEVENTFD_32, VFIO_TYPE, vfio_device_ioeventfd,
};
use vfio_ioctls::{VfioContainer, VfioError};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::sysfs::{PciSysfs, SysfsError, VfioReady, mapping_hint};
use crate::event::Event;
use crate::pci::{
    BarFile, DeviceError, DmaBuffer, Doorbell, DoorbellValue, PciDevice, check_access, vfio_region_index,
};
use crate::spec::PAGE_SIZE;
use crate::spec::addr::{Bdf, Iova};
use crate::spec::pci::Region;

/// Range of the I/O virtual addresses given out: above the ranges that firmware uses, and within the reach of every
/// IOMMU.
const IOVA_START: u64 = 16 << 20;
const IOVA_END: u64 = 1 << 32;

/// `_IO(VFIO_TYPE, VFIO_BASE + 16)` of the kernel header.
const VFIO_DEVICE_IOEVENTFD: libc::c_ulong =
    ((VFIO_TYPE as libc::c_ulong) << 8) | (VFIO_BASE as libc::c_ulong + 16);

/// A device cannot be opened through VFIO.
#[derive(Debug, thiserror::Error)]
pub enum VfioOpenError {
    /// The device is not there, not a vvu device, or not bound to vfio-pci.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
    /// The kernel has no VFIO, or this process may not use it.
    #[error(
        "cannot open /dev/vfio/vfio: {0}; run as root on a kernel with CONFIG_VFIO and CONFIG_VFIO_CONTAINER"
    )]
    Container(io::Error),
    /// Another process has opened the IOMMU group.
    #[error("IOMMU group {group} is in use by another process: stop the back-end that runs on {bdf}")]
    Busy {
        /// The device.
        bdf: Bdf,
        /// The IOMMU group of the device.
        group: u32,
    },
    /// The IOMMU group cannot be opened.
    #[error("cannot open /dev/vfio/{group}: {source}; run as root")]
    Group {
        /// The IOMMU group.
        group: u32,
        /// The cause.
        source: io::Error,
    },
    /// Another device of the group is not bound to vfio-pci.
    #[error(
        "IOMMU group {group} of {bdf} has other devices that kernel drivers use: bind every device in \
         /sys/kernel/iommu_groups/{group}/devices to vfio-pci, or give {bdf} a group of its own"
    )]
    NotViable {
        /// The device.
        bdf: Bdf,
        /// The IOMMU group of the device.
        group: u32,
    },
    /// The IOMMU cannot keep the device from raising interrupts of other devices.
    #[error(
        "VFIO refuses the IOMMU since it does not remap interrupts: add \
         vfio_iommu_type1.allow_unsafe_interrupts=1 to the kernel command line, or use an IOMMU with \
         interrupt remapping (QEMU: `-device intel-iommu,intremap=on`)"
    )]
    UnsafeInterrupts,
    /// Another operation of VFIO failed.
    #[error("VFIO on {bdf}: {source}")]
    Vfio {
        /// The device.
        bdf: Bdf,
        /// The cause.
        source: VfioError,
    },
}

impl VfioOpenError {
    fn new(bdf: Bdf, group: u32, error: VfioError) -> Self {
        match error {
            VfioError::OpenContainer(source) => Self::Container(source),
            VfioError::OpenGroup(source, _) if source.raw_os_error() == Some(libc::EBUSY) => {
                Self::Busy { bdf, group }
            }
            VfioError::OpenGroup(source, _) => Self::Group { group, source },
            VfioError::GroupViable => Self::NotViable { bdf, group },
            VfioError::ContainerSetIOMMU(errno) if errno.errno() == libc::EPERM => Self::UnsafeInterrupts,
            source => Self::Vfio { bdf, source },
        }
    }
}

/// A PCI device that is bound to vfio-pci. Dropping it returns the device to the kernel, which removes all DMA maps and
/// interrupts.
pub struct VfioDevice {
    device: vfio_ioctls::VfioDevice,
    container: Arc<VfioContainer>,
    sysfs: PciSysfs,
    bdf: Bdf,
    state: Mutex<State>,
}

struct State {
    iovas: IovaSpace,
    msix: bool,
    /// The log says that BARs are mapped through VFIO.
    through_vfio: bool,
}

impl std::fmt::Debug for VfioDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VfioDevice").field("bdf", &self.bdf).finish_non_exhaustive()
    }
}

impl VfioDevice {
    /// Opens the vvu device `bdf`.
    ///
    /// # Errors
    /// [`VfioOpenError`].
    pub fn open(sysfs: PciSysfs, bdf: Bdf) -> Result<Self, VfioOpenError> {
        let ready = sysfs.ready(bdf)?;
        Self::open_ready(sysfs, bdf, ready)
    }

    /// Opens the express device `bdf`.
    ///
    /// # Errors
    /// [`VfioOpenError`].
    pub(super) fn open_express(sysfs: PciSysfs, bdf: Bdf) -> Result<Self, VfioOpenError> {
        let ready = sysfs.vfio_ready(bdf)?;
        Self::open_ready(sysfs, bdf, ready)
    }

    fn open_ready(sysfs: PciSysfs, bdf: Bdf, ready: VfioReady) -> Result<Self, VfioOpenError> {
        let VfioReady { directory, group } = ready;
        let reserved = sysfs.reserved(group)?;
        let failed = |error| VfioOpenError::new(bdf, group, error);
        let container = Arc::new(VfioContainer::new(None).map_err(failed)?);
        let device = vfio_ioctls::VfioDevice::new(&directory, container.clone(), false).map_err(failed)?;
        let state =
            State { iovas: IovaSpace { next: IOVA_START, reserved }, msix: false, through_vfio: false };
        Ok(Self { device, container, sysfs, bdf, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the device has its descriptor open until it is dropped.
        unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) }
    }

    /// Returns the offset of an access in the device's descriptor.
    fn locate(&self, region: Region, offset: u64, len: usize) -> Result<u64, DeviceError> {
        check_access(region, offset, len, self.region_size(region))?;
        Ok(self.device.get_region_offset(vfio_region_index(region)) + offset)
    }

    fn access(
        &self,
        verb: &str,
        region: Region,
        offset: u64,
        len: usize,
        access: impl FnOnce(u64) -> rustix::io::Result<usize>,
    ) -> Result<(), DeviceError> {
        let at = self.locate(region, offset, len)?;
        let failed = |source| {
            let what = format!("{verb} {len} bytes at {offset:#x} of {region:?} of {}", self.bdf);
            Err(DeviceError::Io { what, source })
        };
        match access(at) {
            Ok(done) if done == len => Ok(()),
            Ok(done) => failed(io::Error::other(format!("the kernel stopped after {done}"))),
            Err(error) => failed(error.into()),
        }
    }
}

/// What VFIO takes instead of an eventfd to forget a doorbell.
const NO_EVENTFD: RawFd = -1;

impl VfioDevice {
    /// Makes the kernel ring `doorbell` for the eventfd with this number from now on.
    fn set_ioeventfd(&self, doorbell: Doorbell, eventfd: RawFd) -> Result<(), DeviceError> {
        let (data, flags) = match doorbell.value {
            DoorbellValue::Le16(value) => (u64::from(value), VFIO_DEVICE_IOEVENTFD_16),
            DoorbellValue::Le32(value) => (u64::from(value), VFIO_DEVICE_IOEVENTFD_32),
        };
        let request = vfio_device_ioeventfd {
            argsz: u32::try_from(size_of::<vfio_device_ioeventfd>()).unwrap_or(0),
            flags,
            offset: self.locate(Region::Bar(doorbell.bar), doorbell.offset, doorbell.width())?,
            data,
            fd: eventfd,
            reserved: 0,
        };
        // SAFETY: the ioctl reads the request and nothing else of this process; the kernel holds the
        // eventfd itself.
        if unsafe { ioctl_with_ref(&self.device, VFIO_DEVICE_IOEVENTFD, &request) } == 0 {
            return Ok(());
        }
        let source = io::Error::last_os_error();
        Err(DeviceError::Io { what: format!("set the eventfd of {doorbell:?} of {}", self.bdf), source })
    }
}

impl PciDevice for VfioDevice {
    fn region_size(&self, region: Region) -> u64 {
        self.device.get_region_size(vfio_region_index(region))
    }

    // region_read and region_write of vfio-ioctls do not report failures.
    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        self.access("read", region, offset, data.len(), |at| rustix::io::pread(self.fd(), data, at))
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.access("write", region, offset, data.len(), |at| rustix::io::pwrite(self.fd(), data, at))
    }

    fn bar_file(&self, bar: u8) -> Result<BarFile, DeviceError> {
        // Most back-ends expect a file that begins with the memory, as the one in sysfs does.
        let path = self.sysfs.resource(self.bdf, bar);
        let open = || OpenOptions::new().read(true).write(true).open(&path);
        let refused = match open().and_then(|file| mappable(file, 0)) {
            Ok(found) => return Ok(found),
            Err(error) => error,
        };
        let failed = |source: io::Error| DeviceError::Io {
            what: format!(
                "map {} ({refused}{}) or the BAR through VFIO",
                path.display(),
                mapping_hint(&refused)
            ),
            source,
        };
        let offset = self.device.get_region_offset(vfio_region_index(Region::Bar(bar)));
        let file = self.fd().try_clone_to_owned().map_err(failed)?;
        let found = mappable(file.into(), offset).map_err(failed)?;
        if !std::mem::replace(&mut self.state().through_vfio, true) {
            log::warn!(
                "cannot map {}: {refused}; the back-end maps the BAR through VFIO instead, at an offset, which not \
                 every back-end can{}",
                path.display(),
                mapping_hint(&refused)
            );
        }
        Ok(found)
    }

    fn map_registers(&self, bar: u8) -> Option<Arc<MmapRegion>> {
        let offset = self.device.get_region_offset(vfio_region_index(Region::Bar(bar)));
        let file = FileOffset::new(self.fd().try_clone_to_owned().ok()?.into(), offset);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let mapped =
            MmapRegion::build(Some(file), usize::try_from(PAGE_SIZE).ok()?, access, libc::MAP_SHARED);
        mapped
            .inspect_err(|error| log::info!("cannot map BAR {bar} of {}: {error}", self.bdf))
            .ok()
            .map(Arc::new)
    }

    fn allocate_dma(&self, len: usize) -> Result<DmaBuffer, DeviceError> {
        let failed = |source| DeviceError::Io { what: format!("allocate {len} bytes for DMA"), source };
        let pages = u64::try_from(len).ok().and_then(|len| len.checked_next_multiple_of(PAGE_SIZE));
        let bytes = pages.filter(|bytes| *bytes > 0).ok_or_else(|| failed(Errno::INVAL.into()))?;
        let len = usize::try_from(bytes).map_err(|_| failed(Errno::NOMEM.into()))?;
        let memory = MmapRegion::new(len).map_err(|error| failed(io::Error::other(error)))?;
        let iova = self.state().iovas.take(bytes).ok_or_else(|| failed(Errno::NOSPC.into()))?;
        // SAFETY: only volatile accesses reach the memory, since it is handed out as a region of
        // vm-memory that nobody else knows of. The kernel holds the pages until the container is
        // closed, so the device can never reach memory of another use even after the region is gone.
        unsafe { self.container.vfio_dma_map(iova, len, memory.as_ptr()) }.map_err(|error| {
            let hint = "is the limit on locked memory (`ulimit -l`) too low?";
            failed(io::Error::other(format!("{error}; {hint}")))
        })?;
        Ok(DmaBuffer { memory, iova: Iova(iova) })
    }

    fn enable_msix(&self, vectors: &[&Event]) -> Result<(), DeviceError> {
        let failed = |error: VfioError| DeviceError::Io {
            what: format!("set {} MSI-X vectors of {}", vectors.len(), self.bdf),
            source: io::Error::other(error),
        };
        let events = vectors.iter().map(|event| to_event_fd(event)).collect::<io::Result<Vec<_>>>();
        let events =
            events.map_err(|error| DeviceError::other("share the events of MSI-X vectors", error))?;
        let mut state = self.state();
        if std::mem::take(&mut state.msix) {
            self.device.disable_msix().map_err(failed)?;
        }
        let vectors: Vec<_> = events.iter().collect();
        self.device.enable_msix(vectors).map_err(failed)?;
        state.msix = true;
        Ok(())
    }

    fn bind_doorbell(&self, doorbell: Doorbell, event: &Event) -> Result<(), DeviceError> {
        self.set_ioeventfd(doorbell, event.as_fd().as_raw_fd())
    }

    fn unbind_doorbell(&self, doorbell: Doorbell) -> Result<(), DeviceError> {
        self.set_ioeventfd(doorbell, NO_EVENTFD)
    }
}

/// Checks that `file` can be mapped at `offset`, for a page and without an access.
fn mappable(file: File, offset: u64) -> io::Result<BarFile> {
    let page = FileOffset::new(file.try_clone()?, offset);
    let size = usize::try_from(PAGE_SIZE).map_err(io::Error::other)?;
    match MmapRegion::<()>::build(Some(page), size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED) {
        Ok(_) => Ok(BarFile { file, offset }),
        Err(MmapRegionError::Mmap(error)) => Err(error),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// Makes a handle of `event` of the type that vfio-ioctls wants.
fn to_event_fd(event: &Event) -> io::Result<EventFd> {
    let fd = event.as_fd().try_clone_to_owned()?;
    // SAFETY: nobody else owns the descriptor.
    Ok(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
}

/// Allocates I/O virtual addresses; none is used twice.
#[derive(Debug)]
struct IovaSpace {
    next: u64,
    /// Ranges (first, last) that the IOMMU reserves, such as the window for interrupts.
    reserved: Vec<(u64, u64)>,
}

impl IovaSpace {
    /// Allocates `len` bytes, a multiple of the page size; `None` if the range is used up.
    fn take(&mut self, len: u64) -> Option<u64> {
        loop {
            let start = self.next;
            let end = start.checked_add(len).filter(|end| *end <= IOVA_END)?;
            let hit = self.reserved.iter().find(|(first, last)| *first < end && start <= *last);
            match hit {
                None => {
                    self.next = end;
                    return Some(start);
                }
                Some((_, last)) => {
                    self.next = last.checked_add(1)?.checked_next_multiple_of(PAGE_SIZE)?;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::errno;

    #[test]
    fn iovas_step_over_what_is_reserved() {
        let reserved = vec![(0x100_1000, 0x100_17ff), (0x100_1800, 0x100_2fff), (0xfee0_0000, 0xfeef_ffff)];
        let mut space = IovaSpace { next: IOVA_START, reserved };
        assert_eq!(space.take(0x1000), Some(0x100_0000));
        assert_eq!(space.take(0x1000), Some(0x100_3000));
        assert_eq!(space.take(0xfe00_0000 - 0x1000), None, "crosses the interrupt window");
        assert_eq!(space.take(0x1000), Some(0xfef0_0000));
        assert_eq!(space.take(0x110_0000), None);
        assert_eq!(IovaSpace { next: IOVA_START, reserved: vec![(0, u64::MAX)] }.take(0x1000), None);
    }

    #[test]
    fn failures_to_open_name_their_remedy() {
        let bdf: Bdf = "0000:00:10.0".parse().expect("address");
        let text = |error| VfioOpenError::new(bdf, 7, error).to_string();
        let errno = |number| errno::Error::new(number);
        let unsafe_interrupts = text(VfioError::ContainerSetIOMMU(errno(libc::EPERM)));
        assert!(unsafe_interrupts.contains("vfio_iommu_type1.allow_unsafe_interrupts=1"));
        assert!(unsafe_interrupts.contains("intremap=on"));
        let other = text(VfioError::ContainerSetIOMMU(errno(libc::EINVAL)));
        assert!(other.starts_with("VFIO on 0000:00:10.0"), "{other}");
        let open = |number| VfioError::OpenGroup(io::Error::from_raw_os_error(number), "7".to_owned());
        assert!(text(open(libc::EBUSY)).contains("in use by another process"));
        assert!(text(open(libc::EACCES)).ends_with("run as root"));
        assert!(text(VfioError::GroupViable).contains("/sys/kernel/iommu_groups/7/devices"));
        let container = VfioError::OpenContainer(io::Error::from_raw_os_error(libc::ENOENT));
        assert!(text(container).contains("CONFIG_VFIO"));
    }

    #[test]
    fn only_what_can_be_mapped_counts_as_a_file_of_a_bar() {
        let memory = tempfile::tempfile().expect("file");
        memory.set_len(2 * PAGE_SIZE).expect("size");
        assert_eq!(mappable(memory, PAGE_SIZE).expect("mapped").offset, PAGE_SIZE);
        let (read, _write) = io::pipe().expect("pipe");
        assert!(mappable(File::from(std::os::fd::OwnedFd::from(read)), 0).is_err());
    }

    #[test]
    fn the_ioctl_has_the_number_of_the_kernel_header() {
        assert_eq!(VFIO_DEVICE_IOEVENTFD, 0x3b74);
    }

    #[test]
    fn what_sysfs_lacks_is_told_before_vfio_is_asked() {
        let root = tempfile::tempdir().expect("directory");
        let bdf: Bdf = "0000:00:10.0".parse().expect("address");
        let error = VfioDevice::open(PciSysfs::under(root.path()), bdf).expect_err("absent");
        assert!(matches!(error, VfioOpenError::Sysfs(SysfsError::Absent { .. })));
    }
}
