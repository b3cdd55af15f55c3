//! Kernel modules in the initramfs: where the host puts them, and how PID 1 loads them.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::ErrorKind;

use anyhow::{Context, Result};
use rustix::io::Errno;

/// The directory of the modules, each as `NAME.ko`, uncompressed.
pub const DIRECTORY: &str = "/lib/modules";
/// Their names, one a line, each behind those that it depends on.
pub const ORDER: &str = "/lib/modules/order";

/// Loads the modules that the host has put into the initramfs, with the parameters that the kernel command line has for
/// each. There may be none.
///
/// # Errors
///
/// A module cannot be read, or the kernel refuses it.
pub fn load_all(command_line: &str) -> Result<()> {
    let order = match fs::read_to_string(ORDER) {
        Ok(order) => order,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).context("cannot read the list of kernel modules"),
    };
    for name in order.lines() {
        let file = File::open(format!("{DIRECTORY}/{name}.ko"));
        let file = file.with_context(|| format!("cannot open the kernel module {name}"))?;
        let parameters = CString::new(parameters(command_line, name)).context("the kernel command line")?;
        match rustix::system::finit_module(&file, &parameters, 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot load the kernel module {name}")),
        }
    }
    Ok(())
}

/// The parameters of the module `name`, separated by spaces: `MODULE.PARAMETER=VALUE` on the kernel command line is for the
/// module wherever it is (Documentation/admin-guide/kernel-parameters.rst of Linux), but the kernel itself sees to those in
/// its own image only.
fn parameters(command_line: &str, name: &str) -> String {
    let of_module = command_line.split_ascii_whitespace().filter_map(|word| {
        let (module, parameter) = word.split_once('.')?;
        (module.replace('-', "_") == name).then_some(parameter)
    });
    of_module.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_gets_its_own_parameters() {
        let line = "console=ttyS0 vfio-pci.ids=1af4:1110 vfio_pci.disable_idle_d3=1 vfio.x=1 vvu.shell\n";
        assert_eq!(parameters(line, "vfio_pci"), "ids=1af4:1110 disable_idle_d3=1");
        assert_eq!(parameters(line, "vfio"), "x=1");
        assert_eq!(parameters(line, "virtio_blk"), "");
    }
}
