//! Obtains what test VMs are made of: QEMU, guest kernels, images and other people's programs.
//!
//! Everything lies in a [`cache`] that is keyed by content and shared by concurrent runs.

pub mod accel;
mod apt;
pub mod cache;
mod cargo;
pub mod image;
pub mod kernel;
pub mod machine;
pub mod packages;
pub mod qemu;
pub mod versions;

pub use cargo::{target_directory, workspace};
