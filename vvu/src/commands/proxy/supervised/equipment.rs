//! What the supervisor keeps for its workers, and passes on to the program that replaces it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vvu::device::SiblingMemory;
use vvu::durable::Store;
use vvu::listening_socket::ListeningSocket;

use super::super::{Args, MemoryLink, trace_file};
use super::{open_descriptors, set_close_on_exec};

/// Environment variable that tells a program which descriptors it inherits.
const INHERITED: &str = "VVU_PROXY_INHERITED";

/// What outlives workers.
pub(super) struct Equipment {
    pub(super) memory: SiblingMemory,
    pub(super) vhost_user: ListeningSocket,
    pub(super) vfio_user: ListeningSocket,
    pub(super) express: Option<ListeningSocket>,
    pub(super) store: Store,
    pub(super) uuid: Uuid,
    /// The file of the trace, and when the trace began.
    pub(super) trace: Option<(File, Instant)>,
    /// Numbers of all descriptors that are the supervisor's.
    pub(super) descriptors: Vec<RawFd>,
    _link: Option<MemoryLink>,
}

/// The same in the environment: numbers of descriptors.
#[derive(Serialize, Deserialize)]
struct Inherited {
    memory: RawFd,
    claims: RawFd,
    inflight: u64,
    vhost_user: RawFd,
    vfio_user: RawFd,
    express: Option<RawFd>,
    store: RawFd,
    uuid: String,
    trace: Option<RawFd>,
    descriptors: Vec<RawFd>,
}

impl Equipment {
    /// Takes it over from the program that ran in this process before, or makes it.
    pub(super) fn obtain(args: &Args) -> anyhow::Result<Self> {
        match std::env::var(INHERITED) {
            Ok(text) => {
                set_close_on_exec(true).context("cannot keep the descriptors to this program")?;
                let inherited = serde_json::from_str(&text).context("cannot read what is inherited")?;
                Self::inherit(args, inherited).context("cannot take over what is inherited")
            }
            Err(_) => Self::new(args),
        }
    }

    fn new(args: &Args) -> anyhow::Result<Self> {
        let (memory, link) = args.memory.open()?;
        let file = args
            .trace
            .as_deref()
            .map(|path| trace_file(path).with_context(|| format!("cannot write {}", path.display())));
        let file = file.transpose()?;
        let equipment = Self {
            memory,
            vhost_user: ListeningSocket::bind(&args.vhost_user)?,
            vfio_user: ListeningSocket::bind(&args.vfio_user)?,
            express: args.express.as_deref().map(ListeningSocket::bind).transpose()?,
            store: Store::create().context("cannot make memory for the state")?,
            uuid: args.uuid()?,
            trace: file.map(|file| (file, Instant::now())),
            descriptors: Vec::new(),
            _link: link,
        };
        let descriptors = open_descriptors().context("cannot list the open descriptors")?;
        Ok(Self { descriptors, ..equipment })
    }

    fn inherit(args: &Args, inherited: Inherited) -> anyhow::Result<Self> {
        // SAFETY: the program before left these descriptors open for this one, and each number is used once.
        let own = |number: RawFd| unsafe { OwnedFd::from_raw_fd(number) };
        let socket = |number, path: &Path| ListeningSocket::inherit(UnixListener::from(own(number)), path);
        let memory = SiblingMemory::inherit(
            own(inherited.memory).into(),
            own(inherited.claims).into(),
            inherited.inflight,
        )?;
        let link = args.memory.memory_link.as_deref();
        Ok(Self {
            _link: link.map(|path| MemoryLink::inherit(path, inherited.memory)),
            memory,
            vhost_user: socket(inherited.vhost_user, &args.vhost_user),
            vfio_user: socket(inherited.vfio_user, &args.vfio_user),
            express: inherited
                .express
                .zip(args.express.as_deref())
                .map(|(number, path)| socket(number, path)),
            store: Store::open(own(inherited.store).into())?,
            uuid: inherited.uuid.parse().context("the UUID is malformed")?,
            trace: inherited.trace.map(|number| (own(number).into(), Instant::now())),
            descriptors: inherited.descriptors,
        })
    }

    /// Replaces the program of this process by `program`, which takes all descriptors over. Returns why that failed.
    pub(super) fn exec(&self, program: &Path) -> anyhow::Error {
        let (memory, claims, inflight) = self.memory.parts();
        let listener = |socket: &ListeningSocket| socket.listener().as_raw_fd();
        let inherited = Inherited {
            memory: memory.as_raw_fd(),
            claims: claims.as_raw_fd(),
            inflight,
            vhost_user: listener(&self.vhost_user),
            vfio_user: listener(&self.vfio_user),
            express: self.express.as_ref().map(listener),
            store: self.store.as_fd().as_raw_fd(),
            uuid: self.uuid.to_string(),
            trace: self.trace.as_ref().map(|(file, _)| file.as_raw_fd()),
            descriptors: self.descriptors.clone(),
        };
        let text = match serde_json::to_string(&inherited) {
            Ok(text) => text,
            Err(error) => return error.into(),
        };
        if let Err(error) = set_close_on_exec(false) {
            return error.into();
        }
        let error = Command::new(program).args(std::env::args_os().skip(1)).env(INHERITED, text).exec();
        // Nothing else runs that could hand the descriptors on meanwhile.
        let _ = set_close_on_exec(true);
        error.into()
    }
}
