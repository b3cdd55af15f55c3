//! The outer VM of `--nested`: its emulated CPU has SVM, its kernel has KVM, and it holds all that a run in it needs,
//! this same program included.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use vvu_init::protocol::End;

use crate::facts;
use crate::leftover;
use crate::prepared;
use crate::rundir::RunDir;
use crate::setup::{Setup, SetupOptions};
use crate::vm::args::{Config, Guest, Serial, arguments};
use crate::vm::{Cpu, Logs, Vm, ending, printed};
use vvu_artifacts::accel::{self, Kind};
use vvu_artifacts::cache::Cache;
use vvu_artifacts::image::{OverlayEntry, build_xtask, with_overlay};
use vvu_artifacts::kernel::{Kernel, KernelOptions};
use vvu_artifacts::qemu::Qemu;
use vvu_process::interrupt;
use vvu_process::progress::Progress;

/// Adds KVM to the guest kernel.
const FRAGMENT: &str = "kvm";
/// Where the run's needs are in the outer VM.
pub const PLACE: &str = "/prepared";
/// Where the run's directory is in the outer VM.
const TARGET: &str = "/run/target";
/// RAM of the outer VM beside that of the VMs in it: twice its initramfs, while that is unpacked, and their disks.
const ROOM_MIB: u64 = 1280;
/// How much longer than at native speed things may take inside.
const SLOWNESS: u32 = 20;
/// How long the outer VM may take to boot, and to shut down.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// How long it may take to fetch a file.
const FETCH_LIMIT: Duration = Duration::from_secs(60);

/// What a nested run needs beside the usual set-up.
pub struct NestedSetup {
    /// The QEMU for the outer VM's inside.
    qemu_root: PathBuf,
    /// The outer VM's kernel.
    kernel: Kernel,
    /// This program, static.
    xtask: PathBuf,
}

impl NestedSetup {
    /// Obtains everything.
    ///
    /// # Errors
    ///
    /// The first thing that cannot be had, and the remedy.
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

/// A running outer VM. Dropping it ends it.
pub struct Outer {
    vm: Vm,
}

impl Outer {
    /// RAM that it needs for `inner_mib` of RAM and `disks_mib` of disks of the VMs in it.
    pub fn memory_mib(inner_mib: u64, disks_mib: u64) -> u64 {
        // A disk is in an initramfs, and in the memory of the VM that unpacks it.
        inner_mib.saturating_add(disks_mib.saturating_mul(2)).saturating_add(ROOM_MIB)
    }

    /// Starts it with `setup` and its kernel of these fragments inside, and with what `extra` lays over its root.
    ///
    /// # Errors
    ///
    /// The run directory cannot be written, or the VM does not boot.
    pub fn start(
        setup: &Setup,
        kernel_fragments: &[String],
        nested: &NestedSetup,
        extra: Vec<OverlayEntry>,
        memory_mib: u64,
        run: &RunDir,
        progress: &Progress,
    ) -> Result<(Self, facts::Outer)> {
        let NestedSetup { qemu_root, kernel, xtask } = nested;
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
            qemu: facts::Qemu::from(&setup.qemu),
            kernel: facts::Kernel::from(kernel),
            ..facts::Outer::default()
        };
        let config = Config {
            name: "outer".to_owned(),
            memory_mib,
            cpus: 2,
            cpu: Cpu::Hypervisor,
            ..Config::default()
        };
        let guest = Guest { accelerator: Kind::Tcg, kernel: &kernel.vmlinux, initramfs: &initramfs };
        let logs = Logs { console: run.file("outer-console.log"), qemu: run.file("outer-qemu.log") };
        let words = arguments(&config, guest, Serial::Inherited(&logs.console))?;
        let line = facts::command_line(setup.qemu.argv_prefix().iter().chain(&words));
        run.write("outer.cmd", line + "\n")?;
        let mut command = setup.qemu.command();
        command.args(&words).env(leftover::RUN_VARIABLE, run.id());

        let stage = progress.stage("outer boot");
        let mut vm = Vm::launch("outer", command, logs)?;
        vm.ready(Instant::now() + BOOT_LIMIT, &mut interrupt::check)?;
        stage.done(format!("Linux {} with KVM", kernel.version));
        Ok((Self { vm }, facts))
    }

    /// Runs this program in it, with KVM and what is prepared, and returns the JSON it prints.
    ///
    /// # Errors
    ///
    /// It printed none, or was not done within `limit`.
    pub fn json<T: DeserializeOwned>(&mut self, words: &str, limit: Duration) -> Result<T> {
        let command = format!(
            "CARGO_TARGET_DIR={TARGET} {PLACE}/xtask {words} --prepared {PLACE} --accel kvm \
             --slowness {SLOWNESS} --json"
        );
        let exit = self.vm.run(&command, limit, &mut interrupt::check)?;
        // Before the run had a report, only its words tell what happened.
        serde_json::from_str(&exit.output.stdout).with_context(|| {
            format!("the run inside ended with {} and no report{}", ending(exit.end), printed(&exit.output))
        })
    }

    /// Copies the logs of the inner run into `inner/` of the run directory.
    ///
    /// # Errors
    ///
    /// There are none, or they cannot be written.
    pub fn fetch_logs(&mut self, run: &RunDir) -> Result<()> {
        let dir = run.file("inner");
        std::fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let latest = format!("{TARGET}/e2e/latest");
        let mut output = |command: &str| -> Result<String> {
            let exit = self.vm.run(command, FETCH_LIMIT, &mut interrupt::check)?;
            if exit.end != End::Code(0) {
                bail!("outer: `{command}` ended with {}{}", ending(exit.end), printed(&exit.output));
            }
            Ok(exit.output.stdout)
        };
        // Not every kind of run has every kind of file.
        for name in output(&format!("cd {latest} && ls -d *.log *.cmd *.json 2>/dev/null; true"))?.lines() {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            ensure!(name.bytes().all(plain), "outer: {name:?} is no name of a log");
            run.write(&format!("inner/{name}"), output(&format!("cat {latest}/{name}"))?)?;
        }
        Ok(())
    }

    /// Shuts it down; returns whether it left anything.
    ///
    /// # Errors
    ///
    /// It does not shut down. The inner result says what it left.
    pub fn end(mut self, run: &RunDir, progress: &Progress) -> Result<Result<String>> {
        let stage = progress.stage("outer end");
        self.vm.power_off(Instant::now() + BOOT_LIMIT, &mut interrupt::check)?;
        drop(self.vm);
        let left = leftover::check(&run.id(), &[]);
        stage.done("powered off");
        Ok(left)
    }
}

/// The set-up's options for the outer VM itself.
pub fn outside(options: &SetupOptions) -> SetupOptions {
    SetupOptions { accel: accel::Request::Tcg, ..options.clone() }
}

/// Why KVM, if that was used and is proven to work.
///
/// # Errors
///
/// What was used instead, or that the proof is missing.
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
