//! The process that removes the names of a proxy from the file system.
//!
//! Sandboxes know directories, not names: a proxy that may remove its own names may remove any file below
//! their directories. So a proxy in its sandbox may remove nothing. It starts this process before, and
//! orders it to remove exactly these names when the proxy ends.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::Context;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vvu::event::wait_readable;

/// Time that the process has to remove the names.
const PATIENCE: Duration = Duration::from_secs(5);

/// Options of `vvu remove-names`, which only `vvu proxy` runs.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Names to remove.
    #[arg(required = true)]
    names: Vec<PathBuf>,
}

/// Waits for one byte on standard input, then removes the names. If standard input ends without a byte, the
/// proxy was killed, and the names stay: another proxy may be replacing them at that moment.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    // A signal to the process group is meant for the proxy, which then gives the order.
    let received = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&received)).context("cannot catch signals")?;
    }
    let names: Vec<_> = args.names.iter().map(|name| (name, identity(name))).collect();
    io::stdout().write_all(b".").and_then(|()| io::stdout().flush()).context("the proxy has ended")?;
    if io::stdin().read_exact(&mut [0]).is_err() {
        return Ok(());
    }
    for (name, at_start) in names {
        let Some(at_start) = at_start else { continue };
        if identity(name) == Some(at_start)
            && let Err(error) = fs::remove_file(name)
        {
            log::warn!("cannot remove {}: {error}", name.display());
        }
    }
    Ok(())
}

/// Device and inode of a name: what replaces it has another.
fn identity(name: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(name).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// The proxy's handle of the process.
#[derive(Debug)]
pub(crate) struct NameRemover(Child);

impl NameRemover {
    /// Starts the process, which notes what `names` are.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub(crate) fn start(names: &[&Path]) -> anyhow::Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .args(["remove-names", "--"])
            .args(names)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.as_mut().context("no pipe from the process")?;
        stdout.read_exact(&mut [0]).context("the process ended at once")?;
        Ok(Self(child))
    }

    /// Orders the process to remove the names, and waits for it to end.
    pub(crate) fn remove(mut self) {
        let ordered = self.0.stdin.take().is_some_and(|mut stdin| stdin.write_all(b".").is_ok());
        // The process sends nothing more, so what becomes readable is the end.
        let ended = self.0.stdout.take().is_some_and(|stdout| {
            wait_readable(&[stdout.as_fd()], Some(Instant::now() + PATIENCE)).is_ok_and(|end| end.is_some())
        });
        if !(ordered && ended) {
            log::warn!(
                "the names of this proxy are left in the file system: the process to remove them is gone"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_replaces_a_name_has_another_identity() {
        let directory = tempfile::tempdir().expect("directory");
        let name = directory.path().join("name");
        assert_eq!(identity(&name), None);
        fs::write(&name, "").expect("file");
        let before = identity(&name);
        let other = directory.path().join("other");
        fs::write(&other, "").expect("file");
        fs::rename(&other, &name).expect("rename");
        assert!(before.is_some() && identity(&name) != before);
    }
}
