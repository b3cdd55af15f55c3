//! Obtains a set-up as the command line asks for it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread::{self, ScopedJoinHandle};

use anyhow::{Result, anyhow};
use vvu_artifacts::accel::{self, Accelerator};
use vvu_artifacts::cache::Cache;
use vvu_artifacts::image::{BuildProfile, GuestBinaries, GuestPrograms, GuestTools, build_base};
use vvu_artifacts::kernel::{Kernel, KernelOptions};
use vvu_artifacts::qemu::Qemu;
use vvu_process::progress::Progress;

use crate::prepared::Prepared;
use crate::setup::{KernelId, Needs, Setup, slowness};
use crate::vmm::{self, Vmm};

/// Command-line options of the set-up.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct SetupOptions {
    /// QEMU to use instead of the system's or Debian's
    #[arg(long, value_name = "FILE", help_heading = "VMs")]
    pub qemu: Option<PathBuf>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment on flattened options would become a help text")]
    pub kernel: KernelOptions,
    /// Accelerator that runs the VMs
    #[arg(long, value_enum, default_value_t, help_heading = "VMs")]
    pub accel: accel::Request,
    /// Directory that holds everything, as --nested lays it out
    #[arg(long, hide = true, value_name = "DIR", conflicts_with_all = ["qemu", "file", "source", "fragments", "package", "quick"])]
    pub prepared: Option<PathBuf>,
    /// Factor by which limits exceed those for native speed [default: 2 with KVM, 6 without]
    #[arg(long, hide = true, value_name = "FACTOR", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub slowness: Option<u32>,
}

impl Setup {
    /// Builds and fetches what `needs` names, in parallel where possible.
    ///
    /// # Errors
    ///
    /// Fails on the first thing that cannot be had; the message names the remedy.
    pub fn obtain(options: &SetupOptions, needs: &Needs, progress: &Progress) -> Result<Self> {
        if let Some(dir) = &options.prepared {
            let prepared = Prepared::read(dir)?;
            return Ok(prepared.with(choose(options.accel, progress)?, options.slowness));
        }
        let cache = Cache::open(progress)?;
        let profile = if options.kernel.quick { BuildProfile::Quick } else { BuildProfile::Guest };
        let obtained = thread::scope(|scope| {
            // First, as it takes longest.
            let kernels = scope.spawn(|| obtain_kernels(options, needs, &cache, progress));
            let binaries = scope.spawn(|| GuestBinaries::build(progress, profile));
            let tools = scope.spawn(|| GuestTools::obtain(progress, &cache));
            let accelerator = scope.spawn(|| choose(options.accel, progress));
            let fetched = fetch(options, needs, &cache, progress);
            (fetched, joined(kernels), joined(binaries), joined(tools), joined(accelerator))
        });
        let (fetched, kernels, binaries, tools, accelerator) = obtained;
        let Fetched { qemu, vmms, programs } = fetched?;
        let (kernels, binaries, tools) = (kernels?, binaries?, tools?);
        let base = build_base(&cache, &binaries, &tools)?;
        let accelerator = accelerator?;
        let slowness = slowness(&accelerator, options.slowness);
        Ok(Self { qemu, vmms, kernels, programs, binaries, base, accelerator, slowness })
    }
}

/// VMMs and programs that are downloaded.
struct Fetched {
    qemu: Qemu,
    vmms: BTreeMap<String, Box<dyn Vmm>>,
    programs: BTreeMap<String, PathBuf>,
}

/// Downloads one after the other: together they would be no sooner.
fn fetch(options: &SetupOptions, needs: &Needs, cache: &Cache, progress: &Progress) -> Result<Fetched> {
    let qemu = Qemu::locate(progress, cache, options.qemu.as_deref())?;
    let vmms = needs.vmms.iter().map(|name| Ok((name.clone(), vmm::obtain(progress, cache, name)?)));
    let vmms = vmms.collect::<Result<_>>()?;
    let list = GuestPrograms::read()?;
    let programs = needs.programs.iter();
    let programs = programs.map(|name| Ok((name.clone(), list.obtain(name, progress, cache)?)));
    Ok(Fetched { qemu, vmms, programs: programs.collect::<Result<_>>()? })
}

/// Obtains the kernels, each with all processors.
fn obtain_kernels(
    options: &SetupOptions,
    needs: &Needs,
    cache: &Cache,
    progress: &Progress,
) -> Result<BTreeMap<KernelId, Kernel>> {
    let plain = KernelId::default();
    let wanted = needs.kernels.iter().chain(needs.kernels.is_empty().then_some(&plain));
    let kernels =
        wanted.map(|id| Ok((id.clone(), Kernel::obtain(progress, cache, &id.options(&options.kernel))?)));
    kernels.collect()
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
