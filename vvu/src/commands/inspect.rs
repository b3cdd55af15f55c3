//! `vvu inspect`: prints what a vvu device is and in which state it is.

use std::io::{self, Write};
use std::path::Path;

use anyhow::Context;
use vvu::driver::bar_view::BarView;
use vvu::driver::express::find;
use vvu::driver::inspect::{self, InspectError};
use vvu::driver::sysfs::PciSysfs;
use vvu::driver::vfio::{VfioDevice, VfioOpenError};
use vvu::spec::addr::Bdf;
use vvu::spec::pci::{CONFIG_SPACE_SIZE, REGISTER_BAR};

/// Options of `vvu inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// PCI address of the vvu device
    #[arg(long, value_name = "BDF")]
    vfio: Bdf,
}

/// Prints what the configuration space says, and the registers: all of them if nobody drives the device, else those
/// that can be read without disturbing its driver.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let sysfs = PciSysfs::default();
    let space = sysfs.config_space(args.vfio)?;
    let mut text = inspect::config_space(&space)?;
    let opened = VfioDevice::open(sysfs.clone(), args.vfio);
    text += &match &opened {
        Ok(device) => {
            let registers = inspect::registers(device)?;
            format!("registers, after the reset that opening the device through VFIO brings:\n{registers}")
        }
        Err(VfioOpenError::Busy { .. }) => registers_in_use(&space, &sysfs.resource(args.vfio, REGISTER_BAR)),
        Err(error) => format!("registers cannot be read: {error}\n"),
    };
    let uuid = match &opened {
        Ok(device) => inspect::uuid(device).map_err(|error| error.to_string()),
        Err(_) => find::vvu_uuid(&sysfs, args.vfio).map_err(|error| error.to_string()),
    };
    text += &express(&sysfs, uuid);
    io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")
}

/// Names the express device of the vvu device with this UUID.
fn express(sysfs: &PciSysfs, uuid: Result<[u8; 16], String>) -> String {
    let express = uuid.and_then(|uuid| find::find(sysfs, uuid).map_err(|error| error.to_string()));
    match express {
        Ok(express) => {
            let driver = sysfs.driver(express).unwrap_or_else(|| "no driver".to_owned());
            format!("express device: {express}, bound to {driver}\n")
        }
        Err(error) => format!("express device: none found: {error}\n"),
    }
}

/// Describes the registers of a device in use, or says why the kernel does not show them.
fn registers_in_use(space: &[u8; CONFIG_SPACE_SIZE], bar: &Path) -> String {
    let registers = BarView::open(bar, REGISTER_BAR)
        .map_err(InspectError::Device)
        .and_then(|bar| inspect::registers_in_use(space, &bar));
    match registers {
        Ok(registers) => format!(
            "registers of a device in use; features and virtqueues are its driver's to select:\n{registers}"
        ),
        Err(error) => format!("registers cannot be read: {error}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vvu::spec::pci::ConfigSpace;

    #[test]
    fn a_bar_that_cannot_be_mapped_costs_only_the_registers() {
        let space = ConfigSpace::new(19, 1 << 20).bytes;
        // No bytes cannot be mapped, with the error that a kernel with CONFIG_IO_STRICT_DEVMEM gives.
        let bar = tempfile::NamedTempFile::new().expect("file");
        let text = registers_in_use(&space, bar.path());
        assert!(text.starts_with("registers cannot be read: "), "{text}");
        assert!(text.contains("CONFIG_IO_STRICT_DEVMEM") && text.contains("iomem=relaxed"), "{text}");
    }
}
