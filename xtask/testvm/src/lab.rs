//! The one place that starts VMs, proxies and other programs of a run.

use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use regex::Regex;
use vvu_artifacts::image::with_overlay;
use vvu_init::protocol::READY_LINE;
use vvu_process::children;

use crate::facts::command_line;
use crate::leftover::{self, RUN_VARIABLE};
use crate::memory;
use crate::process::{Process, Ready};
use crate::proxy::ProxyConfig;
use crate::qmp::Qmp;
use crate::rundir::{RunDir, SocketDir};
use crate::setup::{KernelId, Setup};
use crate::vm::config::{Boot, Config, Device, Serial};
use crate::vm::{Logs, Vm};
use crate::watch::{Watch, lock};

/// Line that `vvu proxy` prints once both sockets listen.
const PROXY_READY: &str = "^vvu: proxy ready$";
/// Time at native speed within which a proxy must listen and a guest must print the first line of its init.
const START_LIMIT: Duration = Duration::from_secs(10);
/// The longest deadline.
const MAX_LIMIT: Duration = Duration::from_secs(86_400);
/// How long a poll of [`Lab::wait`] sleeps.
const POLL_PERIOD: Duration = Duration::from_millis(20);
/// The VM of [`Lab::bare_boot`].
const BARE: &str = "bare";
/// RAM of the VM of [`Lab::bare_boot`] in MiB.
const BARE_MEMORY_MIB: u64 = 512;

/// Starts the VMs and processes of one run and makes every wait end when one of them fails.
///
/// Logs and exact command lines go to the run directory: `NAME.cmd`, `NAME-console.log` and `NAME-qemu.log` of a VM,
/// `proxy-NAME.cmd` and `proxy-NAME.log` of a proxy. Drop VMs and processes before their lab.
pub struct Lab<'a> {
    run: &'a RunDir,
    setup: &'a Setup,
    sockets: SocketDir,
    watch: Arc<Watch>,
    /// Sockets and links of all proxies so far.
    transient: Mutex<Vec<PathBuf>>,
}

/// A device that was attached to a running VM.
#[derive(Debug, Clone)]
pub struct Attached {
    /// When the guest's kernel announced it; when the VMM took it if the kernel does not tell.
    pub at: Instant,
    /// What proves it.
    pub evidence: String,
}

impl<'a> Lab<'a> {
    /// A lab without VMs, which takes programs and images from `setup`.
    ///
    /// # Errors
    ///
    /// Fails if no directory for sockets can be made.
    pub fn new(run: &'a RunDir, setup: &'a Setup) -> Result<Self> {
        let sockets = SocketDir::for_run(run)?;
        Ok(Self { run, setup, sockets, watch: Arc::default(), transient: Mutex::default() })
    }

