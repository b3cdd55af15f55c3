//! `vvu inspect`: tells what a vvu device is and what state it is in.

use std::io::{self, Write};

use anyhow::Context;
use vvu::driver::inspect;
use vvu::driver::sysfs::PciSysfs;
use vvu::driver::vfio::VfioDevice;
use vvu::spec::addr::Bdf;

/// Options of `vvu inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// PCI address of the vvu device.
    #[arg(long, value_name = "BDF")]
    vfio: Bdf,
}

/// Prints what the configuration space says, and the registers if nobody else drives the device.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let sysfs = PciSysfs::default();
    let mut text = inspect::config_space(&sysfs.config_space(args.vfio)?)?;
    text += &match VfioDevice::open(sysfs, args.vfio) {
        Ok(device) => {
            let registers = inspect::registers(&device)?;
            format!("registers, after the reset that opening the device through VFIO brings:\n{registers}")
        }
        Err(error) => format!("registers cannot be read: {error}\n"),
    };
    io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")
}
