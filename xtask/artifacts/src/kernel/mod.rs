//! The guest kernel: built from a distribution's source with the fragments in `guest-images/kernel`, a distribution's own,
//! or a file of the user.

mod build;
mod config;
mod image;
mod modules;
mod package;
mod source;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use self::build::Build;
use self::config::{Config, Requests};
pub use self::modules::{Module, Modules};
use self::source::Source;
use crate::cache::{Cache, Key};
use crate::machine::Machine;
use crate::packages::{self, Package};
use crate::versions::{DISTRIBUTION, Versions};
use vvu_process::progress::Progress;

/// Packages that the host needs to compile a kernel.
pub const PACKAGES: [Package; 12] = [
    packages::program("gcc", "gcc"),
    packages::program("binutils", "ld"),
    packages::file("libc6-dev", "/usr/include/stdio.h"),
    packages::program("make", "make"),
    packages::program("flex", "flex"),
    packages::program("bison", "bison"),
    packages::program("bc", "bc"),
    packages::file("libelf-dev", "/usr/include/gelf.h"),
    packages::program("xz-utils", "xz"),
    packages::program("gzip", "gzip"),
    packages::program("tar", "tar"),
    packages::program("dpkg", "dpkg-deb"),
];
/// The fragment that every kernel is built with, followed by the fragment of the machine.
const BASE: &str = "base";
/// Objects of a Linux 6.12 that is built with [`BASE`], for the first progress bar.
const EXPECTED_OBJECTS: usize = 1079;
/// Free space needed for the unpacked source and the objects.
const BUILD_SPACE: u64 = 2 << 30;
const VMLINUX: &str = "vmlinux";
const CONFIG: &str = "config";
const FACTS: &str = "kernel.json";

/// Options that choose the guests' kernel.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct KernelOptions {
    /// Run this vmlinux or bzImage instead of building one
    #[arg(long = "kernel", value_name = "FILE", conflicts_with = "source", help_heading = "Kernel")]
    pub file: Option<PathBuf>,
    /// Build from this tree or tarball instead of the distribution's source package
    #[arg(long = "kernel-source", value_name = "DIR|TARBALL", help_heading = "Kernel")]
    pub source: Option<PathBuf>,
    /// Add a configuration fragment: a name under guest-images/kernel, or a file
    #[arg(long = "kernel-fragment", value_name = "NAME|FILE", help_heading = "Kernel")]
    pub fragments: Vec<String>,
    /// Run a distribution's own kernel: a name in guest-images/versions.json such as debian-13, or a package of Debian
    /// that depends on one, followed by /SUITE if it is not of this machine's own suites
    #[arg(long = "kernel-package", value_name = "NAME|PACKAGE[/SUITE]", help_heading = "Kernel")]
    #[arg(conflicts_with_all = ["file", "source", "fragments"])]
    pub package: Option<String>,
    /// Compile no kernel: run Debian's cloud kernel, as --kernel-package distribution does
    #[arg(long, conflicts_with_all = ["package", "file", "source", "fragments"], help_heading = "Kernel")]
    pub quick: bool,
    /// Directory with the modules of the --kernel, such as /lib/modules/VERSION
    #[arg(long, value_name = "DIR", requires = "file", help_heading = "Kernel")]
    pub modules: Option<PathBuf>,
    /// The source's name in `guest-images/versions.json`, if a scenario names one.
    #[arg(skip)]
    pub named: Option<String>,
}

impl KernelOptions {
    /// The distribution's kernel that the command line asks for.
    #[must_use]
    pub fn packaged(&self) -> Option<&str> {
        self.package.as_deref().or(self.quick.then_some(DISTRIBUTION))
    }
}

/// A kernel that the guests can run.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The image that a VMM starts, in the format of the machine's profile.
    pub vmlinux: PathBuf,
    /// The release, such as `6.12.57`.
    pub version: String,
    /// SHA-256 over the configuration, without the versions of the tools that built the kernel.
    pub config_digest: String,
    /// The modules, which a kernel of a distribution needs for most devices.
    pub modules: Option<Modules>,
}

/// Facts that are stored beside a built kernel.
#[derive(Serialize, Deserialize)]
struct Facts {
    version: String,
    config_digest: String,
    objects: usize,
}

