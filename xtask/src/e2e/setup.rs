//! What every scenario needs before its VMs can start: QEMU, kernel, programs, base image, accelerator.

use std::path::PathBuf;
use std::thread;

use anyhow::{Result, anyhow};

use crate::cache::Cache;
use crate::image::{BaseImage, GuestBinaries, GuestTools, build_base};
use crate::progress::Progress;
use crate::qemu::Qemu;
use crate::report;

/// What the command line says about the set-up.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct SetupOptions {
    /// QEMU to use instead of the system's or Debian's
    #[arg(long, value_name = "FILE")]
    pub(crate) qemu: Option<PathBuf>,
    /// Guest kernel (PVH vmlinux) to use instead of building one
    #[arg(long, value_name = "FILE", conflicts_with = "kernel_source")]
    pub(crate) kernel: Option<PathBuf>,
    /// Kernel source to build instead of the distribution's
    #[arg(long, value_name = "DIR|TARBALL")]
    pub(crate) kernel_source: Option<PathBuf>,
    /// What runs the guests' code
    #[arg(long, value_enum, default_value_t)]
    pub(crate) accel: AccelChoice,
}

/// `--accel`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum AccelChoice {
    /// KVM if it is proven to run a guest at native speed, else TCG
    #[default]
    Auto,
    /// The host's processor
    Kvm,
    /// QEMU's emulation
    Tcg,
}

/// All that is needed, obtained.
pub(crate) struct Setup {
    /// The QEMU that runs the VMs.
    pub(crate) qemu: Qemu,
    /// The guest kernel's PVH `vmlinux`.
    pub(crate) vmlinux: PathBuf,
    /// What the report says about the kernel.
    pub(crate) kernel: report::Kernel,
    /// Our own programs.
    pub(crate) binaries: GuestBinaries,
    /// The initramfs that all VMs share.
    pub(crate) base: BaseImage,
    /// What runs the guests' code, and why.
    pub(crate) accelerator: report::Accelerator,
}

impl Setup {
    /// Obtains everything; what can be done side by side is.
    ///
    /// # Errors
    ///
    /// The first thing that cannot be had, and the remedy.
    pub(crate) fn obtain(options: &SetupOptions, progress: &Progress) -> Result<Self> {
        let cache = Cache::open(progress)?;
        let qemu = Qemu::locate(progress, &cache, options.qemu.as_deref())?;
        let (binaries, tools) = thread::scope(|scope| {
            let binaries = scope.spawn(|| GuestBinaries::build(progress));
            let tools = GuestTools::obtain(progress, &cache);
            (binaries.join().unwrap_or_else(|_| Err(anyhow!("the guest build panicked"))), tools)
        });
        let (binaries, tools) = (binaries?, tools?);
        let base = build_base(&cache, &binaries, &tools)?;
        let vmlinux = options.kernel.clone().ok_or_else(|| anyhow!("--kernel is needed for now"))?;
        let kernel = report::Kernel::default();
        let accelerator = report::Accelerator { used: "tcg".into(), reason: "for now".into() };
        Ok(Self { qemu, vmlinux, kernel, binaries, base, accelerator })
    }

    /// How much longer than at native speed things may take.
    pub(crate) fn slowness(&self) -> u32 {
        if self.accelerator.used == "kvm" { 2 } else { 6 }
    }
}