    /// The directory for logs.
    #[must_use]
    pub fn run(&self) -> &'a RunDir {
        self.run
    }

    /// The programs and images.
    #[must_use]
    pub fn setup(&self) -> &'a Setup {
        self.setup
    }

    /// The directory for sockets.
    #[must_use]
    pub fn sockets(&self) -> &SocketDir {
        &self.sockets
    }

    /// The time after `limit`, which is meant for native speed and scaled by the set-up's slowness.
    #[must_use]
    pub fn deadline(&self, limit: Duration) -> Instant {
        Instant::now() + limit.saturating_mul(self.setup.slowness).min(MAX_LIMIT)
    }

    /// Starts a VM with the set-up's plain kernel and base image, and the modules for its devices if the kernel has
    /// modules.
    ///
    /// # Errors
    ///
    /// Fails if the configuration is contradictory, the kernel lacks a module, or the VMM or a log cannot be started or
    /// written.
    pub fn vm(&self, config: &Config) -> Result<Vm> {
        let boot = self.plain()?;
        let modules = self.setup.kernel_modules(&KernelId::default(), config)?;
        if modules.is_empty() {
            return self.vm_with(config, boot);
        }
        let initramfs = self.run.file(&format!("{}.cpio", config.name));
        with_overlay(&self.setup.base, &modules, &initramfs)?;
        self.vm_with(config, Boot { initramfs: &initramfs, ..boot })
    }

    /// Starts a VM with a kernel and an initramfs of its own.
    ///
    /// # Errors
    ///
    /// Fails as [`Lab::vm`] does.
    pub fn vm_with(&self, config: &Config, boot: Boot<'_>) -> Result<Vm> {
        let name = &config.name;
        let logs = Logs {
            console: self.run.file(&format!("{name}-console.log")),
            vmm: self.run.file(&format!("{name}-qemu.log")),
        };
        let socket = config.managed.then(|| self.sockets.socket(&format!("{name}.manage")));
        let management = socket.as_deref().map(Qmp::listen).transpose()?;
        let serial = Serial::Inherited { management: socket.as_deref() };
        let command = self.command(config, boot, serial)?;
        let failures = self.setup.vmm(config.vmm.as_deref())?.failures();
        Vm::launch(name, command, logs, management, failures, self.setup.slowness, &self.watch)
    }

    /// Attaches `config.attachable[index]` to `vm`, which was started with `config`, and waits until the guest can use it
    /// if it is a disk.
    ///
    /// QEMU stands still, and its guest with it, until the back-end answers: attach a device when that is ready.
    ///
    /// # Errors
    ///
    /// Fails if the VMM refuses, as every wait does, and after `deadline`.
    pub fn attach(&self, vm: &Vm, config: &Config, index: usize, deadline: Instant) -> Result<Attached> {
        let exchanges = self.setup.vmm(config.vmm.as_deref())?.attach(config, index)?;
        // A guest that still boots might miss the device, and it may have announced another one before.
        vm.ready(deadline)?;
        vm.skip_console()?;
        vm.manage(&exchanges, deadline)?;
        match config.attachable.get(index).and_then(Device::announcement) {
            Some(line) => {
                let found = vm.wait_for(&Regex::new(line)?, deadline)?;
                let at = Instant::now();
                // The kernel announces a disk a little before it can be opened.
                let disk = found.value;
                let usable = format!("until head -c 512 /dev/{disk} > /dev/null 2>&1; do sleep 0.01; done");
                vm.run_until(&usable, deadline)?;
                Ok(Attached { at, evidence: found.line })
            }
            None => Ok(Attached { at: Instant::now(), evidence: format!("{} took the device", vm.name()) }),
        }
    }

    /// Detaches `config.attachable[index]` from `vm`, which was started with `config`, and waits until the guest has let
    /// go of it.
    ///
    /// # Errors
    ///
    /// Fails if the VMM or the guest refuses, as every wait does, and after `deadline`.
    pub fn detach(&self, vm: &Vm, config: &Config, index: usize, deadline: Instant) -> Result<()> {
        let exchanges = self.setup.vmm(config.vmm.as_deref())?.detach(config, index)?;
        vm.ready(deadline)?;
        vm.manage(&exchanges, deadline)
    }

    /// Starts a VM whose console is this program's terminal, with a shell on it. Call it on the main thread.
    ///
    /// # Errors
    ///
    /// Fails as [`Lab::vm`] does.
    pub fn vm_on_terminal(&self, config: &Config, boot: Boot<'_>) -> Result<Child> {
        let command = self.command(config, boot, Serial::Terminal)?;
        children::spawn_on_terminal(command).with_context(|| format!("cannot start the VM {}", config.name))
    }

    /// The words that start a VM with its console on a terminal, as [`Lab::vm_on_terminal`] does.
    ///
    /// # Errors
    ///
    /// Fails if the configuration is contradictory.
    pub fn vm_words(&self, config: &Config, boot: Boot<'_>) -> Result<Vec<String>> {
        let vmm = self.setup.vmm(config.vmm.as_deref())?;
        let mut words = vmm.argv_prefix();
        words.extend(vmm.arguments(config, self.setup.accelerator.kind, boot, Serial::Terminal)?);
        Ok(words)
    }

    /// Starts a proxy and waits until it listens on both sockets.
    ///
    /// # Errors
    ///
    /// Fails if the proxy cannot be started or does not listen in time.
    pub fn proxy(&self, config: &ProxyConfig) -> Result<Process> {
        let words = config.words(&self.setup.binaries.vvu);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        self.note(&format!("proxy-{}", config.name), &words)?;
        {
            let mut transient = lock(&self.transient);
            // A path that exists belongs to somebody else, or to the proxy that this one follows.
            transient.extend(config.transient().into_iter().filter(|path| path.symlink_metadata().is_err()));
            transient.sort();
            transient.dedup();
        }
        let (name, log) = (format!("the proxy {}", config.name), format!("proxy-{}", config.name));
        self.process(&name, command, &log, Ready::Line(Regex::new(PROXY_READY)?))
    }

    /// Starts a program on the host and waits until it is ready. It logs to `log`.log in the run directory.
    ///
    /// # Errors
    ///
    /// Fails if the program cannot be started or is not ready in time.
    pub fn process(&self, name: &str, mut command: Command, log: &str, ready: Ready) -> Result<Process> {
        command.env(RUN_VARIABLE, self.run.id());
        let log = self.run.file(&format!("{log}.log"));
        let process = Process::start(name, command, log, ready, &self.watch)?;
        process.ready(self.deadline(START_LIMIT))?;
        Ok(process)
    }

    /// Waits until `poll` returns a value.
    ///
    /// # Errors
    ///
    /// Fails when `poll` does, when a VM or process of the lab fails, on a signal, and after `deadline` with a message
    /// that begins with `what`, such as "the socket was not made".
    pub fn wait<T>(
        &self,
        what: &str,
        deadline: Instant,
        mut poll: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let polled = self.watch.wait(deadline, |limit| {
            let value = poll()?;
            if value.is_none() {
                // The caller chose to poll: there is nothing to wait for.
                std::thread::sleep(POLL_PERIOD.min(limit));
            }
            Ok(value)
        });
        match polled? {
            Some(value) => Ok(value),
            None => bail!("{what} in time"),
        }
    }

    /// Fails if a VM or process of the lab has failed or a signal asks this program to stop.
    ///
    /// # Errors
    ///
    /// The message tells what has failed.
    pub fn check(&self) -> Result<()> {
        self.watch.check()
    }

    /// Chooses whether waits go on when VMs and processes that they do not wait for fail: so a person can look at what
    /// is left. Signals still end every wait.
    pub fn set_tolerant(&self, tolerant: bool) {
        self.watch.set_tolerant(tolerant);
    }

    /// How long one VM without devices takes from its launch to the first line of its init.
    ///
    /// # Errors
    ///
    /// Fails if the VM does, or takes too long.
    pub fn bare_boot(&self, boot: Boot<'_>) -> Result<Duration> {
        let vm = self.vm_with(&Config::new(BARE, BARE_MEMORY_MIB), boot)?;
        vm.wait_for(&Regex::new(&regex::escape(READY_LINE))?, self.deadline(START_LIMIT))?;
        Ok(vm.launched().elapsed())
    }

    /// The set-up's plain kernel and base image.
    ///
    /// # Errors
    ///
    /// Fails if the set-up has no plain kernel.
    pub fn plain(&self) -> Result<Boot<'a>> {
        let kernel = &self.setup.kernel(&KernelId::default())?.vmlinux;
        Ok(Boot { kernel, initramfs: &self.setup.base.path })
    }

    /// Proves that the run has left no process, socket or link behind. Drop all VMs and processes before.
    ///
    /// # Errors
    ///
    /// The message lists what is left.
    pub fn check_leftovers(&self) -> Result<String> {
        leftover::check(&self.run.id(), &lock(&self.transient))
    }

    /// The command that starts a VM; its words are written to the run directory.
    fn command(&self, config: &Config, boot: Boot<'_>, serial: Serial<'_>) -> Result<Command> {
        let initramfs = boot.initramfs;
        let size =
            initramfs.metadata().with_context(|| format!("cannot read {}", initramfs.display()))?.len();
        memory::ensure_files_fit(&config.name, config.memory_mib, size)?;
        let vmm = self.setup.vmm(config.vmm.as_deref())?;
        let arguments = vmm.arguments(config, self.setup.accelerator.kind, boot, serial)?;
        self.note(&config.name, vmm.argv_prefix().iter().chain(&arguments))?;
        let mut command = vmm.command();
        command.args(arguments).env(RUN_VARIABLE, self.run.id());
        Ok(command)
    }

    fn note(&self, name: &str, words: impl IntoIterator<Item = impl AsRef<str>>) -> Result<()> {
        self.run.write(&format!("{name}.cmd"), command_line(words) + "\n")
    }
}

impl Drop for Lab<'_> {
    /// Removes what a proxy that was killed has left.
    fn drop(&mut self) {
        for path in lock(&self.transient).iter() {
            // A proxy that ended by itself has removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}
