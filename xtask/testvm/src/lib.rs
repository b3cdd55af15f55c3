//! Runs VMs and vvu proxies for tests.
//!
//! A [`Setup`] holds the programs and images, and a [`Lab`] starts VMs and proxies from it. Every wait in a lab has a
//! deadline and ends early, with the reason, when anything in the lab fails.
//!
//! This serves a disk from a device VM to a sibling VM:
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use regex::Regex;
//! use vvu_process::progress::Progress;
//! use vvu_testvm::{Device, Frontend, Iommu, Lab, Needs, ProxyConfig, RunDir, Setup, SetupOptions, VmConfig, runs};
//!
//! # fn main() -> anyhow::Result<()> {
//! // QEMU, kernel and images come from the cache or are made; the logs go to the run directory.
//! let setup = Setup::obtain(&SetupOptions::default(), &Needs::default(), &Progress::new(true))?;
//! let run = RunDir::create(&runs(), "example")?;
//! let lab = Lab::new(&run, &setup)?;
//!
//! let vvu = ProxyConfig::new("vvu", 256, lab.sockets());
//! let proxy = lab.proxy(&vvu)?;
//! let device = lab.vm(&VmConfig {
//!     iommu: Some(Iommu::Virtio),
//!     devices: vvu.devices(),
//!     ..VmConfig::new("device", 512)
//! })?;
//! device.run("vvu bind 0000:00:10.0 && truncate -s 64M /disk.img")?;
//! let serve = "vvu device block --vfio 0000:00:10.0 --file /disk.img";
//! device.spawn("back-end", serve, 0, lab.deadline(Duration::from_secs(10)))?;
//!
//! let sibling = lab.vm(&VmConfig {
//!     memory_file: Some(vvu.memory_file()),
//!     devices: vec![vvu.vhost_user_device(Frontend::default())],
//!     ..VmConfig::new("sibling", 256)
//! })?;
//! sibling.wait_for(&Regex::new(r"\[vda\] \d+ 512-byte")?, lab.deadline(Duration::from_secs(30)))?;
//! println!("{}", sibling.run("sha256sum /dev/vda")?);
//! drop((device, sibling));
//! proxy.stop()?;
//! lab.check_leftovers()?;
//! # Ok(())
//! # }
//! ```

mod attack;
pub mod clean;
mod console;
mod control;
pub mod facts;
mod lab;
mod leftover;
pub mod memory;
mod obtain;
pub mod outer;
mod prepared;
mod process;
mod proxy;
mod qmp;
mod rundir;
mod setup;
mod spawned;
mod transcript;
mod vm;
mod vmm;
mod watch;

pub use attack::Attack;
pub use console::Found;
pub use lab::{Attached, Lab};
pub use obtain::SetupOptions;
pub use process::{Process, Ready, WorkerSignal};
pub use proxy::{Express, ProxyConfig};
pub use qmp::{Exchange, Reply};
pub use rundir::{MAX_SOCKET_PATH, RunDir, SocketDir, runs};
pub use setup::{KernelId, Needs, Setup};
pub use spawned::ending;
pub use vm::addr::{Addr, Slot};
pub use vm::config::{Boot, Config as VmConfig, Device, Serial};
pub use vm::cpu::{Cpu, CpuLevel};
pub use vm::frontend::{
    BlockFrontend, Features, Frontend, FsFrontend, MAX_QUEUES, NetFrontend, PlainFrontend,
};
pub use vm::iommu::Iommu;
pub use vm::{Vm, printed};
pub use vmm::{Capabilities, Vmm};
