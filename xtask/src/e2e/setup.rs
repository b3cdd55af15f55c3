//! What every scenario needs before its VMs can start: QEMU, kernel, programs, base image, accelerator.

use std::path::PathBuf;
use std::thread::{self, ScopedJoinHandle};

use anyhow::{Error, Result, anyhow};

use crate::accel::{self, Accelerator, Kind};
use crate::cache::Cache;
use crate::image::{BaseImage, GuestBinaries, GuestTools, build_base};
use crate::kernel::{Kernel, KernelOptions};
use crate::progress::Progress;
use crate::qemu::Qemu;

/// What the command line says about the set-up.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct SetupOptions {
    /// QEMU to use instead of the system's or Debian's
    #[arg(long, value_name = "FILE")]
    pub(crate) qemu: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) kernel: KernelOptions,
    /// What runs the guests' code
    #[arg(long, value_enum, default_value_t)]
    pub(crate) accel: accel::Request,
}

/// All that is needed, obtained.
pub(crate) struct Setup {
    /// The QEMU that runs the VMs.
    pub(crate) qemu: Qemu,
    /// The guest kernel.
    pub(crate) kernel: Kernel,
    /// Our own programs.
    pub(crate) binaries: GuestBinaries,
    /// The initramfs that all VMs share.
    pub(crate) base: BaseImage,
    /// What runs the guests' code, and why.
    pub(crate) accelerator: Accelerator,
}

impl Setup {
    /// Obtains everything; what can be done side by side is.
    ///
    /// # Errors
    ///
    /// The first thing that cannot be had, and the remedy.
    pub(crate) fn obtain(options: &SetupOptions, progress: &Progress) -> Result<Self> {
        let cache = Cache::open(progress)?;
        let (fetched, binaries, accelerator) = thread::scope(|scope| {
            let binaries = scope.spawn(|| GuestBinaries::build(progress));
            let accelerator = scope.spawn(|| choose(options.accel, progress));
            // One after the other, as apt and dpkg take one caller at a time.
            let fetch = || {
                let qemu = Qemu::locate(progress, &cache, options.qemu.as_deref())?;
                let tools = GuestTools::obtain(progress, &cache)?;
                Ok::<_, Error>((qemu, tools, Kernel::obtain(progress, &cache, &options.kernel)?))
            };
            (fetch(), joined(binaries), joined(accelerator))
        });
        let ((qemu, tools, kernel), binaries) = (fetched?, binaries?);
        let base = build_base(&cache, &binaries, &tools)?;
        Ok(Self { qemu, kernel, binaries, base, accelerator: accelerator? })
    }

    /// How much longer than at native speed things may take.
    pub(crate) fn slowness(&self) -> u32 {
        match self.accelerator.kind {
            Kind::Kvm => 2,
            Kind::Tcg => 6,
        }
    }
}

fn choose(request: accel::Request, progress: &Progress) -> Result<Accelerator> {
    let stage = progress.stage("accelerator");
    stage.update("trying KVM");
    let chosen = accel::choose(request)?;
    stage.done(format!("{}: {}", chosen.kind, chosen.reason));
    Ok(chosen)
}

fn joined<T>(handle: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    handle.join().unwrap_or_else(|_| Err(anyhow!("a thread of the set-up panicked")))
}
