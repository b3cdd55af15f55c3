//! `vvu device bridge`: any vhost-user back-end behind a vvu device.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tempfile::TempDir;
use vvu::bridge::{BackendSocket, Bridge, BridgeError, Options, Retry};
use vvu::listening_socket::ListeningSocket;
use vvu::pci::PciDevice;
use vvu::{Bdf, StopToken, open_vfio_with};

use super::program::{Exit, Program};
use super::{Memory, say};

/// Placeholder for the socket's path in the words of a command.
const SOCKET: &str = "{socket}";
/// Time that a program gets from its start until it answers.
const START_TIME: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// PCI address of the vvu device
    #[arg(long, value_name = "BDF")]
    vfio: Bdf,
    #[command(flatten)]
    memory: Memory,
    /// Socket that the back-end listens on; with COMMAND the default is a private one
    #[arg(long, value_name = "PATH", required_unless_present = "command")]
    socket: Option<PathBuf>,
    /// Listen on the socket, for a back-end that connects
    #[arg(long)]
    listen: bool,
    /// Wait for the back-end whenever it is not there, instead of ending
    #[arg(long, conflicts_with = "command")]
    wait: bool,
    /// Start COMMAND again when it fails; a COMMAND that ends well is always started again
    #[arg(long, requires = "command")]
    restart: bool,
    /// Back-end to run; {socket} stands for the path of the socket
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub(super) fn run(args: &Args, stop: &StopToken) -> anyhow::Result<()> {
    if !args.command.is_empty() {
        return run_program(args, stop);
    }
    let socket = args.socket.as_deref().context("name a socket: --socket PATH")?;
    let retry = if args.wait { Retry::Forever } else { Retry::Never };
    let (backend, _listening) = backend_socket(socket, args.listen)?;
    let options = Options { backend, retry };
    let ready = format!("bridge ready on {}, {}", args.vfio, socket.display());
    let mut said = Ok(());
    Bridge::new(open_vfio_with(args.vfio, args.memory.window())?, options)
        .run(&[stop.as_fd()], || said = say(&ready))?;
    said
}

/// Returns how to connect to the back-end, and the socket that has to be kept until the end.
fn backend_socket(path: &Path, listen: bool) -> anyhow::Result<(BackendSocket, Option<ListeningSocket>)> {
    if !listen {
        return Ok((BackendSocket::Connect(path.to_owned()), None));
    }
    let socket = ListeningSocket::bind(path)?;
    let listener = socket.listener().try_clone().context("cannot share a socket")?;
    Ok((BackendSocket::Listen(listener), Some(socket)))
}

fn run_program(args: &Args, stop: &StopToken) -> anyhow::Result<()> {
    let (_directory, socket) = program_socket(args.socket.as_deref())?;
    let words = words(&args.command, &socket, args.socket.is_some())?;
    let (backend, _listening) = backend_socket(&socket, args.listen)?;
    let options = Options { backend, retry: Retry::For(START_TIME) };
    let mut bridge = Bridge::new(open_vfio_with(args.vfio, args.memory.window())?, options);
    let ready = format!("bridge ready on {}, {}", args.vfio, words[0]);
    serve(&mut bridge, &words, args.restart, stop, || say(&ready))
}

/// Returns the path of the program's socket, and the directory made for it if the user named none.
fn program_socket(named: Option<&Path>) -> anyhow::Result<(Option<TempDir>, PathBuf)> {
    if let Some(path) = named {
        return Ok((None, path.to_owned()));
    }
    let directory = tempfile::Builder::new().prefix("vvu-").tempdir().context(
        "cannot make a temporary directory: set TMPDIR to one that can be written, or name a socket with --socket",
    )?;
    let socket = directory.path().join("back-end");
    Ok((Some(directory), socket))
}

/// Runs the program, and runs it again where that helps, until `stop` is readable.
///
/// A program that ends well after it has served one front-end is started again for the next front-end. A program that
/// ends before it answers is not, since it would do the same again.
fn serve<D: PciDevice>(
    bridge: &mut Bridge<D>,
    words: &[String],
    restart: bool,
    stop: &StopToken,
    ready: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut ready = Some(ready);
    loop {
        let mut program = Program::start(words)?;
        let mut answered = Ok(false);
        let bridged = bridge.run(&[stop.as_fd(), program.exit_event()], || {
            answered = ready.take().map_or(Ok(()), |ready| ready()).map(|()| true);
        });
        let exit = program.exit()?;
        if stop.is_stopped() {
            program.end()?;
            return Ok(bridged?);
        }
        let answered = answered?;
        let Some(exit) = exit else {
            program.end()?;
            return bridged.map_err(|error| describe(error, &words[0]));
        };
        // A process that the program left must not serve the socket of the next program.
        program.end()?;
        let Exit::Status(exit) = exit else {
            bail!(
                "{} has gone to the background, where nobody can tell whether it runs: start it in the foreground (an \
                 option like --foreground, or without one like --daemonize)",
                words[0]
            );
        };
        ensure!(answered, "{} ended ({exit}) before it answered on its socket", words[0]);
        match bridged {
            Ok(()) | Err(BridgeError::Connect { .. } | BridgeError::BackendLeft { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        if exit.success() {
            log::info!("{} has ended: starting it again", words[0]);
        } else if restart {
            log::warn!("{} failed ({exit}): starting it again", words[0]);
        } else {
            bail!("{} failed ({exit}); --restart starts it again", words[0]);
        }
    }
}

fn describe(error: BridgeError, program: &str) -> anyhow::Error {
    let late = matches!(error, BridgeError::Connect { .. });
    let error = anyhow::Error::from(error);
    if late { error.context(format!("{program} runs, but does not answer on its socket")) } else { error }
}

/// Returns `command` with the path of the socket filled in.
fn words(command: &[String], socket: &Path, known: bool) -> anyhow::Result<Vec<String>> {
    let path = socket.to_str().context("the socket's path is not UTF-8: choose another with --socket")?;
    ensure!(
        known || command.iter().any(|word| word.contains(SOCKET)),
        "the command does not name its socket: write {SOCKET} in its place, or give --socket PATH"
    );
    Ok(command.iter().map(|word| word.replace(SOCKET, path)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn a_named_socket_needs_no_directory() {
        let (directory, socket) = program_socket(Some(Path::new("/s"))).expect("named");
        assert!(directory.is_none());
        assert_eq!(socket, Path::new("/s"));
        let (directory, socket) = program_socket(None).expect("made");
        assert_eq!(socket.parent(), directory.as_ref().map(TempDir::path));
    }

    #[test]
    fn the_socket_is_filled_in_wherever_it_is_named() {
        let filled = words(&command(&["b", "--path={socket},x", "{socket}"]), Path::new("/s"), false);
        assert_eq!(filled.expect("filled"), ["b", "--path=/s,x", "/s"]);
        let error = words(&command(&["b"]), Path::new("/s"), false).expect_err("no place").to_string();
        assert!(error.contains("{socket}") && error.contains("--socket"), "{error}");
        assert_eq!(words(&command(&["b"]), Path::new("/s"), true).expect("known"), ["b"]);
    }
}