impl Kernel {
    /// The kernel that `options` asks for, built if the cache does not have it.
    ///
    /// # Errors
    ///
    /// A kernel that was given lacks something, the source cannot be had, or the build fails.
    pub fn obtain(progress: &Progress, cache: &Cache, options: &KernelOptions) -> Result<Self> {
        let versions = Versions::read()?;
        let named = options.named.as_deref().map(|name| versions.kernel(name)).transpose()?;
        let chosen = options.file.is_some() || options.source.is_some() || options.packaged().is_some();
        if let (Some(name), true) = (&options.named, chosen) {
            bail!(
                "the scenario names its kernel's source, {name:?}: leave --kernel, --kernel-package, --quick and \
                 --kernel-source out"
            );
        }
        if let Some(name) = options.packaged() {
            return package::obtain(progress, cache, name);
        }
        let own = named.map_or(&[][..], |source| &source.fragments);
        let requests = requests(own.iter().copied().chain(options.fragments.iter().map(String::as_str)))?;
        if let Some(file) = &options.file {
            return given(progress, file, &requests, options.modules.as_deref());
        }
        packages::ensure(progress, cache, &PACKAGES)?;
        match Source::obtain(progress, cache, options.source.as_deref(), named)? {
            Source::Tree(tree) => from_tree(progress, cache, &requests, &tree),
            Source::Archive { path, digest, name } => {
                from_archive(progress, cache, &requests, &path, &digest, &name)
            }
        }
    }
}

/// The fragments' directory.
fn fragments_dir() -> PathBuf {
    crate::workspace().join("guest-images/kernel")
}

fn requests<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Requests> {
    let mut requests = Requests::default();
    for name in [BASE, Machine::host()?.architecture].into_iter().chain(names) {
        let named = fragments_dir().join(format!("{name}.config"));
        let path = if named.is_file() { named } else { PathBuf::from(name) };
        let text = fs::read_to_string(&path).with_context(|| {
            format!("no kernel fragment {name:?}: neither in guest-images/kernel nor a file of that name")
        })?;
        requests.add(&path.display().to_string(), &text)?;
    }
    Ok(requests)
}

/// The kernel in a file of the user. One that has modules is not checked by its configuration: whether it has what a VM
/// needs shows when the VM's modules are looked up.
fn given(progress: &Progress, file: &Path, requests: &Requests, modules: Option<&Path>) -> Result<Kernel> {
    let stage = progress.stage("kernel");
    stage.update(format!("checking {}", file.display()));
    let path = std::path::absolute(file).context("the working directory is gone")?;
    if !path.is_file() {
        bail!("--kernel {}: no such file", path.display());
    }
    let image = image::inspect(&path, Machine::host()?.kernel.format)?;
    if let Some(dir) = modules {
        let modules = Modules::open(dir).with_context(|| format!("--modules {}", dir.display()))?;
        stage.done(format!("Linux {} as given, with {} modules", image.version, modules.len()));
        let config_digest = image.config.as_ref().map(digest).unwrap_or_default();
        return Ok(Kernel { vmlinux: path, config_digest, version: image.version, modules: Some(modules) });
    }
    let Some(config) = &image.config else {
        bail!(
            "{} does not tell its configuration, so it cannot be checked; build it with CONFIG_IKCONFIG=y or put its \
             .config beside it",
            path.display()
        );
    };
    let lacking: Vec<String> = requests
        .lacking(config)
        .into_iter()
        .filter(|unmet| !unmet.optional)
        .map(|unmet| format!("\n  {unmet}"))
        .collect();
    if !lacking.is_empty() {
        bail!(
            "{} (Linux {}) lacks options that the guests need built in:{}\nbuild it with them, or leave --kernel out \
             and a kernel that has them is built",
            path.display(),
            image.version,
            lacking.concat()
        );
    }
    stage.done(format!("Linux {} as given", image.version));
    Ok(Kernel { vmlinux: path, config_digest: digest(config), version: image.version, modules: None })
}

fn from_archive(
    progress: &Progress,
    cache: &Cache,
    requests: &Requests,
    archive: &Path,
    digest: &str,
    name: &str,
) -> Result<Kernel> {
    let key = Key::new()
        .part("source", digest)
        .part("fragments", requests.text())
        .part("gcc", tool_version("gcc")?)
        .part("ld", tool_version("ld")?)
        .part("arch", std::env::consts::ARCH);
    let entry = cache.entry("kernel", &key, |dir| {
        progress.note(format!("kernel: building {name}; this happens once"));
        let scratch = Scratch::for_entry(dir)?;
        let work = scratch.path();
        check_space(work)?;
        let (tree, log) = (work.join("tree"), cache.dir("logs")?.join(format!("kernel-{}.log", key.name())));
        source::unpack(progress, archive, &tree, &work.join("package"), &log)?;
        let build = Build { machine: Machine::host()?, tree: &tree, dir: &work.join("build"), log: &log };
        make_kernel(progress, cache, &build, requests, name, dir)?;
        scratch.remove(cache)
    })?;
    read_kernel(progress, &entry.path)
}

