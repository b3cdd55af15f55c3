//! PCI devices in sysfs: finds a vvu device, binds it to vfio-pci, and reports what is missing.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::spec::addr::Bdf;
use crate::spec::express;
use crate::spec::pci::{CONFIG_SPACE_SIZE, DEVICE_ID, SHARED_MEMORY_BAR, VENDOR_ID};

/// Interval at which to look for a file that has yet to appear.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
const VFIO_PCI: &str = "vfio-pci";

/// A device cannot be used through VFIO.
#[derive(Debug, thiserror::Error)]
pub enum SysfsError {
    /// The machine has no such device.
    #[error("no PCI device {bdf}; {}", Candidates(.vvu))]
    Absent {
        /// Address that was asked for.
        bdf: Bdf,
        /// The vvu devices of this machine.
        vvu: Vec<Bdf>,
    },
    /// The device is not a vvu device.
    #[error(
        "{bdf} is not a vvu device: its PCI id is {vendor:04x}:{device:04x}, want {VENDOR_ID:04x}:{DEVICE_ID:04x}; {}",
        Candidates(.vvu)
    )]
    Identity {
        /// Address that was asked for.
        bdf: Bdf,
        /// Vendor id of the device.
        vendor: u16,
        /// Device id of the device.
        device: u16,
        /// The vvu devices of this machine.
        vvu: Vec<Bdf>,
    },
    /// The device has no address for its shared memory BAR.
    #[error(
        "the machine has no room for the shared memory BAR of {bdf}, which is as large as the sibling's RAM{}: give the \
         VM more for PCI devices (QEMU: `-global q35-pcihost.pci-hole64-size=SIZE`, a CPU with `host-phys-bits=on`)",
        .size.map(|size| format!(" ({} GiB)", size.div_ceil(1 << 30))).unwrap_or_default()
    )]
    Unassigned {
        /// The device.
        bdf: Bdf,
        /// Bytes of the BAR, if the kernel still knows.
        size: Option<u64>,
    },
    /// vfio-pci does not drive the device.
    #[error("{bdf} is {} instead of vfio-pci: run `vvu bind {bdf}` first", Bound(.driver))]
    NotBound {
        /// The device.
        bdf: Bdf,
        /// The driver of the device.
        driver: Option<String>,
    },
    /// The kernel has no vfio-pci.
    #[error(
        "the kernel has no vfio-pci driver: load it with `modprobe vfio-pci`, or build with CONFIG_VFIO_PCI=y"
    )]
    NoVfioPci,
    /// The device is in no IOMMU group.
    #[error(
        "{bdf} has no IOMMU group: the VM has no IOMMU for it; add one to the VM (QEMU: `-device \
         virtio-iommu-pci`) and check that the kernel has CONFIG_VIRTIO_IOMMU and CONFIG_ACPI"
    )]
    NoGroup {
        /// The device.
        bdf: Bdf,
    },
    /// The device file of the IOMMU group did not appear.
    #[error(
        "{} did not appear: check that the kernel has CONFIG_VFIO_GROUP and that /dev is a devtmpfs or run by udev",
        .path.display()
    )]
    NoGroupFile {
        /// The device file.
        path: PathBuf,
    },
    /// vfio-pci refused the device.
    #[error("vfio-pci does not take {bdf}: {source}; `dmesg` may say why")]
    Bind {
        /// The device.
        bdf: Bdf,
        /// The cause.
        source: io::Error,
    },
    /// A file could not be read or written.
    #[error("cannot {what} {}: {source}{}", .path.display(), root_hint(.source))]
    Io {
        /// The operation: `read` or `write`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// Lists the vvu devices of this machine in an error message.
struct Candidates<'a>(&'a [Bdf]);

impl std::fmt::Display for Candidates<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return f
                .write_str("this machine has no vvu device: start the proxy and add its device to this VM");
        }
        f.write_str("the vvu devices of this machine:")?;
        self.0.iter().try_for_each(|bdf| write!(f, " {bdf}"))
    }
}

/// Names the driver of a device in an error message.
struct Bound<'a>(&'a Option<String>);

impl std::fmt::Display for Bound<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(driver) => write!(f, "bound to {driver}"),
            None => f.write_str("bound to no driver"),
        }
    }
}

fn root_hint(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied { "; run as root" } else { "" }
}

/// Says what may help when the kernel does not let a BAR be mapped from its file in sysfs.
pub(super) fn mapping_hint(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::INVAL) => {
            "; a kernel with CONFIG_IO_STRICT_DEVMEM allows it with `iomem=relaxed` on its command line"
        }
        Some(Errno::PERM) => "; a kernel that is locked down (Secure Boot, `lockdown=`) does not allow it",
        Some(Errno::ACCESS) => "; run as root",
        _ => "",
    }
}

/// The sysfs and `/dev` of a machine.
#[derive(Clone, Debug)]
pub struct PciSysfs {
    sys: PathBuf,
    dev: PathBuf,
}

