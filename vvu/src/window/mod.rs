//! The window: the sibling's memory as persistent memory of the device VM, in place of the shared memory BAR.
//!
//! A program in the device VM maps a BAR as device memory: uncached where the processor honours that, and without the
//! kernel's `struct page`, so that direct I/O from or to it fails. The same memory as persistent memory has neither
//! limit. A file on it is what back-ends get.
//!
//! The device VM itself makes the file: it writes a file system's metadata into the header in front of the sibling's RAM,
//! mounts it with DAX, and keeps the mount to itself. Nothing is left when the last process that has the file ends. The
//! devices of one sibling share the memory, and so the mount.

mod ext4;
mod find;
mod mount;

use std::path::PathBuf;

use crate::driver::{Driver, WindowSizes};
use crate::pci::{DeviceError, PciDevice};

pub use ext4::GeometryError;
pub use find::FindError;
pub use mount::MountError;

/// A vvu device does without a window.
#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    /// The device offers none.
    #[error("it has no window; start the proxy with --window to have one")]
    NotOffered,
    /// The device's memory cannot be a window.
    #[error("its window has {0}")]
    Geometry(#[from] GeometryError),
    /// The persistent memory cannot be found.
    #[error(transparent)]
    Find(#[from] FindError),
    /// The file system cannot be made.
    #[error("its window on {memory}: {source}")]
    Mount {
        /// Name of the persistent memory.
        memory: String,
        /// The cause.
        source: MountError,
    },
    /// The registers of the vvu device cannot be read.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A window that is in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Name of the persistent memory, such as `pmem0`.
    pub memory: String,
    /// Whether the kernel believes NVDIMM info blocks, with which a sibling's VMM can take it over.
    pub believes_info_blocks: bool,
}

/// Where the machine's devices are.
#[derive(Debug)]
struct Machine {
    sys: PathBuf,
    dev: PathBuf,
    /// Flags to open memory with so that reads go past the kernel's cache.
    open_flags: i32,
}

impl Default for Machine {
    fn default() -> Self {
        Self { sys: "/sys".into(), dev: "/dev".into(), open_flags: libc::O_DIRECT }
    }
}

/// Makes `driver` use its window.
///
/// # Errors
/// [`WindowError`]; the driver then goes on with the shared memory BAR.
pub fn attach<D: PciDevice>(driver: &mut Driver<D>) -> Result<Window, WindowError> {
    let machine = Machine::default();
    let Some(sizes @ WindowSizes { header, size }) = driver.window_sizes()? else {
        return Err(WindowError::NotOffered);
    };
    if header == 0 {
        find::refuse_unguarded(&machine, size)?;
        return Err(WindowError::NotOffered);
    }
    let geometry = ext4::Geometry::new(header, size)?;
    let found = find::find(&machine, driver, sizes)?;
    let failed = |source| WindowError::Mount { memory: found.name.clone(), source };
    let file = mount::open(&found.path, &geometry).map_err(failed)?;
    driver.use_window(found.name.clone(), file, size);
    Ok(Window { memory: found.name.clone(), believes_info_blocks: find::believes_info_blocks(&machine) })
}
