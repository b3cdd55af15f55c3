//! The outer VM of `--nested`: its emulated CPU has SVM, its kernel has KVM, and it holds everything that a run in it
//! needs, this program included.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;
use vvu_artifacts::accel::{self, Kind};
use vvu_artifacts::cache::Cache;
use vvu_artifacts::image::{OverlayEntry, build_xtask, with_overlay};
use vvu_artifacts::kernel::{Kernel, KernelOptions};
use vvu_artifacts::qemu::Qemu;
use vvu_process::progress::Progress;

use crate::facts;
use crate::lab::Lab;
use crate::obtain::SetupOptions;
use crate::prepared;
use crate::spawned::ending;
use crate::vm::config::{Boot, Config};
use crate::vm::cpu::Cpu;
use crate::vm::{Vm, printed};

/// Adds KVM to the guest kernel.
const FRAGMENT: &str = "kvm";
/// Directory of the set-up in the outer VM.
const PLACE: &str = "/prepared";
/// The target directory of the run inside.
const TARGET: &str = "/run/target";
/// RAM of the outer VM in addition to that of the VMs in it: it holds its initramfs twice while it unpacks it.
const ROOM_MIB: u64 = 1280;
/// Factor by which limits inside exceed those for native speed.
const SLOWNESS: u32 = 20;
/// How long the outer VM may take to boot, and to shut down, at native speed.
const BOOT_LIMIT: Duration = Duration::from_secs(20);
/// How long it may take to fetch a file, at native speed.
const FETCH_LIMIT: Duration = Duration::from_secs(10);

/// The set-up that a nested run needs in addition to the usual one.
pub struct NestedSetup {
    /// The QEMU that runs inside.
    qemu_root: PathBuf,
    /// The outer VM's kernel.
    kernel: Kernel,
    /// This program, static.
    xtask: PathBuf,
}

impl NestedSetup {
    /// Builds and fetches it.
    ///
    /// # Errors
    ///
    /// Fails on the first thing that cannot be had; the message names the remedy.
    pub fn obtain(options: &SetupOptions, progress: &Progress) -> Result<Self> {
        let cache = Cache::open(progress)?;
        let qemu_root = Qemu::portable(progress, &cache)?;
        let mut fragments = options.kernel.fragments.clone();
        fragments.push(FRAGMENT.to_owned());
        let kernel = KernelOptions { fragments, ..options.kernel.clone() };
        let kernel = Kernel::obtain(progress, &cache, &kernel)?;
        Ok(Self { qemu_root, kernel, xtask: build_xtask(progress)? })
    }
}

/// A running outer VM. Dropping it kills it.
pub struct Outer<'a> {
    lab: &'a Lab<'a>,
    vm: Vm,
}

impl<'a> Outer<'a> {
    /// The RAM in MiB that it needs for VMs with `inner_mib` of RAM and `disks_mib` of disks.
    #[must_use]
    pub fn memory_mib(inner_mib: u64, disks_mib: u64) -> u64 {
        // A disk is held twice: by an initramfs and by the VM that unpacks it.
        inner_mib.saturating_add(disks_mib.saturating_mul(2)).saturating_add(ROOM_MIB)
    }

    /// Starts the outer VM. It holds the set-up of `lab`, with its kernel of these fragments, and `extra`.
    ///
    /// # Errors
    ///
    /// Fails if the run directory cannot be written or the VM does not boot.
    pub fn start(
        lab: &'a Lab<'a>,
        kernel_fragments: &[String],
        nested: &NestedSetup,
        extra: Vec<OverlayEntry>,
        memory_mib: u64,
        progress: &Progress,
    ) -> Result<(Self, facts::Outer)> {
        let NestedSetup { qemu_root, kernel, xtask } = nested;
        let (setup, run) = (lab.setup(), lab.run());
        let stage = progress.stage("outer image");
        let mut overlay = prepared::lay_out(setup, kernel_fragments, qemu_root, run, PLACE)?;
        overlay.push(OverlayEntry::File { path: format!("{PLACE}/xtask"), mode: 0o755, from: xtask.clone() });
        overlay.extend(extra);
        let initramfs = run.file("outer.cpio");
        let written = with_overlay(&setup.base, &overlay, &initramfs)?;
        stage.done(format!("{} MiB", written.bytes >> 20));

        let facts = facts::Outer {
            accelerator: facts::Accelerator {
                used: Kind::Tcg.to_string(),
                reason: format!(
                    "--nested: it emulates the CPU {}",
                    setup.qemu.machine.qemu_hypervisor_cpu()?
                ),
            },
            qemu: setup.vmm(None)?.into(),
            kernel: facts::Kernel::from(kernel),
            ..facts::Outer::default()
        };
        let config = Config { cpus: 2, cpu: Cpu::Hypervisor, ..Config::new("outer", memory_mib) };
        let stage = progress.stage("outer boot");
        let vm = lab.vm_with(&config, Boot { kernel: &kernel.vmlinux, initramfs: &initramfs })?;
        vm.ready(lab.deadline(BOOT_LIMIT))?;
        stage.done(format!("Linux {} with KVM", kernel.version));
        Ok((Self { lab, vm }, facts))
    }