impl Default for PciSysfs {
    fn default() -> Self {
        Self::under(Path::new("/"))
    }
}

/// A device that VFIO can open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VfioReady {
    /// Directory of the device in sysfs.
    pub directory: PathBuf,
    /// Number of the IOMMU group.
    pub group: u32,
}

impl PciSysfs {
    /// Uses the `sys` and `dev` directories below `root`.
    #[must_use]
    pub fn under(root: &Path) -> Self {
        Self { sys: root.join("sys"), dev: root.join("dev") }
    }

    /// Checks that `bdf` is a vvu device that VFIO can open.
    ///
    /// # Errors
    /// Any [`SysfsError`] but `NoVfioPci`, `NoGroupFile` and `Bind`.
    pub fn ready(&self, bdf: Bdf) -> Result<VfioReady, SysfsError> {
        self.check_identity(bdf)?;
        self.check_memory(bdf)?;
        self.vfio_ready(bdf)
    }

    /// Checks that `bdf`, whatever it is, is a device that VFIO can open.
    pub(super) fn vfio_ready(&self, bdf: Bdf) -> Result<VfioReady, SysfsError> {
        let driver = self.driver(bdf);
        if driver.as_deref() != Some(VFIO_PCI) {
            return Err(SysfsError::NotBound { bdf, driver });
        }
        let group = self.group(bdf).ok_or(SysfsError::NoGroup { bdf })?;
        Ok(VfioReady { directory: self.device(bdf), group })
    }

    /// Binds the vvu device `bdf` to vfio-pci, after unbinding it from another driver, and waits at most `patience`
    /// until VFIO can open it. A device that is bound to vfio-pci already stays as it is.
    ///
    /// # Errors
    /// Any [`SysfsError`] but `NotBound`.
    pub fn bind(&self, bdf: Bdf, patience: Duration) -> Result<VfioReady, SysfsError> {
        self.check_identity(bdf)?;
        self.check_memory(bdf)?;
        self.give_to_vfio(bdf, patience)
    }

