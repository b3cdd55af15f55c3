//! Finds the express device of a vvu device in this machine.

use super::ExpressError;
use crate::driver::Driver;
use crate::driver::bar_view::BarView;
use crate::driver::layout;
use crate::driver::registers;
use crate::driver::sysfs::{PciSysfs, SysfsError};
use crate::driver::vfio::{VfioDevice, VfioOpenError};
use crate::pci::DeviceError;
use crate::spec::addr::Bdf;
use crate::spec::express::PAGE_BAR;
use crate::spec::express::page::{self, HEADER_SIZE, Header};
use crate::spec::pci::{REGISTER_BAR, Structure};

/// A vvu device does without an express device.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// There is none.
    #[error(
        "this machine has no express device for it; start the proxy with --express PATH and add one to the VM (QEMU: \
         -chardev socket,id=express,path=PATH -device ivshmem-doorbell,chardev=express,vectors=2)"
    )]
    Absent,
    /// The UUID of the vvu device belongs to several.
    #[error("{0} and {1} both are its express device: give each proxy a --uuid of its own")]
    Several(Bdf, Bdf),
    /// vfio-pci does not drive it.
    #[error("its express device {express} is not bound to vfio-pci: run `vvu bind {vvu}`")]
    NotBound {
        /// The express device.
        express: Bdf,
        /// The vvu device.
        vvu: Bdf,
    },
    /// The registers of the vvu device cannot be read.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Something in sysfs cannot be read.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
    /// VFIO does not open the express device.
    #[error("its express device: {0}")]
    Open(#[from] VfioOpenError),
    /// The express device cannot be used.
    #[error("the express device {express}: {source}")]
    Unusable {
        /// The express device.
        express: Bdf,
        /// The cause.
        source: ExpressError,
    },
}

/// Finds the express device of the vvu device with this `uuid`, whoever drives it.
///
/// # Errors
/// [`FindError::Absent`], [`FindError::Several`].
pub fn find(sysfs: &PciSysfs, uuid: [u8; 16]) -> Result<Bdf, FindError> {
    let devices = sysfs.express_devices();
    let mut found =
        devices.into_iter().filter(|bdf| header(sysfs, *bdf).is_some_and(|page| page.uuid == uuid));
    match (found.next(), found.next()) {
        (Some(first), Some(second)) => Err(FindError::Several(first, second)),
        (Some(only), None) => Ok(only),
        (None, _) => Err(FindError::Absent),
    }
}

/// Makes `driver`, that of the vvu device `vvu`, use its express device, and returns that device.
///
/// # Errors
/// [`FindError`]; the driver then goes on without one.
pub fn attach(sysfs: &PciSysfs, vvu: Bdf, driver: &mut Driver<VfioDevice>) -> Result<Bdf, FindError> {
    let express = find(sysfs, driver.uuid()?)?;
    let device = VfioDevice::open_express(sysfs.clone(), express).map_err(|error| match error {
        VfioOpenError::Sysfs(SysfsError::NotBound { .. }) => FindError::NotBound { express, vvu },
        error => error.into(),
    })?;
    driver.use_express(Box::new(device)).map_err(|source| FindError::Unusable { express, source })?;
    Ok(express)
}

/// Reads the UUID of the vvu device `bdf`, whoever drives it.
///
/// # Errors
/// [`FindError::Sysfs`], [`FindError::Device`].
pub fn vvu_uuid(sysfs: &PciSysfs, bdf: Bdf) -> Result<[u8; 16], FindError> {
    let view = BarView::open(&sysfs.resource(bdf, REGISTER_BAR), REGISTER_BAR)?;
    let (_, config) = layout::configuration(&sysfs.config_space(bdf)?, |bar| view.size(bar))
        .map_err(|error| DeviceError::other(format!("look for the registers of {bdf}"), error))?;
    Ok(registers::uuid(|at| view.read::<u32>(config, at).map(u32::from_le))?)
}

/// The start of a device's page, if it is one of ours.
fn header(sysfs: &PciSysfs, bdf: Bdf) -> Option<Header> {
    let view = BarView::open(&sysfs.resource(bdf, PAGE_BAR), PAGE_BAR).ok()?;
    let page = Structure { bar: PAGE_BAR, offset: 0, length: page::SIZE as u64 };
    let mut bytes = [0; HEADER_SIZE];
    for (offset, word) in (0..).step_by(4).zip(bytes.chunks_exact_mut(4)) {
        word.copy_from_slice(&view.read::<u32>(page, offset).ok()?.to_ne_bytes());
    }
    Header::parse(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::express::DEVICE_ID;
    use crate::spec::pci::VENDOR_ID;
    use tempfile::TempDir;

    /// The sysfs of a machine with devices of the kind of express devices, whose pages begin with these bytes.
    fn machine(pages: &[(&str, &[u8])]) -> (TempDir, PciSysfs) {
        let root = tempfile::tempdir().expect("directory");
        for (bdf, start) in pages {
            let device = root.path().join("sys/bus/pci/devices").join(bdf);
            std::fs::create_dir_all(&device).expect("directory");
            std::fs::write(device.join("vendor"), format!("{VENDOR_ID:#06x}\n")).expect("vendor");
            std::fs::write(device.join("device"), format!("{DEVICE_ID:#06x}\n")).expect("device");
            let mut page = start.to_vec();
            page.resize(if start.is_empty() { 0 } else { page::SIZE }, 0);
            std::fs::write(device.join("resource2"), page).expect("page");
        }
        let sysfs = PciSysfs::under(root.path());
        (root, sysfs)
    }

    fn page(id: u8) -> [u8; HEADER_SIZE] {
        Header { queues: 16, uuid: [id; 16] }.to_bytes()
    }

    #[test]
    fn the_device_with_the_uuid_is_found_among_others() {
        let (_root, sysfs) = machine(&[
            ("0000:00:1b.0", b"another purpose"),
            // A page that cannot be mapped.
            ("0000:00:1c.0", b""),
            ("0000:00:1d.0", &page(7)),
            ("0000:00:1e.0", &page(8)),
        ]);
        let found = |id| find(&sysfs, [id; 16]).map(|bdf| bdf.to_string());
        assert_eq!(found(7).expect("found"), "0000:00:1d.0");
        assert_eq!(found(8).expect("found"), "0000:00:1e.0");
        let error = found(9).expect_err("absent").to_string();
        assert!(error.contains("--express PATH") && error.contains("ivshmem-doorbell"), "{error}");
    }

    #[test]
    fn two_devices_with_one_uuid_are_not_guessed_between() {
        let (_root, sysfs) = machine(&[("0000:00:1d.0", &page(7)), ("0000:00:1e.0", &page(7))]);
        let error = find(&sysfs, [7; 16]).expect_err("two").to_string();
        assert!(error.contains("0000:00:1d.0 and 0000:00:1e.0") && error.contains("--uuid"), "{error}");
    }
}