/// The directory in which a kernel is unpacked and built.
enum Scratch {
    /// In the entry in the making: the next run removes it if this one dies.
    InEntry(PathBuf),
    /// A temporary directory, since Kbuild does not accept the path of the cache.
    Elsewhere(TempDir),
}

impl Scratch {
    fn for_entry(entry: &Path) -> Result<Self> {
        let within = entry.join("work");
        if build::is_buildable(&within) {
            fs::create_dir_all(&within).with_context(|| format!("cannot make {}", within.display()))?;
            return Ok(Self::InEntry(within));
        }
        let places = [std::env::temp_dir(), "/var/tmp".into(), "/tmp".into()];
        let made = places
            .iter()
            .filter(|place| build::is_buildable(place))
            .find_map(|place| tempfile::Builder::new().prefix("vvu-kernel-").tempdir_in(place).ok());
        made.map(Self::Elsewhere).with_context(|| {
            format!(
                "a kernel cannot be built in {}, as there is a space or colon in its path, nor in a temporary \
                 directory; XDG_CACHE_HOME names another place for the cache",
                entry.display()
            )
        })
    }

    fn path(&self) -> &Path {
        match self {
            Self::InEntry(path) => path,
            Self::Elsewhere(dir) => dir.path(),
        }
    }

    fn remove(self, cache: &Cache) -> Result<()> {
        match self {
            Self::InEntry(path) => cache.discard(&path).map(drop),
            Self::Elsewhere(dir) => {
                dir.close().context("cannot remove the folder that the kernel was built in")
            }
        }
    }
}

/// Builds from a tree that the user may change between builds; make decides what is out of date.
fn from_tree(progress: &Progress, cache: &Cache, requests: &Requests, tree: &Path) -> Result<Kernel> {
    let key = Key::new().part("tree", tree.as_os_str().as_encoded_bytes()).part("fragments", requests.text());
    let name = format!("kernel-tree/{}", key.name());
    cache.dir("kernel-tree")?;
    let _lock = cache.lock(&name)?;
    let dir = cache.dir(&name)?;
    let log = cache.dir("logs")?.join(format!("kernel-{}.log", key.name()));
    for (what, path) in [("--kernel-source", tree), ("the cache's path (XDG_CACHE_HOME)", &dir)] {
        if !build::is_buildable(path) {
            bail!("{what}: {}: Kbuild takes no path with a space or colon; name another one", path.display());
        }
    }
    let build = Build { machine: Machine::host()?, tree, dir: &dir.join("build"), log: &log };
    make_kernel(progress, cache, &build, requests, &tree.display().to_string(), &dir)?;
    read_kernel(progress, &dir)
}

fn make_kernel(
    progress: &Progress,
    cache: &Cache,
    build: &Build,
    requests: &Requests,
    source: &str,
    out: &Path,
) -> Result<()> {
    build.configure(progress, requests)?;
    let stage = progress.stage("kernel build");
    let key = Key::new().part("fragments", requests.text()).part("source", source);
    let counts = cache.dir("objects")?.join(key.name());
    let last = fs::read_to_string(&counts).ok().and_then(|text| text.trim().parse().ok());
    let compiled = build.compile(&stage, last.unwrap_or(EXPECTED_OBJECTS))?;
    // An incremental build makes few; the largest number is that of a whole one.
    let objects = last.unwrap_or(0).max(compiled);
    fs::write(&counts, objects.to_string()).context("cannot write to the cache")?;

    let vmlinux = out.join(VMLINUX);
    build.copy_kernel(&vmlinux)?;
    let image = image::inspect(&vmlinux, build.machine.kernel.format)?;
    let config =
        image.config.context("the kernel just built has no configuration in it; keep CONFIG_IKCONFIG=y")?;
    fs::copy(build.dir.join(".config"), out.join(CONFIG)).context("cannot keep the .config")?;
    let facts = Facts { version: image.version, config_digest: digest(&config), objects };
    let bytes = serde_json::to_vec_pretty(&facts).context("cannot encode the kernel's facts")?;
    fs::write(out.join(FACTS), bytes).context("cannot write to the cache")?;
    stage.done(format!("{compiled} objects"));
    Ok(())
}

