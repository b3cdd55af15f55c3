//! Obtains what test VMs are made of: QEMU, guest kernels, images and other projects' programs.
//!
//! Everything is stored in a [`cache`] that is keyed by content and that concurrent runs share:
//!
//! - [`qemu::Qemu`] is the QEMU that the user names, the system's, or Debian's, unpacked without root.
//! - [`kernel::Kernel`] is built from a distribution's source, or a checked file of the user's.
//! - [`image`] has the initramfs, our programs in it, and [`image::GuestPrograms`] of other projects.
//! - [`versions::Versions`] lists the VMMs and kernel sources that a scenario can name.
//!
//! A [`machine::Machine`] says what depends on the guests' architecture. [`accel::choose`] proves KVM before it is used.
//! [`packages::ensure`] installs what the host lacks.

pub mod accel;
mod apt;
pub mod cache;
mod cargo;
pub mod host_system;
pub mod image;
pub mod kernel;
pub mod machine;
pub mod packages;
pub mod qemu;
pub mod versions;

pub use cargo::{target_directory, workspace};
