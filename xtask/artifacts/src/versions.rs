//! The VMMs and the kernel sources that a scenario can name: `guest-images/versions.json`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// The list is part of this program, which runs without its source in the outer VM of `e2e --nested`.
const LIST: &str = include_str!("../../../guest-images/versions.json");
/// The QEMU that is unpacked when the machine has no suitable one.
const DEFAULT_QEMU: &str = "debian-13-backports";

/// The kernel that is meant by "the distribution's".
const DEFAULT_KERNEL_PACKAGE: &str = "debian-13-cloud";
/// Stands for it in scenarios and on the command line.
pub const DISTRIBUTION: &str = "distribution";

/// The list, by name.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Versions<'a> {
    #[serde(borrow)]
    vmms: BTreeMap<&'a str, VmmSource<'a>>,
    kernels: BTreeMap<&'a str, KernelSource<'a>>,
    kernel_packages: BTreeMap<&'a str, KernelPackage<'a>>,
}

/// The source of a VMM.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmSource<'a> {
    /// QEMU from Debian's packages.
    #[serde(borrow)]
    Qemu(QemuSource<'a>),
    /// The Cloud Hypervisor that the machine has.
    CloudHypervisor {},
}

impl VmmSource<'_> {
    /// Tells whether the VMM can host a vvu device.
    #[must_use]
    pub fn hosts_vvu_devices(&self) -> bool {
        matches!(self, VmmSource::Qemu(QemuSource { vfio_user: true, .. }))
    }
}

/// A QEMU of Debian's.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QemuSource<'a> {
    /// Suites of the Debian archive; the last is preferred.
    #[serde(borrow)]
    pub suites: Vec<&'a str>,
    /// It has vfio-user-pci, which a VM with a vvu device needs.
    pub vfio_user: bool,
}

/// A kernel's source of Debian's.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelSource<'a> {
    /// Suites of the Debian archive; the last is preferred.
    #[serde(borrow)]
    pub suites: Vec<&'a str>,
    /// The package; `None` for the newest linux-source of these suites.
    #[serde(default)]
    pub package: Option<&'a str>,
    /// Fragments under `guest-images/kernel` that it needs besides the base.
    #[serde(default)]
    pub fragments: Vec<&'a str>,
}

/// A kernel of Debian's, as its package has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelPackage<'a> {
    /// Suites of the Debian archive; the last is preferred.
    #[serde(borrow)]
    pub suites: Vec<&'a str>,
    /// The flavour, such as `cloud`; `None` for the kernel with all drivers.
    #[serde(default)]
    pub flavour: Option<&'a str>,
}

impl Versions<'static> {
    /// Reads the list.
    ///
    /// # Errors
    ///
    /// The list is malformed.
    pub fn read() -> Result<Self> {
        serde_json::from_str(LIST).context("guest-images/versions.json is malformed")
    }

    /// The VMM `name`.
    ///
    /// # Errors
    ///
    /// There is none; the message lists those there are.
    pub fn vmm(&self, name: &str) -> Result<&VmmSource<'static>> {
        get(&self.vmms, "VMM", name)
    }

    /// The QEMU `name`.
    ///
    /// # Errors
    ///
    /// There is no VMM of that name, or it is not QEMU.
    pub(crate) fn qemu(&self, name: &str) -> Result<&QemuSource<'static>> {
        match self.vmm(name)? {
            VmmSource::Qemu(source) => Ok(source),
            VmmSource::CloudHypervisor {} => bail!("the VMM {name:?} is not QEMU"),
        }
    }

    /// The QEMU for a machine that has no suitable one.
    ///
    /// # Errors
    ///
    /// The list lacks it.
    pub(crate) fn default_qemu(&self) -> Result<&QemuSource<'static>> {
        self.qemu(DEFAULT_QEMU)
    }

    /// The kernel's source `name`.
    ///
    /// # Errors
    ///
    /// There is none; the message lists those there are.
    pub fn kernel(&self, name: &str) -> Result<&KernelSource<'static>> {
        get(&self.kernels, "kernel source", name)
    }

    /// The kernel package `name`, which [`DISTRIBUTION`] is as well.
    ///
    /// # Errors
    ///
    /// There is none; the message lists those there are.
    pub fn kernel_package(&self, name: &str) -> Result<&KernelPackage<'static>> {
        let name = if name == DISTRIBUTION { DEFAULT_KERNEL_PACKAGE } else { name };
        get(&self.kernel_packages, "kernel package", name)
    }

    /// The names of the VMMs that can host a vvu device.
    #[must_use]
    pub fn with_vvu_devices(&self) -> String {
        let names = self.vmms.iter().filter(|(_, source)| source.hosts_vvu_devices()).map(|(name, _)| *name);
        names.collect::<Vec<_>>().join(", ")
    }
}

fn get<'a, T>(list: &'a BTreeMap<&str, T>, kind: &str, name: &str) -> Result<&'a T> {
    list.get(name).with_context(|| {
        let known = list.keys().copied().collect::<Vec<_>>().join(", ");
        format!("no {kind} {name:?} in guest-images/versions.json: known are {known}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_well_formed_and_an_unknown_name_is_answered_with_those_there_are() {
        let versions = Versions::read().expect("well formed");
        assert!(versions.default_qemu().expect("there").vfio_user);
        let suites = versions.vmms.values().filter_map(|vmm| match vmm {
            VmmSource::Qemu(source) => Some(&source.suites),
            VmmSource::CloudHypervisor {} => None,
        });
        let suites = suites.chain(versions.kernels.values().map(|kernel| &kernel.suites));
        for suites in suites.chain(versions.kernel_packages.values().map(|kernel| &kernel.suites)) {
            // Suites and never hosts: which mirror they come from is the machine's business.
            let plain = |name: &str| name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
            assert!(!suites.is_empty() && suites.iter().all(|suite| plain(suite)), "{suites:?}");
        }
        versions.kernel_package(DISTRIBUTION).expect("there");
        for error in [
            versions.vmm("nonesuch").map(drop),
            versions.kernel("nonesuch").map(drop),
            versions.kernel_package("nonesuch").map(drop),
        ] {
            let error = error.expect_err("unknown").to_string();
            assert!(error.contains("nonesuch") && error.contains("known are "), "{error}");
        }
        assert_eq!(versions.with_vvu_devices(), "debian-13-backports, debian-14");
        versions.qemu("cloud-hypervisor").expect_err("another VMM");
    }
}
