//! The process between a device VM and a sibling VM: `vvu proxy`.

use std::path::{Path, PathBuf};

use crate::rundir::SocketDir;
use crate::vm::addr::Slot;
use crate::vm::config::Device;
use crate::vm::frontend::Frontend;

/// MiB that a sibling memory file for a window has before the sibling's RAM.
const WINDOW_HEADER_MIB: u64 = 2;
/// MiB that a sibling memory file has behind the RAM.
const TAIL_MIB: u64 = 32;

/// A proxy to start.
#[derive(Debug, Clone)]
pub struct ProxyConfig {
    /// Name of the vvu device; the run directory's files of the proxy bear it.
    pub name: String,
    /// Where the vvu device is in the device VM.
    pub slot: Slot,
    /// The socket for the device VM.
    pub vfio_user: PathBuf,
    /// The socket for the front-end.
    pub vhost_user: PathBuf,
    /// The express device in the device VM, if there is one.
    pub express: Option<Express>,
    /// The link to the sibling memory file.
    pub memory_link: PathBuf,
    /// The sibling's RAM in MiB if this proxy makes the memory file; `None` to use the file of another proxy.
    pub memory_mib: Option<u64>,
    /// Makes the memory file of huge pages.
    pub huge_pages: bool,
    /// Whether the memory file is made for a window.
    pub window: bool,
    /// File to which the proxy writes every message.
    pub trace: Option<PathBuf>,
    /// vhost queues of the device.
    pub queues: u32,
    /// Runs the device in a worker that may be killed.
    pub supervised: bool,
}

/// The express device of a vvu device.
#[derive(Debug, Clone)]
pub struct Express {
    /// Where it is in the device VM.
    pub slot: Slot,
    /// The proxy's socket for it.
    pub socket: PathBuf,
}

impl ProxyConfig {
    /// A proxy for a sibling with `memory_mib` of RAM, with one queue, whose sockets are in `sockets`.
    #[must_use]
    pub fn new(name: &str, memory_mib: u64, sockets: &SocketDir) -> Self {
        Self {
            name: name.to_owned(),
            slot: Slot::DEFAULT,
            vfio_user: sockets.socket(&format!("{name}.vfio")),
            vhost_user: sockets.socket(&format!("{name}.vhost")),
            express: Some(Express { slot: Slot::LAST, socket: sockets.socket(&format!("{name}.express")) }),
            memory_link: sockets.socket(&format!("{name}.mem")),
            memory_mib: Some(memory_mib),
            huge_pages: false,
            window: false,
            trace: None,
            queues: 1,
            supervised: false,
        }
    }

    /// The vvu device and its express device, for the device VM.
    #[must_use]
    pub fn devices(&self) -> Vec<Device> {
        let vvu = Device::Vvu { slot: self.slot, socket: text(&self.vfio_user) };
        let express = self.express.as_ref();
        let express =
            express.map(|Express { slot, socket }| Device::Express { slot: *slot, socket: text(socket) });
        [vvu].into_iter().chain(express).collect()
    }

    /// A device at the default address whose back-end the proxy reaches, for the sibling VM.
    #[must_use]
    pub fn vhost_user_device(&self, frontend: Frontend) -> Device {
        let socket = text(&self.vhost_user);
        Device::VhostUser { slot: Slot::DEFAULT, socket, frontend, reconnect_ms: 0 }
    }

    /// The memory of the sibling, which has `memory_mib` of RAM, for the device VM.
    #[must_use]
    pub fn window_device(&self, slot: Slot, memory_mib: u64) -> Device {
        let size_mib = WINDOW_HEADER_MIB + memory_mib + TAIL_MIB;
        Device::Window { slot, file: text(&self.memory_link), size_mib }
    }

    /// Where the sibling's RAM begins in the sibling memory file, in MiB.
    #[must_use]
    pub fn memory_offset_mib(&self) -> u64 {
        if self.window { WINDOW_HEADER_MIB } else { 0 }
    }

    /// The sibling memory file, for the sibling VM.
    #[must_use]
    pub fn memory_file(&self) -> String {
        text(&self.memory_link)
    }

    /// The words that start it; `vvu` is the program.
    #[must_use]
    pub fn words(&self, vvu: &Path) -> Vec<String> {
        let mut words = vec![text(vvu), "proxy".to_owned()];
        let mut option = |name: &str, value: String| words.extend([name.to_owned(), value]);
        option("--vfio-user", text(&self.vfio_user));
        option("--vhost-user", text(&self.vhost_user));
        if let Some(express) = &self.express {
            option("--express", text(&express.socket));
        }
        match self.memory_mib {
            Some(mib) => {
                option("--memory-size", format!("{mib}M"));
                option("--memory-link", text(&self.memory_link));
            }
            None => option("--memory", text(&self.memory_link)),
        }
        option("--queues", self.queues.to_string());
        if let Some(trace) = &self.trace {
            option("--trace", text(trace));
        }
        if self.supervised {
            words.push("--supervised".to_owned());
        }
        if self.huge_pages && self.memory_mib.is_some() {
            words.push("--huge-pages".to_owned());
        }
        if self.window && self.memory_mib.is_some() {
            words.push("--window".to_owned());
        }
        words
    }

    /// The sockets and links that the proxy makes and that are gone when it has ended.
    #[must_use]
    pub fn transient(&self) -> Vec<PathBuf> {
        let link = self.memory_mib.is_some().then_some(&self.memory_link);
        let express = self.express.as_ref().map(|express| &express.socket);
        [&self.vfio_user, &self.vhost_user].into_iter().chain(express).chain(link).cloned().collect()
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
