//! Virtual machine monitors (VMMs): the capabilities and the command line of each.
//!
//! [`Qemu`] runs every kind of VM. [`CloudHypervisor`] runs a sibling VM on a terminal. Another VMM is one more
//! implementation of [`Vmm`], and one more name in `guest-images/versions.json` and [`obtain`].

mod cloud_hypervisor;
mod cmdline;
mod interface;
mod qemu;
mod qemu_hot_plug;
mod words;

use anyhow::{Context, Result};
use vvu_artifacts::cache::Cache;
use vvu_artifacts::qemu::Qemu;
use vvu_artifacts::versions::{Versions, VmmSource};
use vvu_process::progress::Progress;

use cloud_hypervisor::CloudHypervisor;
pub use interface::{Capabilities, Vmm};

/// Finds the VMM that `guest-images/versions.json` has by this name, or downloads it into the cache.
///
/// # Errors
///
/// There is none of that name, it is not installed, or it cannot be downloaded.
pub(crate) fn obtain(progress: &Progress, cache: &Cache, name: &str) -> Result<Box<dyn Vmm>> {
    Ok(match Versions::read()?.vmm(name)? {
        VmmSource::Qemu(_) => Box::new(Qemu::named(progress, cache, name)?),
        VmmSource::CloudHypervisor {} => {
            let stage = progress.stage(format!("vmm {name}"));
            let vmm = CloudHypervisor::locate().with_context(|| format!("the VMM {name:?} cannot be had"))?;
            stage.done(vmm.version());
            Box::new(vmm)
        }
    })
}

#[cfg(test)]
#[path = "rig_test.rs"]
mod rig;
#[cfg(test)]
#[path = "vmm_test.rs"]
mod tests;