    /// Runs this program in the outer VM, with KVM and what it holds, and returns the JSON that it prints.
    ///
    /// # Errors
    ///
    /// Fails if it prints no JSON or has not ended within `limit`.
    pub fn json<T: DeserializeOwned>(&self, words: &str, limit: Duration) -> Result<T> {
        let command = format!(
            "CARGO_TARGET_DIR={TARGET} {PLACE}/xtask {words} --prepared {PLACE} --accel kvm \
             --slowness {SLOWNESS} --json"
        );
        let exit = self.vm.exec(&command, Instant::now() + limit)?;
        // If the run ended before it could write a report, its messages tell why.
        serde_json::from_str(&exit.output.stdout).with_context(|| {
            format!("the run inside ended with {} and no report{}", ending(exit.end), printed(&exit.output))
        })
    }

    /// Copies the logs of the run inside into `inner/` of the run directory.
    ///
    /// # Errors
    ///
    /// Fails if there are none or they cannot be written.
    pub fn fetch_logs(&self) -> Result<()> {
        let run = self.lab.run();
        let dir = run.file("inner");
        std::fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let latest = format!("{TARGET}/e2e/latest");
        let output = |command: &str| self.vm.run_until(command, self.lab.deadline(FETCH_LIMIT));
        // Not every kind of run has every kind of file.
        for name in output(&format!("cd {latest} && ls -d *.log *.cmd *.json 2>/dev/null; true"))?.lines() {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            ensure!(name.bytes().all(plain), "outer: {name:?} is no name of a log");
            run.write(&format!("inner/{name}"), output(&format!("cat {latest}/{name}"))?)?;
        }
        Ok(())
    }

    /// Shuts the outer VM down and returns whether it has left anything on the host. The report from inside tells what
    /// the run has left there.
    ///
    /// # Errors
    ///
    /// Fails if the VM does not shut down.
    pub fn end(self, progress: &Progress) -> Result<Result<String>> {
        let stage = progress.stage("outer end");
        self.vm.power_off(self.lab.deadline(BOOT_LIMIT))?;
        drop(self.vm);
        let left = self.lab.check_leftovers();
        stage.done("powered off");
        Ok(left)
    }
}

/// The options of the set-up for the outer VM itself.
#[must_use]
pub fn outside(options: &SetupOptions) -> SetupOptions {
    SetupOptions { accel: accel::Request::Tcg, ..options.clone() }
}

/// The reason why KVM was used, if it was used and is proven to work.
///
/// # Errors
///
/// The message tells what was used instead, or that the proof is missing.
pub fn proven(used: &facts::Accelerator) -> Result<String> {
    let facts::Accelerator { used, reason } = used;
    ensure!(*used == Kind::Kvm.to_string(), "{used} was used: {reason}");
    ensure!(!reason.starts_with(accel::UNPROVEN), "KVM is not proven: {reason}");
    Ok(reason.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_counts_only_with_proof() {
        let used = |used: &str, reason: &str| facts::Accelerator {
            used: used.to_owned(),
            reason: reason.to_owned(),
        };
        proven(&used("kvm", "KVM runs kernel code at 1.00 of the host's speed")).expect("proven");
        for (kind, reason) in
            [("tcg", "no /dev/kvm"), ("kvm", "asked for by --accel kvm, although KVM hangs")]
        {
            let error = proven(&used(kind, reason)).expect_err("not proven").to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