    /// Binds the express device `bdf` to vfio-pci, as [`bind`](Self::bind) does with a vvu device.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn bind_express(&self, bdf: Bdf, patience: Duration) -> Result<VfioReady, SysfsError> {
        self.give_to_vfio(bdf, patience)
    }

    fn give_to_vfio(&self, bdf: Bdf, patience: Duration) -> Result<VfioReady, SysfsError> {
        let driver = self.driver(bdf);
        if driver.as_deref() != Some(VFIO_PCI) {
            let vfio_pci = self.sys.join("bus/pci/drivers").join(VFIO_PCI);
            if !vfio_pci.is_dir() {
                return Err(SysfsError::NoVfioPci);
            }
            write(&self.device(bdf).join("driver_override"), VFIO_PCI)?;
            if driver.is_some() {
                write(&self.device(bdf).join("driver/unbind"), &bdf.to_string())?;
            }
            let bound = fs::write(vfio_pci.join("bind"), bdf.to_string());
            bound.map_err(|source| match self.group(bdf) {
                None if source.kind() != io::ErrorKind::PermissionDenied => SysfsError::NoGroup { bdf },
                _ => SysfsError::Bind { bdf, source },
            })?;
        }
        let deadline = Instant::now() + patience;
        let group = appears(deadline, || self.group(bdf)).ok_or(SysfsError::NoGroup { bdf })?;
        let path = self.dev.join("vfio").join(group.to_string());
        match appears(deadline, || path.exists().then_some(())) {
            Some(()) => Ok(VfioReady { directory: self.device(bdf), group }),
            None => Err(SysfsError::NoGroupFile { path }),
        }
    }

    /// Reads the configuration space of the vvu device `bdf`, whatever driver it has.
    ///
    /// # Errors
    /// [`SysfsError::Absent`], [`SysfsError::Identity`] and [`SysfsError::Io`].
    pub fn config_space(&self, bdf: Bdf) -> Result<[u8; CONFIG_SPACE_SIZE], SysfsError> {
        self.check_identity(bdf)?;
        let path = self.device(bdf).join("config");
        let mut space = [0; CONFIG_SPACE_SIZE];
        let read = fs::File::open(&path).and_then(|mut file| file.read_exact(&mut space));
        match read {
            Ok(()) => Ok(space),
            // The kernel shows only the header to other users than root.
            Err(source) if source.kind() == io::ErrorKind::UnexpectedEof => {
                let source = io::Error::new(io::ErrorKind::PermissionDenied, "only its start can be read");
                Err(SysfsError::Io { what: "read", path, source })
            }
            Err(source) => Err(SysfsError::Io { what: "read", path, source }),
        }
    }

    /// Returns the path of a BAR's file, which has the size of the BAR and maps it.
    #[must_use]
    pub fn resource(&self, bdf: Bdf, bar: u8) -> PathBuf {
        self.device(bdf).join(format!("resource{bar}"))
    }

    /// Reads the ranges of I/O virtual addresses that no device of `group` may use, as (first, last).
    ///
    /// # Errors
    /// [`SysfsError::Io`].
    pub fn reserved(&self, group: u32) -> Result<Vec<(u64, u64)>, SysfsError> {
        let path = self.sys.join(format!("kernel/iommu_groups/{group}/reserved_regions"));
        let text = read(&path)?;
        let number = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
        let ranges = text.lines().map(|line| {
            let mut words = line.split_whitespace();
            Some((number(words.next()?)?, number(words.next()?)?))
        });
        ranges.collect::<Option<_>>().ok_or_else(|| SysfsError::Io {
            what: "read",
            path,
            source: io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is not a list of ranges")),
        })
    }

    fn device(&self, bdf: Bdf) -> PathBuf {
        self.sys.join("bus/pci/devices").join(bdf.to_string())
    }

    fn check_identity(&self, bdf: Bdf) -> Result<(), SysfsError> {
        if !self.device(bdf).is_dir() {
            return Err(SysfsError::Absent { bdf, vvu: self.vvu_devices() });
        }
        match self.identity(bdf)? {
            (VENDOR_ID, DEVICE_ID) => Ok(()),
            (vendor, device) => Err(SysfsError::Identity { bdf, vendor, device, vvu: self.vvu_devices() }),
        }
    }

    /// Checks that the kernel has found an address for the shared memory BAR.
    fn check_memory(&self, bdf: Bdf) -> Result<(), SysfsError> {
        /// `IORESOURCE_UNSET` of the kernel.
        const UNSET: u64 = 0x2000_0000;
        // Whoever cannot read the file gets another error soon.
        let Ok(text) = read(&self.device(bdf).join("resource")) else { return Ok(()) };
        let Some(line) = text.lines().nth(SHARED_MEMORY_BAR.into()) else { return Ok(()) };
        let number = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
        match line.split_whitespace().map(number).collect::<Option<Vec<_>>>().as_deref() {
            Some([_, 0, 0]) => Err(SysfsError::Unassigned { bdf, size: None }),
            Some([start, end, flags]) if flags & UNSET != 0 => Err(SysfsError::Unassigned {
                bdf,
                size: end.checked_sub(*start).and_then(|len| len.checked_add(1)),
            }),
            _ => Ok(()),
        }
    }

    fn identity(&self, bdf: Bdf) -> Result<(u16, u16), SysfsError> {
        let id = |name| {
            let path = self.device(bdf).join(name);
            let text = read(&path)?;
            u16::from_str_radix(text.trim().trim_start_matches("0x"), 16).map_err(|error| {
                let source = io::Error::new(io::ErrorKind::InvalidData, error);
                SysfsError::Io { what: "read", path, source }
            })
        };
        Ok((id("vendor")?, id("device")?))
    }

    fn vvu_devices(&self) -> Vec<Bdf> {
        self.devices((VENDOR_ID, DEVICE_ID))
    }

    /// Returns the devices that are of the kind of express devices; some may serve another purpose.
    #[must_use]
    pub fn express_devices(&self) -> Vec<Bdf> {
        self.devices((express::VENDOR_ID, express::DEVICE_ID))
    }

    /// Devices with these vendor and device ids.
    fn devices(&self, ids: (u16, u16)) -> Vec<Bdf> {
        let entries = fs::read_dir(self.sys.join("bus/pci/devices")).into_iter().flatten().flatten();
        let addresses = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let mut found: Vec<_> =
            addresses.filter(|bdf| self.identity(*bdf).is_ok_and(|found| found == ids)).collect();
        found.sort_unstable();
        found
    }

    /// Returns the name of the driver that the device is bound to.
    #[must_use]
    pub fn driver(&self, bdf: Bdf) -> Option<String> {
        link_name(&self.device(bdf).join("driver"))
    }

    fn group(&self, bdf: Bdf) -> Option<u32> {
        link_name(&self.device(bdf).join("iommu_group"))?.parse().ok()
    }
}

/// Returns the last component of the target of a symbolic link.
fn link_name(path: &Path) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

fn read(path: &Path) -> Result<String, SysfsError> {
    fs::read_to_string(path).map_err(|source| SysfsError::Io { what: "read", path: path.to_owned(), source })
}

fn write(path: &Path, text: &str) -> Result<(), SysfsError> {
    fs::write(path, text).map_err(|source| SysfsError::Io { what: "write", path: path.to_owned(), source })
}

/// Looks for something until the deadline. Neither sysfs nor `/dev` announces new files.
fn appears<T>(deadline: Instant, look: impl Fn() -> Option<T>) -> Option<T> {
    loop {
        let found = look();
        if found.is_some() || Instant::now() >= deadline {
            return found;
        }
        thread::sleep(POLL_INTERVAL);
    }
}

#[cfg(test)]
#[path = "sysfs_test.rs"]
mod tests;
