//! `vvu inspect`: tells what a vvu device is and what state it is in.

use std::io::{self, Write};

use anyhow::Context;
use vvu::driver::bar_view::BarView;
use vvu::driver::inspect;
use vvu::driver::sysfs::PciSysfs;
use vvu::driver::vfio::{VfioDevice, VfioOpenError};
use vvu::spec::addr::Bdf;
use vvu::spec::pci::REGISTER_BAR;

/// Options of `vvu inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// PCI address of the vvu device.
    #[arg(long, value_name = "BDF")]
    vfio: Bdf,
}

/// Prints what the configuration space says, and the registers: all if nobody drives the device, else those that
/// can be read without disturbing who does.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let sysfs = PciSysfs::default();
    let space = sysfs.config_space(args.vfio)?;
    let mut text = inspect::config_space(&space)?;
    text += &match VfioDevice::open(sysfs.clone(), args.vfio) {
        Ok(device) => {
            let registers = inspect::registers(&device)?;
            format!("registers, after the reset that opening the device through VFIO brings:\n{registers}")
        }
        Err(VfioOpenError::Busy { .. }) => {
            let bar = BarView::open(&sysfs.resource(args.vfio, REGISTER_BAR), REGISTER_BAR)?;
            let registers = inspect::registers_in_use(&space, &bar)?;
            format!(
                "registers of a device in use; features and virtqueues are its driver's to select:\n{registers}"
            )
        }
        Err(error) => format!("registers cannot be read: {error}\n"),
    };
    io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")
}
