//! What every scenario needs before its VMs can start: QEMU, kernel, programs, base image, accelerator.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::thread::{self, ScopedJoinHandle};

use anyhow::{Context, Error, Result, anyhow};

use crate::prepared::Prepared;
use vvu_artifacts::accel::{self, Accelerator, Kind};
use vvu_artifacts::cache::Cache;
use vvu_artifacts::image::{BaseImage, GuestBinaries, GuestPrograms, GuestTools, build_base};
use vvu_artifacts::kernel::{Kernel, KernelOptions};
use vvu_artifacts::qemu::Qemu;
use vvu_process::progress::Progress;

/// What the command line says about the set-up.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct SetupOptions {
    /// QEMU to use instead of the system's or Debian's
    #[arg(long, value_name = "FILE")]
    pub qemu: Option<PathBuf>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment on flattened options would become a help text")]
    pub kernel: KernelOptions,
    /// What runs the guests' code
    #[arg(long, value_enum, default_value_t)]
    pub accel: accel::Request,
    /// Take everything from this directory, as --nested lays it out, and obtain nothing
    #[arg(long, value_name = "DIR", conflicts_with_all = ["qemu", "file", "source", "fragments"])]
    pub prepared: Option<PathBuf>,
    /// How much longer than at native speed things may take [default: 2 with KVM, 6 without]
    #[arg(long, value_name = "FACTOR", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub slowness: Option<u32>,
}

/// What tells the kernels of a set-up apart.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelId {
    /// The source's name, if it is not the run's.
    source: Option<String>,
    /// Fragments besides the base.
    fragments: Vec<String>,
}

impl KernelId {
    /// The kernel of the source `source`, or of the run's, with these fragments besides the base.
    #[must_use]
    pub fn new(source: Option<&str>, fragments: &[String]) -> Self {
        Self { source: source.map(str::to_owned), fragments: fragments.to_owned() }
    }

    /// The one of the run's source with these fragments besides the base.
    pub fn with_fragments(fragments: &[String]) -> Self {
        Self { source: None, fragments: fragments.to_owned() }
    }
}

/// What some scenarios need besides what all do.
#[derive(Debug, Clone, Default)]
pub struct Needs {
    /// Kernels.
    pub kernels: BTreeSet<KernelId>,
    /// QEMUs besides the run's, by name.
    pub qemus: BTreeSet<String>,
    /// Names of other people's programs.
    pub programs: BTreeSet<String>,
}

impl Needs {
    /// The base kernel and these programs.
    pub fn programs<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        Self { programs: names.into_iter().map(str::to_owned).collect(), ..Self::default() }
    }
}

/// All that is needed, obtained.
pub struct Setup {
    /// The QEMU that runs the VMs that name none.
    pub qemu: Qemu,
    /// The QEMUs that VMs name.
    pub qemus: BTreeMap<String, Qemu>,
    /// The guest kernels.
    pub kernels: BTreeMap<KernelId, Kernel>,
    /// Trees with other people's programs, by their names.
    pub programs: BTreeMap<String, PathBuf>,
    /// Our own programs.
    pub binaries: GuestBinaries,
    /// The initramfs that all VMs share.
    pub base: BaseImage,
    /// What runs the guests' code, and why.
    pub accelerator: Accelerator,
    /// How much longer than at native speed things may take.
    pub slowness: u32,
}

impl Setup {
    /// Obtains everything; what can be done side by side is.
    ///
    /// # Errors
    ///
    /// The first thing that cannot be had, and the remedy.
    pub fn obtain(options: &SetupOptions, needs: &Needs, progress: &Progress) -> Result<Self> {
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
    pub fn kernel(&self, id: &KernelId) -> Result<&Kernel> {
        self.kernels.get(id).with_context(|| format!("{id:?} was not obtained"))
    }

    /// The QEMU of this name, or the run's.
    ///
    /// # Errors
    ///
    /// It is not among what was needed.
    pub fn qemu(&self, name: Option<&str>) -> Result<&Qemu> {
        let Some(name) = name else { return Ok(&self.qemu) };
        self.qemus.get(name).with_context(|| format!("the QEMU {name:?} was not obtained"))
    }
}

/// `wanted`, or what an accelerator is known for.
pub fn slowness(accelerator: &Accelerator, wanted: Option<u32>) -> u32 {
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
