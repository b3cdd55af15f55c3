//! `vvu device`: back-ends, behind a vvu device or on a plain vhost-user socket.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use vvu::backend::Stop;
use vvu::backend::block::{self, Block};
use vvu::event::wait_readable;
use vvu::listening_socket::ListeningSocket;
use vvu::{Bdf, ServeError, StopToken, open_vfio, serve_socket};

use crate::stop;

mod bridge;
mod program;

/// Most microseconds to look for a request; a waiting driver is told within that time that its queue has stopped.
const POLL_US_MAX: i64 = 10_000;

/// Options of `vvu device`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    device: Device,
}

#[derive(Debug, clap::Subcommand)]
enum Device {
    /// Serve a disk.
    Block(BlockArgs),
    /// Connect a vvu device to any vhost-user back-end.
    Bridge(bridge::Args),
}

/// Where a back-end is reached.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Place {
    /// Serve through the vvu device with this PCI address.
    #[arg(long, value_name = "BDF")]
    vfio: Option<Bdf>,
    /// Serve on a vhost-user socket of this machine.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct BlockArgs {
    #[command(flatten)]
    place: Place,
    /// Disk image or block device.
    #[arg(long, value_name = "PATH")]
    file: PathBuf,
    /// Refuse writes.
    #[arg(long)]
    read_only: bool,
    /// Queues, each with a thread of its own.
    #[arg(long, value_name = "N", default_value_t = 1)]
    queues: u16,
    /// Serial number; by default the file name.
    #[arg(long, value_name = "TEXT")]
    serial: Option<String>,
    /// Look for the next request for so many microseconds before asking for a notification; 0: never.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(..=POLL_US_MAX))]
    poll_us: u32,
}

/// Serves until a signal asks for the end.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let stop = stop::on_signal().context("cannot catch signals")?;
    match &args.device {
        Device::Block(args) => run_block(args, &stop),
        Device::Bridge(args) => bridge::run(args, &stop),
    }
}

fn run_block(args: &BlockArgs, stop: &StopToken) -> anyhow::Result<()> {
    let disk = Block::open(&block::Options {
        path: args.file.clone(),
        read_only: args.read_only,
        queues: args.queues,
        serial: args.serial.clone(),
        poll: Duration::from_micros(args.poll_us.into()),
    })?;
    let ready = |place: &dyn std::fmt::Display| {
        format!("block back-end ready on {place}, {}, {}", args.file.display(), Size(disk.size()))
    };
    let serve = |listener: &UnixListener, stop: &Stop| Ok(disk.serve(listener, stop)?);
    match (&args.place.vfio, &args.place.socket) {
        (Some(bdf), _) => behind_bridge(*bdf, stop, &ready(bdf), serve),
        (_, Some(path)) => on_socket(path, stop, &ready(&path.display()), serve),
        (None, None) => anyhow::bail!("name a place: --vfio BDF or --socket PATH"),
    }
}

/// Lets the vvu device `bdf` use a back-end of this process.
fn behind_bridge(
    bdf: Bdf,
    stop: &StopToken,
    ready: &str,
    serve: impl Fn(&UnixListener, &Stop) -> anyhow::Result<()> + Sync + Send,
) -> anyhow::Result<()> {
    let end = Stop::new().context("cannot make an event")?;
    let backend = |socket: &Path| {
        thread::scope(|scope| {
            scope.spawn(|| {
                // An error ends the wait as well, and then the back-end ends early.
                let _ = wait_readable(&[stop.as_fd()], None);
                end.stop();
            });
            serve(ListeningSocket::bind(socket)?.listener(), &end)
        })
    };
    let mut said = Ok(());
    match serve_socket(open_vfio(bdf)?, stop, || said = say(ready), backend) {
        Ok(()) => said,
        Err(ServeError::Backend(error)) => Err(error),
        Err(error) => Err(error.into()),
    }
}

/// Runs a back-end on the socket at `path`.
fn on_socket(
    path: &Path,
    stop: &StopToken,
    ready: &str,
    serve: impl Fn(&UnixListener, &Stop) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<()> {
    let listener = ListeningSocket::bind(path)?;
    let end = Stop::new().context("cannot make an event")?;
    let (ended, alive) = UnixStream::pair().context("cannot make a socket pair")?;
    thread::scope(|scope| {
        let backend = scope.spawn(|| {
            let _alive = alive;
            serve(listener.listener(), &end)
        });
        let waited = say(ready).and_then(|()| wait_for_one(stop, &ended));
        end.stop();
        joined(backend.join())?;
        waited
    })
}

/// The line that whoever started us waits for.
fn say(ready: &str) -> anyhow::Result<()> {
    writeln!(io::stdout(), "vvu: {ready}").context("cannot write to standard output")
}

/// Waits until one of the two is readable or closed at its other end.
fn wait_for_one(stop: &StopToken, ended: &UnixStream) -> anyhow::Result<()> {
    wait_readable(&[stop.as_fd(), ended.as_fd()], None).map(drop).context("cannot wait")
}

fn joined(outcome: thread::Result<anyhow::Result<()>>) -> anyhow::Result<()> {
    outcome.unwrap_or_else(|_| Err(anyhow::anyhow!("the back-end failed: this is a bug of vvu")))
}

/// A number of bytes in the largest unit of which it is a multiple.
struct Size(u64);

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
        match units.into_iter().find(|(_, shift)| self.0 > 0 && self.0.is_multiple_of(1 << shift)) {
            Some((unit, shift)) => write!(f, "{} {unit}", self.0 >> shift),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact() {
        let text = [64 << 20, 1 << 30, 1536, 3 << 9, 512, 0].map(|bytes| Size(bytes).to_string());
        assert_eq!(text, ["64 MiB", "1 GiB", "1536 bytes", "1536 bytes", "512 bytes", "0 bytes"]);
        assert_eq!(Size(3072).to_string(), "3 KiB");
    }

    #[test]
    fn a_plain_socket_is_served_until_the_back_end_ends() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("s");
        let stop = StopToken::new().expect("token");
        let ended = on_socket(&path, &stop, "ready", |_, _| anyhow::bail!("out of order"));
        assert_eq!(ended.expect_err("error").to_string(), "out of order");
        assert!(!path.exists());
    }

    #[test]
    fn a_plain_socket_is_served_until_the_signal() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("s");
        let stop = StopToken::new().expect("token");
        stop.stop();
        let wait = |_: &UnixListener, stop: &Stop| {
            while !stop.is_requested() {
                thread::yield_now();
            }
            Ok(())
        };
        on_socket(&path, &stop, "ready", wait).expect("clean end");
        assert!(!path.exists());
    }
}
