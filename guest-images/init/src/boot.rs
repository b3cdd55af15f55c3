//! Sets a fresh guest up, and ends it.

use std::fs;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount};
use rustix::process::{Pid, Signal, WaitOptions};
use rustix::system::RebootCommand;

/// File systems in mounting order: type, where, options.
const MOUNTS: [(&str, &str, &str); 7] = [
    ("devtmpfs", "/dev", "mode=0755"),
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("devpts", "/dev/pts", "mode=0620,ptmxmode=0666"),
    ("tmpfs", "/dev/shm", "mode=1777"),
    ("tmpfs", "/run", "mode=0755"),
    ("tmpfs", "/tmp", "mode=1777"),
];

/// Time for ending processes and writing back.
const PATIENCE: Duration = Duration::from_secs(5);

/// Options of PID 1 on the kernel command line. The kernel ignores `vvu.` parameters.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// `vvu.shell`: a shell on the console.
    pub(crate) shell: bool,
    /// `vvu.hostname=NAME`: the guest's host name.
    pub(crate) hostname: Option<String>,
    /// `vvu.control=NAME`: the control port, a serial port below `/dev`.
    pub(crate) control: Option<String>,
}

impl Options {
    /// Reads the kernel command line.
    pub(crate) fn parse(command_line: &str) -> Self {
        let mut options = Self::default();
        for word in command_line.split_ascii_whitespace() {
            match word.split_once('=') {
                None if word == "vvu.shell" => options.shell = true,
                Some(("vvu.hostname", name)) => options.hostname = Some(name.to_owned()),
                Some(("vvu.control", name)) => options.control = Some(name.to_owned()),
                _ => {}
            }
        }
        options
    }
}

/// Mounts the kernel's file systems and reads what the command line asks for.
pub(crate) fn set_up() -> Result<Options> {
    for (kind, target, options) in MOUNTS {
        // An overlay may have brought the directory.
        fs::create_dir_all(target).with_context(|| format!("cannot create {target}"))?;
        let options = std::ffi::CString::new(options).context("mount options")?;
        match mount(kind, target, kind, MountFlags::empty(), Some(options.as_c_str())) {
            Ok(()) | Err(Errno::BUSY) => {}
            // The program that needs it reports the error better.
            Err(Errno::NODEV) => println!("vvu-init: the kernel has no {kind}, so {target} is empty"),
            Err(error) => return Err(error).with_context(|| format!("cannot mount {kind} on {target}")),
        }
    }
    let command_line = fs::read_to_string("/proc/cmdline").context("cannot read /proc/cmdline")?;
    vvu_init::modules::load_all(&command_line)?;
    let options = Options::parse(&command_line);
    let hostname = options.hostname.as_deref().unwrap_or("vvu");
    rustix::system::sethostname(hostname.as_bytes()).context("cannot set the host name")?;
    Ok(options)
}

/// The terminal behind /dev/console: one that can be a controlling terminal, which /dev/console itself cannot.
pub(crate) fn console_terminal() -> Option<String> {
    let active = fs::read_to_string("/sys/class/tty/console/active").ok()?;
    // The last one listed is the one /dev/console stands for.
    let name = active.split_ascii_whitespace().next_back()?;
    let path = format!("/dev/{name}");
    Path::new(&path).exists().then_some(path)
}

/// The way in which the guest ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The machine is turned off.
    PowerOff,
    /// The machine starts again, unless its VMM takes that for its end.
    Reboot,
}

/// Ends every process, writes everything back and ends the guest. Returns only if the kernel refuses.
pub(crate) fn end(ending: Ending) -> anyhow::Error {
    // As kill(2) has it, "process group 1" is -1: every process but this one. There may be none.
    let _ = rustix::process::kill_process_group(Pid::INIT, Signal::KILL);
    // Any of this hangs if a device behind it is gone, which must not keep the machine up.
    within(PATIENCE, || {
        while rustix::process::wait(WaitOptions::empty()).is_ok() {}
        rustix::fs::sync();
        unmount_all();
    });
    let command = match ending {
        Ending::PowerOff => RebootCommand::PowerOff,
        Ending::Reboot => RebootCommand::Restart,
    };
    match rustix::system::reboot(command) {
        Ok(()) => anyhow::anyhow!("the kernel came back from {ending:?}"),
        Err(error) => anyhow::Error::from(error).context(format!("{ending:?} is not possible")),
    }
}

/// Unmounts what a scenario may have mounted, the latest first, so that its file systems are clean.
fn unmount_all() {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let targets = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    for target in targets.collect::<Vec<_>>().into_iter().rev() {
        // A busy file system, such as /, stays mounted; it has been written back.
        let _ = rustix::mount::unmount(target, UnmountFlags::empty());
    }
}

/// Does something that may hang, and gives it up after `patience`.
pub(crate) fn within<T: Send + 'static>(patience: Duration, work: impl FnOnce() -> T + Send + 'static) {
    let (done, finished) = mpsc::channel();
    thread::spawn(move || done.send(work()));
    // The machine goes away in either case.
    let _ = finished.recv_timeout(patience);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_come_from_whole_words() {
        let options =
            Options::parse("console=ttyS0 quiet vvu.shell vvu.hostname=device vvu.control=ttyS1 panic=-1\n");
        let (hostname, control) = (Some("device".into()), Some("ttyS1".into()));
        assert_eq!(options, Options { shell: true, hostname, control });
        assert_eq!(Options::parse("vvu.shellfish novvu.shell vvu.shell=0"), Options::default());
    }
}
