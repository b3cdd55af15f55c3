//! Where front-ends find a back-end: behind a vvu device, or at a socket, as the "Backend program conventions" of the
//! vhost-user specification have it.

#![expect(unsafe_code, reason = "a number on the command line becomes the owner of its descriptor")]

use std::fmt;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use anyhow::{Context, bail};
use listenfd::ListenFd;
use vvu::Bdf;
use vvu::listening_socket::ListeningSocket;

/// Descriptors below are standard input, output and error.
const FIRST_FD: i64 = 3;

/// Options that name the place.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
pub(super) struct PlaceArgs {
    /// Serve the sibling VM through the vvu device with this PCI address
    #[arg(long, value_name = "BDF", help_heading = "Front-end, one of")]
    vfio: Option<Bdf>,
    /// Serve VMs of this machine on a vhost-user socket; systemd can pass it instead
    #[arg(long, visible_alias = "socket-path", value_name = "PATH", help_heading = "Front-end, one of")]
    socket: Option<PathBuf>,
    /// Serve VMs of this machine on this descriptor: a listening socket, or one that a front-end is connected to
    #[arg(
        long,
        value_name = "FDNUM",
        value_parser = clap::value_parser!(RawFd).range(FIRST_FD..),
        help_heading = "Front-end, one of"
    )]
    fd: Option<RawFd>,
}

/// The place.
#[derive(Debug)]
pub(super) enum Place {
    /// Behind the vvu device with this address.
    Vvu(Bdf),
    /// At a socket of this machine.
    Socket(Socket),
}

/// A vhost-user socket.
#[derive(Debug)]
pub(super) enum Socket {
    /// Made by this process.
    Bound(ListeningSocket),
    /// Inherited, and listening.
    Listening(UnixListener),
    /// Inherited, with a front-end at its other end.
    Connected(UnixStream),
}

impl fmt::Display for Socket {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bound(socket) => write!(out, "{}", socket.path().display()),
            Self::Listening(_) => write!(out, "an inherited socket"),
            Self::Connected(_) => write!(out, "an inherited connection"),
        }
    }
}

impl PlaceArgs {
    #[cfg(test)]
    pub(super) fn at(socket: &std::path::Path) -> Self {
        Self { vfio: None, socket: Some(socket.to_owned()), fd: None }
    }

    /// Makes or takes over the socket.
    ///
    /// # Errors
    /// No place is named, or it cannot be used.
    pub(super) fn settle(&self) -> anyhow::Result<Place> {
        let socket = match (self.vfio, &self.socket, self.fd) {
            (Some(bdf), ..) => return Ok(Place::Vvu(bdf)),
            (_, Some(path), _) => Socket::Bound(ListeningSocket::bind(path)?),
            (.., Some(number)) => inherited(number).with_context(|| format!("--fd {number}"))?,
            (None, None, None) => activated()?,
        };
        Ok(Place::Socket(socket))
    }
}

/// The socket that systemd passed (sd_listen_fds(3)).
fn activated() -> anyhow::Result<Socket> {
    let mut passed = ListenFd::from_env();
    if passed.len() > 1 {
        bail!("systemd passed {} sockets: want one `ListenStream=` in the socket unit", passed.len());
    }
    let listener = passed.take_unix_listener(0).context("the socket of systemd is no unix stream socket")?;
    let listener = listener.context("name a place: --vfio BDF, --socket PATH or --fd FDNUM")?;
    Ok(Socket::Listening(listener))
}

/// The socket with this number, which whoever started this process left open for it.
fn inherited(number: RawFd) -> anyhow::Result<Socket> {
    if !std::path::Path::new(&format!("/proc/self/fd/{number}")).exists() {
        bail!("the descriptor is not open: pass a unix stream socket");
    }
    // SAFETY: the descriptor is open, and nothing in this process owns it: the caller passed it for us alone, and this
    // function is called once.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
    let kind = (rustix::net::sockopt::socket_domain(&socket), rustix::net::sockopt::socket_type(&socket));
    if kind != (Ok(rustix::net::AddressFamily::UNIX), Ok(rustix::net::SocketType::STREAM)) {
        bail!("the descriptor is no unix stream socket");
    }
    if rustix::net::sockopt::socket_acceptconn(&socket)? {
        return Ok(Socket::Listening(socket.into()));
    }
    let frontend = UnixStream::from(socket);
    frontend.set_nonblocking(false).context("cannot make the socket blocking")?;
    Ok(Socket::Connected(frontend))
}
