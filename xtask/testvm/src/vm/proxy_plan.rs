//! The command line of a proxy.

use std::path::{Path, PathBuf};

use super::Slot;

/// A proxy to start.
#[derive(Debug)]
pub struct ProxyPlan {
    /// Where its PCI device is in the device VM.
    pub slot: Slot,
    /// The socket for the device VM.
    pub vfio_user: PathBuf,
    /// The socket for the front-end.
    pub vhost_user: PathBuf,
    /// The link to the sibling memory file.
    pub memory_link: PathBuf,
    /// The sibling's RAM in MiB if this proxy makes the memory file, rather than use that of an earlier one.
    pub memory_mib: Option<u64>,
    /// Whether the memory file is made of huge pages.
    pub huge_pages: bool,
    /// Where every message is written down.
    pub trace: Option<PathBuf>,
    /// vhost queues of the device.
    pub queues: u32,
}

impl ProxyPlan {
    /// The words that start it, `vvu` being the program.
    pub fn words(&self, vvu: &Path) -> Vec<String> {
        let mut words = vec![text(vvu), "proxy".to_owned()];
        let mut option = |name: &str, value: String| words.extend([name.to_owned(), value]);
        option("--vfio-user", text(&self.vfio_user));
        option("--vhost-user", text(&self.vhost_user));
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
        if self.huge_pages && self.memory_mib.is_some() {
            words.push("--huge-pages".to_owned());
        }
        words
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
