//! The regions of a PCI device by its files in sysfs: to look at a device that somebody else drives.

use std::fs::{self, File};
use std::io;
use std::sync::atomic::Ordering;

use rustix::mm::ProtFlags;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, VolatileMemory};

use super::layout::get16;
use super::pci_device::{DeviceError, Regions};
use super::sysfs::{PciSysfs, SysfsError};
use crate::spec::addr::Bdf;
use crate::spec::pci::{CONFIG_SPACE_SIZE, Region, config};

const PAGE_SIZE: u64 = 4096;

/// A vvu device of this machine, to be read and never written. Whoever drives it does not notice.
#[derive(Debug)]
pub struct Resources {
    sysfs: PciSysfs,
    bdf: Bdf,
    space: [u8; CONFIG_SPACE_SIZE],
}

impl Resources {
    /// The vvu device `bdf`, with the configuration space it has now.
    ///
    /// # Errors
    /// Those of [`PciSysfs::config_space`].
    pub fn open(sysfs: PciSysfs, bdf: Bdf) -> Result<Self, SysfsError> {
        let space = sysfs.config_space(bdf)?;
        Ok(Self { sysfs, bdf, space })
    }

    /// The configuration space.
    #[must_use]
    pub fn config_space(&self) -> &[u8; CONFIG_SPACE_SIZE] {
        &self.space
    }

    /// Reads one register of a BAR.
    fn read_register(&self, bar: u8, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if get16(&self.space, config::COMMAND) & config::COMMAND_MEMORY == 0 {
            return Err(io::Error::other("the device does not answer, since its memory access is off"));
        }
        let page = offset - offset % PAGE_SIZE;
        let file = FileOffset::new(File::open(self.sysfs.resource(self.bdf, bar))?, page);
        let size = usize::try_from(PAGE_SIZE).map_err(io::Error::other)?;
        let memory = MmapRegionBuilder::<()>::new(size)
            .with_file_offset(file)
            .with_mmap_prot(ProtFlags::READ.bits().cast_signed())
            .with_mmap_flags(libc::MAP_SHARED)
            .build()
            .map_err(io::Error::other)?;
        let memory = memory.as_volatile_slice();
        let at = usize::try_from(offset - page).map_err(io::Error::other)?;
        // Each is one access of its width, as registers want it.
        let loaded = match data.len() {
            1 => memory.load(at, Ordering::Relaxed).map(|value: u8| vec![value]),
            2 => memory.load(at, Ordering::Relaxed).map(|value: u16| value.to_ne_bytes().to_vec()),
            4 => memory.load(at, Ordering::Relaxed).map(|value: u32| value.to_ne_bytes().to_vec()),
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        data.copy_from_slice(&loaded.map_err(io::Error::other)?);
        Ok(())
    }
}

impl Regions for Resources {
    fn region_size(&self, region: Region) -> u64 {
        match region {
            Region::Bar(bar) => fs::metadata(self.sysfs.resource(self.bdf, bar)).map_or(0, |file| file.len()),
            Region::Config => 256,
        }
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        let (len, size) = (data.len(), self.region_size(region));
        let end = offset.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        let outside = DeviceError::OutOfRange { region, offset, len, size };
        if end > size {
            return Err(outside);
        }
        match region {
            Region::Config => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                data.copy_from_slice(
                    self.space.get(start..).and_then(|rest| rest.get(..len)).ok_or(outside)?,
                );
                Ok(())
            }
            Region::Bar(bar) => self.read_register(bar, offset, data).map_err(|source| {
                let what = format!("read {len} bytes at {offset:#x} of {region:?} of {}", self.bdf);
                DeviceError::Io { what, source }
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::inspect;
    use crate::spec::pci::{COMMON_CFG, ConfigSpace, DEVICE_CFG};
    use crate::spec::virtio::{common, device_config};
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    const BDF: &str = "0000:00:10.0";

    /// A sysfs with a device whose registers are plain files.
    fn sysfs(root: &Path, memory_access: bool) -> File {
        let device = root.join("sys/bus/pci/devices").join(BDF);
        fs::create_dir_all(&device).expect("directory");
        fs::write(device.join("vendor"), "0x1af4\n").expect("vendor");
        fs::write(device.join("device"), "0x107d\n").expect("device");
        let mut space = ConfigSpace::new(19, 1 << 20).bytes;
        space[config::COMMAND] |= if memory_access { config::COMMAND_MEMORY.to_le_bytes()[0] } else { 0 };
        fs::write(device.join("config"), space).expect("configuration space");
        for (bar, size) in [(0, 0x8000), (2, 0x4000), (4, 1 << 20)] {
            File::create(device.join(format!("resource{bar}")))
                .and_then(|file| file.set_len(size))
                .expect("BAR");
        }
        File::options().write(true).open(device.join("resource0")).expect("BAR 0")
    }

    fn resources(root: &Path) -> Resources {
        Resources::open(PciSysfs::under(root), BDF.parse().expect("address")).expect("device")
    }

    #[test]
    fn a_device_in_use_is_told_without_a_write() {
        let root = tempfile::tempdir().expect("directory");
        let registers = sysfs(root.path(), true);
        let set = |at: u64, bytes: &[u8]| registers.write_all_at(bytes, at).expect("register");
        set(COMMON_CFG.offset + common::DEVICE_STATUS, &[0x0f]);
        set(COMMON_CFG.offset + common::CONFIG_GENERATION, &[7]);
        set(COMMON_CFG.offset + common::NUM_QUEUES, &[2, 0]);
        set(DEVICE_CFG.offset + device_config::STATUS, &[3, 0, 0, 0]);
        set(DEVICE_CFG.offset + device_config::MAX_VHOST_QUEUES, &[16, 0, 0, 0]);
        set(DEVICE_CFG.offset + device_config::UUID, &[9; 16]);
        let want = "\
device status: 0x0f, acknowledged, driver, features agreed, driver ready
configuration generation: 7
virtqueues: 2
features, state of each virtqueue: not told, they show after a write to a register that the driver uses
interrupt status: not told, reading it would take an interrupt away
link: 0x3, back-end up, front-end connected
vhost queues: at most 16
uuid: 09090909-0909-0909-0909-090909090909
shared memory BAR: 0x100000 bytes
";
        assert_eq!(inspect::registers_in_use(&resources(root.path())).expect("told"), want);
    }

    #[test]
    fn registers_that_do_not_answer_and_reads_outside_of_them_are_refused() {
        let root = tempfile::tempdir().expect("directory");
        sysfs(root.path(), false);
        let error = inspect::registers_in_use(&resources(root.path())).expect_err("off").to_string();
        assert!(error.contains("its memory access is off"), "{error}");
        sysfs(root.path(), true);
        let device = resources(root.path());
        for (region, offset, len) in [
            (Region::Bar(0), 0x7ffe, 4),
            (Region::Bar(1), 0, 4),
            (Region::Bar(0), u64::MAX, 4),
            (Region::Config, 254, 4),
        ] {
            let read = device.read(region, offset, &mut vec![0; len]);
            assert!(matches!(read, Err(DeviceError::OutOfRange { .. })), "{region:?} {offset:#x}: {read:?}");
        }
        assert!(matches!(device.read(Region::Bar(0), 0, &mut [0; 3]), Err(DeviceError::Io { .. })));
    }
}
