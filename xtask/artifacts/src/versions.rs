//! The QEMUs and the kernel sources that a scenario can name: `guest-images/versions.json`.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::Deserialize;

/// Part of this program, which runs without the source too: in the outer VM of `e2e --nested`.
const LIST: &str = include_str!("../../../guest-images/versions.json");
/// The QEMU that is unpacked when the machine has none that suits.
const DEFAULT_QEMU: &str = "debian-13-backports";

/// All of them, by name.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Versions<'a> {
    #[serde(borrow)]
    qemus: BTreeMap<&'a str, QemuSource<'a>>,
    kernels: BTreeMap<&'a str, KernelSource<'a>>,
}

/// A QEMU of Debian's.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QemuSource<'a> {
    /// Suites of the Debian archive; the last is preferred.
    #[serde(borrow)]
    pub suites: Vec<&'a str>,
    /// Whether it has vfio-user-pci, which a VM with a vvu device cannot do without.
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

impl Versions<'static> {
    /// Reads the list.
    ///
    /// # Errors
    ///
    /// The list is malformed.
    pub fn read() -> Result<Self> {
        serde_json::from_str(LIST).context("guest-images/versions.json is malformed")
    }

    /// The QEMU `name`.
    ///
    /// # Errors
    ///
    /// There is none; the message lists those there are.
    pub fn qemu(&self, name: &str) -> Result<&QemuSource<'static>> {
        get(&self.qemus, "QEMU", name)
    }

    /// The QEMU for a machine that has none that suits.
    ///
    /// # Errors
    ///
    /// The list lacks it.
    pub fn default_qemu(&self) -> Result<&QemuSource<'static>> {
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

    /// The names of the QEMUs that have vfio-user-pci.
    pub fn with_vfio_user(&self) -> String {
        let names = self.qemus.iter().filter(|(_, source)| source.vfio_user).map(|(name, _)| *name);
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
        let suites = versions.qemus.values().map(|qemu| &qemu.suites);
        for suites in suites.chain(versions.kernels.values().map(|kernel| &kernel.suites)) {
            // Suites and never hosts: which mirror they come from is the machine's business.
            let plain = |name: &str| name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
            assert!(!suites.is_empty() && suites.iter().all(|suite| plain(suite)), "{suites:?}");
        }
        for error in [versions.qemu("nonesuch").map(drop), versions.kernel("nonesuch").map(drop)] {
            let error = error.expect_err("unknown").to_string();
            assert!(error.contains("nonesuch") && error.contains("known are "), "{error}");
        }
        assert!(!versions.with_vfio_user().contains("debian-12"));
    }
}
