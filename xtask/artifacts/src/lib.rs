//! Obtains what test VMs are made of: QEMU, guest kernels, images and other people's programs.
//!
//! Everything lies in a [`cache`] that is keyed by content and shared by concurrent runs.

pub mod accel;
mod apt;
pub mod cache;
pub mod image;
pub mod kernel;
pub mod machine;
pub mod packages;
pub mod qemu;
pub mod versions;

use std::path::Path;

/// The root directory of the workspace.
#[must_use]
pub fn workspace() -> &'static Path {
    let artifacts = Path::new(env!("CARGO_MANIFEST_DIR"));
    artifacts.ancestors().nth(2).unwrap_or(artifacts)
}
