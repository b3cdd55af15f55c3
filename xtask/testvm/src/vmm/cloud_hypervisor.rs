//! Cloud Hypervisor as the VMM of a sibling VM, by its documented options (docs/memory.md,
//! docs/generic-vhost-user.md and `--help` of Cloud Hypervisor).
//!
//! Unproven: no VM of it has been run here, since it needs KVM. It listens at a path for whoever speaks to its only
//! two-way serial port, while the harness hands ports over as file descriptors; so it runs on a terminal only. It starts
//! its guest again whenever that reboots.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use vvu_artifacts::accel::Kind;
use vvu_artifacts::machine::Machine;

use super::cmdline::cmdline;
use super::interface::{Capabilities, Vmm, check_devices};
use super::words::Words;
use crate::qmp::Exchange;
use crate::vm::config::{Boot, Config, Device, Serial};
use crate::vm::frontend::Frontend;

const PROGRAM: &str = "cloud-hypervisor";
/// Descriptors of a queue, unless the scenario sets them: what Cloud Hypervisor has for most devices.
const QUEUE_SIZE: u16 = 256;

/// An installed Cloud Hypervisor.
#[derive(Debug)]
pub(super) struct CloudHypervisor {
    program: PathBuf,
    version: String,
    machine: &'static Machine,
}

impl CloudHypervisor {
    /// Finds it in `PATH`.
    ///
    /// # Errors
    ///
    /// It is not there, or does not tell its version.
    pub(super) fn locate() -> Result<Self> {
        let path = env::var_os("PATH").unwrap_or_default();
        let program = env::split_paths(&path).map(|dir| dir.join(PROGRAM)).find(|path| path.is_file());
        let program = program
            .with_context(|| format!("there is no {PROGRAM} in PATH: install one, or let QEMU run the VM"))?;
        Self::at(program)
    }

    fn at(program: PathBuf) -> Result<Self> {
        let output = Command::new(&program).arg("--version").stdin(Stdio::null()).output();
        let output = output.with_context(|| format!("cannot run {}", program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let Some(version) = text.trim().strip_prefix("cloud-hypervisor ") else {
            bail!("{} --version ({}) does not answer as Cloud Hypervisor", program.display(), output.status);
        };
        Ok(Self { version: version.to_owned(), program, machine: Machine::host()? })
    }
}

impl Vmm for CloudHypervisor {
    fn name(&self) -> &'static str {
        "Cloud Hypervisor"
    }

    fn program(&self) -> &Path {
        &self.program
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            accelerators: &[Kind::Kvm],
            // It has a vfio-user client, which nobody has tried with a vvu device.
            vvu_devices: false,
            inherited_ports: false,
            cpu_models: false,
            iommus: false,
            numa: false,
            hot_plug: false,
        }
    }

    fn failures(&self) -> &'static [&'static str] {
        &["panicked at", "seccomp violation", "VMM thread exited with error"]
    }

    fn command(&self) -> Command {
        Command::new(&self.program)
    }

    fn argv_prefix(&self) -> Vec<String> {
        vec![self.program.display().to_string()]
    }

    fn attach(&self, config: &Config, _index: usize) -> Result<Vec<Exchange>> {
        bail!("{}: {} is not asked to attach devices here", config.name, self.name())
    }

    fn detach(&self, config: &Config, _index: usize) -> Result<Vec<Exchange>> {
        bail!("{}: {} is not asked to detach devices here", config.name, self.name())
    }

    fn arguments(
        &self,
        config: &Config,
        accelerator: Kind,
        boot: Boot<'_>,
        serial: Serial<'_>,
    ) -> Result<Vec<String>> {
        self.capabilities().check(self.name(), config, accelerator, serial)?;
        check_devices(config, &[])?;
        let mut words = Words::default();
        words.pair("--kernel", boot.kernel.display().to_string());
        words.pair("--initramfs", boot.initramfs.display().to_string());
        words.pair("--cmdline", cmdline(self.machine, config, serial));
        words.pair("--cpus", format!("boot={}", config.cpus));
        ensure!(
            config.memory_offset_mib == 0,
            "{}: Cloud Hypervisor's RAM begins where its file does, so the file cannot be made for a window",
            config.name
        );
        match &config.memory_file {
            None => words.pair("--memory", format!("size={}M,shared=on", config.memory_mib)),
            Some(path) => words.pair("--memory", "size=0").pair(
                "--memory-zone",
                format!("id=mem0,size={}M,file={},shared=on", config.memory_mib, quoted(path)?),
            ),
        };
        // The serial port is a 16550A or a PL011 like QEMU's. The virtio console, on by default, is not needed.
        words.pair("--serial", "tty").pair("--console", "off");
        for device in &config.devices {
            self::device(&mut words, device)?;
        }
        Ok(words.done())
    }
}

/// Adds a device.
fn device(words: &mut Words, device: &Device) -> Result<()> {
    let slot = format!("pci_device_id={}", device.slot().device());
    match device {
        Device::Vvu { .. } | Device::Express { .. } | Device::Window { .. } => {
            bail!("Cloud Hypervisor cannot host a vvu device")
        }
        Device::VirtioBlk { file, .. } => {
            words.pair("--disk", format!("path={},image_type=raw,{slot}", quoted(file)?));
        }
        // Cloud Hypervisor makes a lost connection again by itself, in its own rhythm.
        Device::VhostUser { socket, frontend, reconnect_ms: _, .. } => {
            let features = frontend.features();
            ensure!(
                features == Default::default() && frontend.vmm_properties().is_empty(),
                "Cloud Hypervisor has no options for `features` and `vmm_properties` of a front-end"
            );
            let socket = format!("socket={}", quoted(socket)?);
            let size = frontend.queue_size().unwrap_or(QUEUE_SIZE);
            let (option, device) = match frontend {
                Frontend::Block(block) => {
                    let queues = format!("num_queues={},queue_size={size}", block.queues);
                    ("--disk", format!("vhost_user=on,{socket},{queues}"))
                }
                Frontend::Net(net) => {
                    let queues = format!("num_queues={},queue_size={size}", 2 * net.queue_pairs);
                    ("--net", format!("vhost_user=on,vhost_mode=client,{socket},{queues}"))
                }
                Frontend::Fs(fs) => {
                    let queues = format!("num_queues={},queue_size={size}", fs.request_queues);
                    ("--fs", format!("tag={},{socket},{queues}", quoted(&fs.tag)?))
                }
                Frontend::Rng(_) => ("--generic-vhost-user", generic("rng", frontend, &socket, size)),
                Frontend::Vsock(_) => ("--generic-vhost-user", generic("vsock", frontend, &socket, size)),
                Frontend::Console(_) => ("--generic-vhost-user", generic("console", frontend, &socket, size)),
            };
            words.pair(option, format!("{device},{slot}"));
        }
    }
    Ok(())
}

/// The value of `--generic-vhost-user` for a device of this virtio type.
fn generic(kind: &str, frontend: &Frontend, socket: &str, size: u16) -> String {
    let sizes = vec![size.to_string(); frontend.virtqueues().into()].join(",");
    format!("device_type={kind},{socket},queue_sizes=[{sizes}]")
}

/// `text` as a value in a `key=value,...` list, where quotation marks enclose commas and brackets.
fn quoted(text: &str) -> Result<String> {
    ensure!(!text.contains('"'), "{text}: Cloud Hypervisor's options take no quotation mark");
    let plain = !text.contains([',', '[', ']', ' ']);
    Ok(if plain { text.to_owned() } else { format!("\"{text}\"") })
}

#[cfg(test)]
#[path = "cloud_hypervisor_test.rs"]
mod tests;
