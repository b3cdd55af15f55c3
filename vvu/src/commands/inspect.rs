//! `vvu inspect`: tells what a vvu device is and what state it is in.

use std::io::{self, Write};

use anyhow::Context;
use vvu::driver::inspect;
use vvu::driver::resources::Resources;
use vvu::driver::sysfs::PciSysfs;
use vvu::driver::vfio::{VfioDevice, VfioOpenError};
use vvu::spec::addr::Bdf;

/// Options of `vvu inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// PCI address of the vvu device.
    #[arg(long, value_name = "BDF")]
    vfio: Bdf,
}

/// Prints what the configuration space says, and what can be read of the registers: all of them if nobody drives
/// the device, otherwise those that a driver does not notice the reading of.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let sysfs = PciSysfs::default();
    let resources = Resources::open(sysfs.clone(), args.vfio)?;
    let mut text = inspect::config_space(resources.config_space())?;
    text += &match VfioDevice::open(sysfs, args.vfio) {
        Ok(device) => {
            let registers = inspect::registers(&device)?;
            format!("registers, after the reset that opening the device through VFIO brings:\n{registers}")
        }
        Err(VfioOpenError::Busy { .. }) => {
            let registers = inspect::registers_in_use(&resources)?;
            format!("registers, as they are while another process uses the device:\n{registers}")
        }
        Err(error) => format!("registers cannot be read: {error}\n"),
    };
    io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")
}
