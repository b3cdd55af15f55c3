//! `vvu device`: back-ends, behind a vvu device or on a plain vhost-user socket.

use std::convert::Infallible;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use vvu::backend::block::{BlockBackend, BlockOptions, EngineKind, QUEUES_MAX, SEGMENTS_DEFAULT};
use vvu::{Bdf, StopToken, WindowUse, open_vfio_with, serve};

use crate::{service, stop};
use place::{Place, PlaceArgs, Socket};

mod bridge;
mod capabilities;
mod memory;
mod place;
mod program;

/// Longest poll window in microseconds. A front-end that stops a queue waits for the end of the window at most.
const POLL_US_MAX: i64 = 10_000;

/// Arguments of `vvu device`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    device: Device,
}

#[derive(Debug, clap::Subcommand)]
enum Device {
    /// Serve a disk
    Block(BlockArgs),
    /// Connect a vvu device to any vhost-user back-end
    Bridge(bridge::Args),
    /// Measure how fast this VM reads and writes the sibling's memory, by the BAR and in the window
    Memory(memory::Args),
}

/// How requests are carried out.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Engine {
    Sync,
    IoUring,
    Auto,
}

impl Engine {
    fn kind(self) -> Option<EngineKind> {
        match self {
            Self::Sync => Some(EngineKind::Sync),
            Self::IoUring => Some(EngineKind::IoUring),
            Self::Auto => None,
        }
    }
}

/// How the back-end gets at the sibling's memory.
#[derive(Debug, clap::Args)]
struct Memory {
    /// Use the sibling's memory as persistent memory of this VM, which is cached and takes direct I/O, in place of the vvu
    /// device's BAR
    #[arg(long, value_enum, default_value_t = Window::Auto, help_heading = "Memory")]
    window: Window,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Window {
    /// If the proxy offers it (--window) and this VM has the memory
    Auto,
    /// Never
    Off,
    /// Always; end with an error where it cannot be had
    Required,
}

impl Memory {
    fn window(&self) -> WindowUse {
        match self.window {
            Window::Auto => WindowUse::Auto,
            Window::Off => WindowUse::Off,
            Window::Required => WindowUse::Required,
        }
    }
}

#[derive(Debug, clap::Args)]
struct BlockArgs {
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    memory: Memory,
    /// Print what the back-end can do as JSON, for management programs, and end
    #[arg(long, exclusive = true)]
    print_capabilities: bool,
    /// Disk image or block device to serve
    #[arg(long, visible_alias = "blk-file", value_name = "PATH", help_heading = "Disk")]
    #[arg(required_unless_present = "print_capabilities")]
    file: Option<PathBuf>,
    /// Refuse writes; several back-ends may serve one disk then
    #[arg(long, help_heading = "Disk")]
    read_only: bool,
    /// Read and write the disk without the page cache of this machine (O_DIRECT)
    #[arg(long, help_heading = "Disk")]
    direct: bool,
    /// Serial number of up to 20 characters; by default the file name
    #[arg(long, value_name = "TEXT", help_heading = "Disk")]
    serial: Option<String>,
    /// How requests are carried out: one of a queue at a time, many at a time through an io_uring, or the latter with
    /// --direct where the kernel has it
    #[arg(long, value_name = "ENGINE", default_value = "auto", help_heading = "Performance")]
    engine: Engine,
    /// Most queues that the sibling may use; each that it uses has a thread of its own
    #[arg(long, value_name = "N", default_value_t = QUEUES_MAX, help_heading = "Performance")]
    queues: u16,
    /// Most pieces of memory in a request; no more than the sibling's queue-size less 2 if it has indirect_desc=off
    #[arg(long, value_name = "N", default_value_t = SEGMENTS_DEFAULT, help_heading = "Performance")]
    seg_max: u16,
    /// Offer VIRTIO_F_ACCESS_PLATFORM, for a sibling with iommu_platform=on that has no IOMMU of its own
    #[arg(long, help_heading = "Features")]
    access_platform: bool,
    /// Watch an empty queue for so many microseconds at most before asking for a notification; 0 turns it off
    #[arg(
        long,
        value_name = "N",
        default_value_t = 2000,
        value_parser = clap::value_parser!(u32).range(..=POLL_US_MAX),
        help_heading = "Performance"
    )]
    poll_us: u32,
}

