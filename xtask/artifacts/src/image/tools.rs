//! Other projects' programs in the guests: busybox and lspci, static, from Debian.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::apt::{self, Apt, Suites};
use crate::cache::{Cache, Key};
use crate::packages;
use vvu_process::logged;
use vvu_process::progress::{Progress, Stage};

/// Binary package with a static busybox.
const BUSYBOX: &str = "busybox-static";

/// Source package of lspci: the binary one pulls 9 MB of libraries into the image.
const PCIUTILS: &str = "pciutils";

/// Arguments of make for an lspci that reads sysfs and pci.ids and nothing else.
const LSPCI_OPTIONS: [&str; 9] = [
    "ZLIB=no",
    "DNS=no",
    "LIBKMOD=no",
    "HWDB=no",
    "SHARED=no",
    "IDSDIR=/usr/share/misc",
    "OPT=-Os -ffunction-sections -fdata-sections",
    "LDFLAGS=-static -s -Wl,--gc-sections",
    "lspci",
];

/// Vendors a guest can meet, as pci.ids has them: AMD (its IOMMU), QEMU, virtio, QEMU's bridges, Intel (a PC's chipset).
const VENDORS: [&str; 5] = ["1022", "1234", "1af4", "1b36", "8086"];

/// Applets that guests must not have, as they would hide our own programs.
const NO_APPLETS: [&str; 3] = ["busybox", "init", "linuxrc"];

/// The programs and their data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestTools {
    /// A static busybox.
    pub busybox: PathBuf,
    /// The commands of busybox.
    pub applets: Vec<String>,
    /// A static lspci that looks for its names in /usr/share/misc/pci.ids.
    pub lspci: PathBuf,
    /// The names of the vendors and devices that guests meet, and of all classes.
    pub pci_ids: PathBuf,
}

impl GuestTools {
    /// Gets them from Debian, or finds them in the cache.
    ///
    /// # Errors
    ///
    /// Debian's mirror cannot be reached, or lspci does not build.
    pub fn obtain(progress: &Progress, cache: &Cache) -> Result<Self> {
        let stage = progress.stage("guest tools");
        let key = Key::new()
            .part("packages", [BUSYBOX, PCIUTILS].join(" "))
            .part("options", LSPCI_OPTIONS.join(" "))
            .part("vendors", VENDORS.join(" "));
        let entry = cache.entry("guest-tools", &key, |dir| make(progress, cache, &stage, dir))?;
        let file = |name: &str| entry.path.join(name);
        let list = fs::read_to_string(file("applets")).context("cannot read the list of applets")?;
        let applets = list.lines().filter(|name| !NO_APPLETS.contains(name)).map(str::to_owned).collect();
        stage.done("busybox and lspci");
        Ok(Self { busybox: file("busybox"), applets, lspci: file("lspci"), pci_ids: file("pci.ids") })
    }
}

fn make(progress: &Progress, cache: &Cache, stage: &Stage, dir: &Path) -> Result<()> {
    let needed = [packages::program("gcc", "gcc"), packages::program("make", "make")];
    packages::ensure(progress, cache, &needed)?;
    let temporary = tempfile::tempdir().context("cannot create a temporary directory")?;
    let (unpacked, source) = (temporary.path().join("busybox"), temporary.path().join("pciutils"));
    for path in [&unpacked, &source] {
        fs::create_dir(path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    {
        let apt = Apt::open(cache, stage, Suites::MachineSources)?;
        for deb in apt.download(&[BUSYBOX])? {
            apt::unpack(&deb, &unpacked)?;
        }
        let files = apt.source(PCIUTILS)?;
        let is_upstream = |path: &&PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.contains(".orig.tar.") && !name.ends_with(".asc")
        };
        let tarball = files.iter().find(is_upstream).with_context(|| format!("{files:?} has no source"))?;
        let mut tar = Command::new("tar");
        tar.arg("-xf").arg(tarball).args(["--strip-components=1", "-C"]).arg(&source);
        logged::run(tar, &temporary.path().join("tar.log"), |_| ())?;
    }

    stage.update("building lspci");
    let mut build = Command::new("make");
    build.arg("-C").arg(&source).args(LSPCI_OPTIONS);
    logged::run(build, &cache.dir("logs")?.join("pciutils.log"), |_| ())?;
    let copy = |from: &Path, name: &str| {
        fs::copy(from, dir.join(name)).map(drop).with_context(|| format!("cannot copy {}", from.display()))
    };
    copy(&source.join("lspci"), "lspci")?;
    // Debian is on its way from /bin to /usr/bin.
    let busybox = ["usr/bin/busybox", "bin/busybox"].map(|path| unpacked.join(path));
    let Some(busybox) = busybox.iter().find(|path| path.is_file()) else {
        bail!("{BUSYBOX} has no busybox where it was expected");
    };
    copy(busybox, "busybox")?;
    let list = Command::new(dir.join("busybox")).arg("--list").output().context("cannot run busybox")?;
    ensure!(list.status.success(), "busybox --list failed ({})", list.status);
    fs::write(dir.join("applets"), list.stdout).context("cannot write the list of applets")?;
    let ids = fs::read(source.join("pci.ids")).context("pciutils has no pci.ids")?;
    let ids = trim_pci_ids(&String::from_utf8_lossy(&ids));
    fs::write(dir.join("pci.ids"), ids).context("cannot write pci.ids")
}

/// Leaves the vendors that guests meet with their devices, without subsystems, and all classes.
fn trim_pci_ids(ids: &str) -> String {
    let mut section = Section::Dropped;
    let keep = |line: &&str| {
        if line.starts_with("C ") {
            section = Section::Class;
        } else if !line.starts_with('\t') {
            let met = VENDORS.iter().any(|vendor| line.starts_with(vendor));
            section = if met { Section::Vendor } else { Section::Dropped };
        }
        match section {
            Section::Dropped => false,
            // Two tabs are a subsystem here, but a programming interface below a class.
            Section::Vendor => !line.starts_with("\t\t"),
            Section::Class => true,
        }
    };
    let lines = ids.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.filter(keep).flat_map(|line| [line, "\n"]).collect()
}

/// The section of pci.ids that a line belongs to.
enum Section {
    Dropped,
    Vendor,
    Class,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_ids_keep_known_vendors_and_all_classes() {
        let ids = "# List\n\n0001  Some\n\t0001  Thing\n\
                   1af4  Red Hat, Inc.\n\t1000  Virtio network device\n\t\t01de fffb  Propolis\n\
                   1af5  Other\n\t0001  Thing\n\
                   C 00  Unclassified device\n\t00  Non-VGA\nC 01  Mass storage\n\t01  IDE\n\t\t00  ISA\n";
        assert_eq!(
            trim_pci_ids(ids),
            "1af4  Red Hat, Inc.\n\t1000  Virtio network device\n\
             C 00  Unclassified device\n\t00  Non-VGA\nC 01  Mass storage\n\t01  IDE\n\t\t00  ISA\n"
        );
    }
}
