//! What every scenario needs before its VMs can start: QEMU, kernel, programs, base image, accelerator.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::thread::{self, ScopedJoinHandle};

use anyhow::{Context, Error, Result, anyhow};

use super::prepared::Prepared;
use crate::accel::{self, Accelerator, Kind};
use crate::cache::Cache;
use crate::image::{BaseImage, GuestBinaries, GuestPrograms, GuestTools, build_base};
use crate::kernel::{Kernel, KernelOptions};
use crate::progress::Progress;
use crate::qemu::Qemu;
use crate::scenario::Scenario;

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
    /// Take everything from this directory, as --nested lays it out, and obtain nothing
    #[arg(long, value_name = "DIR", conflicts_with_all = ["qemu", "file", "source", "fragments"])]
    pub(crate) prepared: Option<PathBuf>,
    /// How much longer than at native speed things may take [default: 2 with KVM, 6 without]
    #[arg(long, value_name = "FACTOR", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) slowness: Option<u32>,
}

/// What tells the kernels of a set-up apart.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct KernelId {
    /// The source's name, if it is not the run's.
    source: Option<String>,
    /// Fragments besides the base.
    fragments: Vec<String>,
}

impl KernelId {
    /// The kernel that `scenario` runs with.
    pub(crate) fn of(scenario: &Scenario) -> Self {
        Self { source: scenario.kernel_source.clone(), fragments: scenario.kernel.clone() }
    }

    /// The one of the run's source with these fragments besides the base.
    pub(crate) fn with_fragments(fragments: &[String]) -> Self {
        Self { source: None, fragments: fragments.to_owned() }
    }
}

/// What some scenarios need besides what all do.
#[derive(Debug, Clone, Default)]
pub(crate) struct Needs {
    /// Kernels.
    kernels: BTreeSet<KernelId>,
    /// QEMUs besides the run's, by name.
    qemus: BTreeSet<String>,
    /// Names of other people's programs.
    programs: BTreeSet<String>,
}

impl Needs {
    /// What `scenarios` need.
    pub(crate) fn of<'a>(scenarios: impl IntoIterator<Item = &'a Scenario>) -> Self {
        let mut needs = Self::default();
        for scenario in scenarios {
            needs.kernels.insert(KernelId::of(scenario));
            needs.qemus.extend(scenario.vms.values().filter_map(|vm| vm.qemu.clone()));
            needs.programs.extend(scenario.vms.values().flat_map(|vm| &vm.programs).cloned());
        }
        needs
    }

    /// The base kernel and these programs.
    pub(crate) fn programs<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        Self { programs: names.into_iter().map(str::to_owned).collect(), ..Self::default() }
    }
}

/// All that is needed, obtained.
pub(crate) struct Setup {
    /// The QEMU that runs the VMs that name none.
    pub(crate) qemu: Qemu,
    /// The QEMUs that VMs name.
    pub(super) qemus: BTreeMap<String, Qemu>,
    /// The guest kernels.
    pub(super) kernels: BTreeMap<KernelId, Kernel>,
    /// Trees with other people's programs, by their names.
    pub(crate) programs: BTreeMap<String, PathBuf>,
    /// Our own programs.
    pub(crate) binaries: GuestBinaries,
    /// The initramfs that all VMs share.
    pub(crate) base: BaseImage,
    /// What runs the guests' code, and why.
    pub(crate) accelerator: Accelerator,
    /// How much longer than at native speed things may take.
    pub(crate) slowness: u32,
}

impl Setup {
    /// Obtains everything; what can be done side by side is.
    ///
    /// # Errors
    ///
    /// The first thing that cannot be had, and the remedy.
    pub(crate) fn obtain(options: &SetupOptions, needs: &Needs, progress: &Progress) -> Result<Self> {
        if let Some(dir) = &options.prepared {
            let prepared = Prepared::read(dir)?;
            return Ok(prepared.with(choose(options.accel, progress)?, options.slowness));
        }
        let cache = Cache::open(progress)?;
        let (fetched, binaries, accelerator) = thread::scope(|scope| {
            let binaries = scope.spawn(|| GuestBinaries::build(progress));
            let accelerator = scope.spawn(|| choose(options.accel, progress));
            // One after the other, as apt and dpkg take one caller at a time.
            let fetch = || {
                let qemu = Qemu::locate(progress, &cache, options.qemu.as_deref())?;
                let named = needs.qemus.iter();
                let named = named.map(|name| Ok((name.clone(), Qemu::named(progress, &cache, name)?)));
                let qemus = named.collect::<Result<BTreeMap<_, _>>>()?;
                let tools = GuestTools::obtain(progress, &cache)?;
                let list = GuestPrograms::read()?;
                let programs = needs.programs.iter();
                let programs = programs.map(|name| Ok((name.clone(), list.obtain(name, progress, &cache)?)));
                let programs = programs.collect::<Result<BTreeMap<_, _>>>()?;
                let mut kernels = BTreeMap::new();
                let plain = KernelId::default();
                for id in needs.kernels.iter().chain(needs.kernels.is_empty().then_some(&plain)) {
                    let mut options = options.kernel.clone();
                    options.fragments.extend(id.fragments.iter().cloned());
                    options.named.clone_from(&id.source);
                    kernels.insert(id.clone(), Kernel::obtain(progress, &cache, &options)?);
                }
                Ok::<_, Error>((qemu, qemus, tools, programs, kernels))
            };
            (fetch(), joined(binaries), joined(accelerator))
        });
        let ((qemu, qemus, tools, programs, kernels), binaries) = (fetched?, binaries?);
        let base = build_base(&cache, &binaries, &tools)?;
        let accelerator = accelerator?;
        let slowness = slowness(&accelerator, options.slowness);
        Ok(Self { qemu, qemus, kernels, programs, binaries, base, accelerator, slowness })
    }

    /// A kernel.
    ///
    /// # Errors
    ///
    /// It is not among what was needed.
    pub(crate) fn kernel(&self, id: &KernelId) -> Result<&Kernel> {
        self.kernels.get(id).with_context(|| format!("{id:?} was not obtained"))
    }

    /// The QEMU of this name, or the run's.
    ///
    /// # Errors
    ///
    /// It is not among what was needed.
    pub(crate) fn qemu(&self, name: Option<&str>) -> Result<&Qemu> {
        let Some(name) = name else { return Ok(&self.qemu) };
        self.qemus.get(name).with_context(|| format!("the QEMU {name:?} was not obtained"))
    }
}

/// `wanted`, or what an accelerator is known for.
pub(super) fn slowness(accelerator: &Accelerator, wanted: Option<u32>) -> u32 {
    wanted.unwrap_or(match accelerator.kind {
        Kind::Kvm => 2,
        Kind::Tcg => 6,
    })
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