/// Runs a back-end until `SIGINT` or `SIGTERM`.
///
/// # Errors
/// When the back-end cannot start, or ends by itself.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let stop = stop::on_signal().context("cannot catch signals")?;
    match &args.device {
        Device::Block(args) => run_block(args, &stop),
        Device::Bridge(args) => bridge::run(args, &stop),
        Device::Memory(args) => memory::run(args),
    }
}

fn run_block(args: &BlockArgs, stop: &StopToken) -> anyhow::Result<()> {
    if args.print_capabilities {
        return capabilities::print_block();
    }
    let file = args.file.as_ref().context("name a disk: --file PATH")?;
    // A write beyond the limit on the size of files (`ulimit -f`) fails with EFBIG then, rather than end the process.
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default())
        .context("cannot catch signals")?;
    let disk = BlockBackend::open(&BlockOptions {
        path: file.clone(),
        read_only: args.read_only,
        direct: args.direct,
        engine: args.engine.kind(),
        queues: args.queues,
        serial: args.serial.clone(),
        segments: args.seg_max,
        access_platform: args.access_platform,
        poll: Duration::from_micros(args.poll_us.into()),
    })?;
    let ready = |place: &dyn std::fmt::Display| {
        format!("block back-end ready on {place}, {}, {}", file.display(), Size(disk.size()))
    };
    match args.place.settle()? {
        Place::Vvu(bdf) => through_device(bdf, args.memory.window(), &disk, stop, &ready(&bdf)),
        Place::Socket(socket) => {
            let ready = ready(&socket);
            on_socket(socket, &disk, stop, &ready)
        }
    }
}

/// Serves `disk` through the vvu device `bdf`.
fn through_device(
    bdf: Bdf,
    window: WindowUse,
    disk: &BlockBackend,
    stop: &StopToken,
    ready: &str,
) -> anyhow::Result<()> {
    let mut said = Ok(());
    let driver = open_vfio_with(bdf, window)?;
    let disk = disk.clone().with_doorbells(driver.direct_doorbells());
    let disk = disk.with_window(driver.window()).context("cannot look at the window")?;
    serve(
        driver,
        stop,
        || said = say(ready),
        |frontend| {
            disk.serve_frontend(frontend, stop);
            Ok::<_, Infallible>(())
        },
    )?;
    said
}

/// Serves `disk` at a socket of this machine.
fn on_socket(socket: Socket, disk: &BlockBackend, stop: &StopToken, ready: &str) -> anyhow::Result<()> {
    say(ready)?;
    match socket {
        Socket::Bound(socket) => disk.serve(socket.listener(), stop)?,
        Socket::Listening(listener) => disk.serve(&listener, stop)?,
        Socket::Connected(frontend) => disk.serve_frontend(frontend, stop),
    }
    Ok(())
}

/// Tells the caller, and the service manager if there is one, that front-ends can connect.
fn say(ready: &str) -> anyhow::Result<()> {
    service::ready();
    writeln!(io::stdout(), "vvu: {ready}").context("cannot write to standard output")
}

/// A number of bytes, printed in the largest unit of which it is a multiple.
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
    use std::path::Path;

    use vvu::listening_socket::ListeningSocket;

    use super::*;

    #[test]
    fn sizes_are_exact() {
        let text = [64 << 20, 1 << 30, 1536, 3 << 9, 512, 0].map(|bytes| Size(bytes).to_string());
        assert_eq!(text, ["64 MiB", "1 GiB", "1536 bytes", "1536 bytes", "512 bytes", "0 bytes"]);
        assert_eq!(Size(3072).to_string(), "3 KiB");
    }

    fn disk(directory: &Path) -> BlockBackend {
        let path = directory.join("disk.img");
        std::fs::write(&path, [0; 512]).expect("disk");
        BlockBackend::open(&BlockOptions::new(path)).expect("disk")
    }

    #[test]
    fn a_plain_socket_in_use_is_left_alone() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("s");
        let _other = ListeningSocket::bind(&path).expect("socket");
        let error = PlaceArgs::at(&path).settle().expect_err("in use");
        assert!(error.to_string().contains("choose another path"), "{error}");
        assert!(path.exists());
    }

    #[test]
    fn a_plain_socket_is_served_until_the_signal() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("s");
        let stop = StopToken::new().expect("token");
        stop.stop();
        let Place::Socket(socket) = PlaceArgs::at(&path).settle().expect("a socket") else {
            panic!("want a socket")
        };
        on_socket(socket, &disk(directory.path()), &stop, "ready").expect("clean end");
        assert!(!path.exists());
    }
}
