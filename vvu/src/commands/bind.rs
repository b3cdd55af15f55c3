//! `vvu bind`: binds the vvu device, and its express device if there is one, to vfio-pci.

use std::time::Duration;

use vvu::driver::express::find::{self, FindError};
use vvu::driver::sysfs::PciSysfs;
use vvu::spec::addr::Bdf;

/// Time that the kernel and udev get to make the device file of the IOMMU group.
const PATIENCE: Duration = Duration::from_secs(5);

/// Options of `vvu bind`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// PCI address of the vvu device, for example 0000:00:10.0
    bdf: Bdf,
}

/// Binds the device. A device that is bound already stays as it is.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let sysfs = PciSysfs::default();
    let ready = sysfs.bind(args.bdf, PATIENCE)?;
    log::info!("{} is bound to vfio-pci, IOMMU group {}", args.bdf, ready.group);
    let express = find::vvu_uuid(&sysfs, args.bdf).and_then(|uuid| find::find(&sysfs, uuid));
    match express {
        Ok(express) => {
            let ready = sysfs.bind_express(express, PATIENCE)?;
            log::info!("its express device {express} is bound to vfio-pci, IOMMU group {}", ready.group);
        }
        Err(error @ FindError::Absent) => log::info!("{}: {error}", args.bdf),
        Err(error) => log::warn!("{} goes without an express device: {error}", args.bdf),
    }
    Ok(())
}