fn read_kernel(progress: &Progress, dir: &Path) -> Result<Kernel> {
    let stage = progress.stage("kernel");
    let bytes = fs::read(dir.join(FACTS)).context("the kernel's facts are missing")?;
    let facts: Facts = serde_json::from_slice(&bytes).context("the kernel's facts are unreadable")?;
    stage.done(format!(
        "Linux {}, {} objects, configuration {:.12}",
        facts.version, facts.objects, facts.config_digest
    ));
    Ok(Kernel {
        vmlinux: dir.join(VMLINUX),
        version: facts.version,
        config_digest: facts.config_digest,
        modules: None,
    })
}

/// SHA-256 over the options that determine how a kernel behaves.
fn digest(config: &Config) -> String {
    const TOOLS: [&str; 5] = ["_VERSION", "CONFIG_CC_", "CONFIG_GCC", "CONFIG_LD_", "CONFIG_AS_"];
    let of_tool = |symbol: &str| {
        TOOLS.iter().any(|mark| symbol.starts_with(mark) || (mark.starts_with('_') && symbol.ends_with(mark)))
    };
    let lines = config.iter().filter(|(symbol, _)| !of_tool(symbol));
    lines.fold(Key::new(), |key, (symbol, value)| key.part(symbol, value)).digest()
}

fn tool_version(tool: &str) -> Result<String> {
    let output =
        Command::new(tool).arg("--version").output().with_context(|| format!("cannot run {tool}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}

fn check_space(dir: &Path) -> Result<()> {
    let stat =
        rustix::fs::statvfs(dir).with_context(|| format!("cannot see how full {} is", dir.display()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < BUILD_SPACE {
        bail!(
            "building a kernel needs {} MiB in {}, which has {} MiB free; XDG_CACHE_HOME names another place",
            BUILD_SPACE >> 20,
            dir.display(),
            free >> 20
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fragment_is_well_formed_and_base_has_the_seeds_options() {
        for entry in fs::read_dir(fragments_dir()).expect("there") {
            let path = entry.expect("readable").path();
            if let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".config")) {
                requests([name]).expect("well formed");
            }
        }
        let text = requests([]).expect("well formed").text();
        for symbol in config::SEED {
            assert!(text.contains(&format!("{symbol}=y\n")), "{symbol}");
        }
    }

    #[test]
    fn a_kernel_is_built_elsewhere_if_the_cache_has_a_space_in_its_path() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let cache = Cache::open_at(dir.path().join("vvu"), &Progress::new(true)).expect("opens");
        for (name, within) in [("entry", true), ("my entry", false), ("a:b", false)] {
            let entry = dir.path().join("vvu").join(name);
            let scratch = Scratch::for_entry(&entry).expect("a place");
            let path = scratch.path().to_owned();
            assert!(path.is_dir() && build::is_buildable(&path), "{name}: {}", path.display());
            assert_eq!(path.starts_with(&entry), within, "{name}");
            scratch.remove(&cache).expect("removed");
            assert!(!path.exists());
        }
        let error = from_tree(&Progress::new(true), &cache, &Requests::default(), Path::new("/a b"))
            .expect_err("refused")
            .to_string();
        assert!(error.contains("--kernel-source: /a b: Kbuild takes no path"), "{error}");
    }

    #[test]
    fn an_unknown_fragment_is_named() {
        let error = requests(["nonesuch"]).expect_err("refused").to_string();
        assert!(error.contains("nonesuch") && error.contains("guest-images/kernel"), "{error}");
    }

    #[test]
    fn the_digest_is_about_the_kernel_not_its_compiler() {
        let digest = |text: &str| digest(&config::parse(text));
        let base = digest("CONFIG_A=y\nCONFIG_GCC_VERSION=120200\nCONFIG_CC_VERSION_TEXT=\"gcc\"\n");
        assert_eq!(base, digest("CONFIG_A=y\nCONFIG_GCC_VERSION=130000\n"));
        assert_ne!(base, digest("CONFIG_A=y\nCONFIG_B=y\n"));
    }

    #[test]
    fn a_kernel_that_is_none_is_refused() {
        let progress = Progress::new(true);
        for (path, want) in [("/bin/sh", "without PVH"), ("/nonexistent", "no such file")] {
            let error = given(&progress, Path::new(path), &Requests::default(), None).expect_err("refused");
            assert!(format!("{error:#}").contains(want), "{error:#}");
        }
    }
}
