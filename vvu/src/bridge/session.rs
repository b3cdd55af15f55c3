//! One front-end and one connection to the back-end, from the link going up to its end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use vhost::vhost_user::message::FrontendReq;

use super::attachments::{AttachmentError, Attachments, Limits};
use super::options::BridgeError;
use crate::driver::{Driver, DriverError, Incoming};
use crate::event::wait_any;
use crate::message_socket::{Message, MessageSocket, SocketError};
use crate::pci::{BarFile, PciDevice};
use crate::shortage::remedy_of_cause;
use crate::spec::vhost_user::{HEADER_SIZE, MemoryRegion};

/// Messages moved before the other file descriptors get their turn.
const MESSAGES_PER_TURN: usize = 64;
/// Payload of an acknowledgement that says no.
const FAILURE: [u8; 8] = 1u64.to_le_bytes();
/// Interval at which to check an idle device: a device whose proxy has ended, or that was reset, raises no interrupt.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The end of a session.
#[derive(Debug)]
pub(super) enum End {
    /// It was time to stop.
    Stopped,
    /// The front-end left by itself; the device has cleared the link.
    FrontendLeft,
    /// One side broke the protocol; the link is still up.
    Refused(String),
    /// The back-end hung up; the link is still up.
    BackendLeft { reason: SocketError, serving: bool },
}

/// The reason why a wait ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Woken {
    /// It is time to stop.
    Stopped,
    /// Something can be done.
    Ready,
    /// Nothing has happened for a while.
    Idle,
}

/// Moves the messages of one front-end. Buffers are bounded: a message is taken from one side only when the other side
/// takes it.
pub(super) struct FrontendSession<'d, D: PciDevice> {
    driver: &'d mut Driver<D>,
    backend: MessageSocket,
    /// Socket from which the requests of the back-end come.
    channel: Option<MessageSocket>,
    /// The front-end has sent a message, so this connection to the back-end cannot serve another front-end.
    serving: bool,
    frontend_up: bool,
}

impl<'d, D: PciDevice> FrontendSession<'d, D> {
    pub(super) fn new(driver: &'d mut Driver<D>, backend: MessageSocket) -> Self {
        Self { driver, backend, channel: None, serving: false, frontend_up: false }
    }

    /// Lets a front-end connect.
    pub(super) fn open(&mut self) -> Result<(), BridgeError> {
        Ok(self.driver.set_backend_up(true)?)
    }

    /// Disconnects the front-end and discards its messages.
    pub(super) fn close(&mut self) -> Result<(), BridgeError> {
        self.driver.set_backend_up(false)?;
        // The write has taken effect when a read that follows it returns. No message of this front-end comes after
        // those that are in the queue then.
        self.driver.link()?;
        while self.driver.receive()?.is_some() {}
        Ok(())
    }

    /// Moves messages until the session ends.
    pub(super) fn run(&mut self, until: &[BorrowedFd<'_>]) -> Result<End, BridgeError> {
        let mut more = true;
        let mut left = false;
        loop {
            let woken = self.wait(until, more)?;
            if woken == Woken::Stopped {
                return Ok(End::Stopped);
            }
            // The link is read before the queue, which then has all that a front-end sent before it left.
            left |= (self.driver.rx_event().drain() > 0 || woken == Woken::Idle) && self.link_is_down()?;
            self.driver.tx_event().drain();
            if woken == Woken::Idle || self.driver.next_check().is_some() {
                self.driver.check_calls()?;
            }
            more = match self.pump() {
                Ok(more) => more,
                Err(Halt::Session(end)) => return Ok(end),
                Err(Halt::Bridge(error)) => return Err(error),
            };
            if left && !more {
                if self.serving {
                    return Ok(End::FrontendLeft);
                }
                self.open()?;
                left = false;
            }
        }
    }

    /// Does what [`run`](Self::run) does after a wait, without the wait. Returns whether the session goes on.
    #[cfg(fuzzing)]
    pub(super) fn step(&mut self, idle: bool) -> bool {
        self.driver.rx_event().drain();
        let looked = if idle { self.link_is_down().and_then(|_| self.driver.check_calls()) } else { Ok(()) };
        looked.is_ok() && self.pump().is_ok()
    }

    /// Waits until something can be done, at most until the device has to be checked. Does not wait if there is
    /// `more` to do anyway.
    fn wait(&mut self, until: &[BorrowedFd<'_>], more: bool) -> Result<Woken, BridgeError> {
        let room = self.driver.can_send()?;
        let events = [self.driver.rx_event().as_fd(), self.driver.tx_event().as_fd()];
        let mut fds: Vec<_> =
            until.iter().chain(&events).map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        let backend = (Some(&self.backend), room);
        let channel = (self.channel.as_ref(), room && !self.channel_is_congested());
        for (socket, readable) in [backend, channel] {
            let Some(socket) = socket else { continue };
            let mut events = PollFlags::empty();
            events.set(PollFlags::IN, readable);
            events.set(PollFlags::OUT, socket.is_congested());
            // A socket that is not to be read is left out: its hang-up would end every wait.
            if !events.is_empty() {
                fds.push(PollFd::new(socket, events));
            }
        }
        let idle = self.driver.next_check().unwrap_or(CHECK_INTERVAL).min(CHECK_INTERVAL);
        let time = if more { Duration::ZERO } else { idle };
        let ready = wait_any(&mut fds, Some(Instant::now() + time)).map_err(BridgeError::wait)?;
        let stopped = fds[..until.len()].iter().any(|fd| !fd.revents().is_empty());
        Ok(match ready {
            _ if stopped => Woken::Stopped,
            0 if !more => Woken::Idle,
            _ => Woken::Ready,
        })
    }

    /// Returns whether the device has taken the link down, as it does when the front-end left.
    fn link_is_down(&mut self) -> Result<bool, DriverError> {
        let link = self.driver.link()?;
        if link.frontend_up && !std::mem::replace(&mut self.frontend_up, true) {
            log::info!("a front-end connected");
        }
        Ok(!link.backend_up)
    }

    fn channel_is_congested(&self) -> bool {
        self.channel.as_ref().is_some_and(MessageSocket::is_congested)
    }

    /// Moves messages in all directions; true if there may be more to move.
    fn pump(&mut self) -> Result<bool, Halt> {
        for _ in 0..MESSAGES_PER_TURN {
            let moved = self.move_request()? | self.move_answer()? | self.move_backend_request()?;
            if !moved {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Moves a message of the front-end to the back-end; false if there is none or no room.
    fn move_request(&mut self) -> Result<bool, Halt> {
        self.backend.flush().map_err(|reason| self.backend_left(reason))?;
        if let Some(channel) = &mut self.channel
            && let Err(error) = channel.flush()
        {
            log::info!("the back-end closed its request channel: {error}");
            self.channel = None;
        }
        // The bridge itself may have to answer, which takes room to send.
        if self.backend.is_congested() || self.channel_is_congested() || !self.driver.can_send()? {
            return Ok(false);
        }
        match self.driver.receive()? {
            None => Ok(false),
            // A front-end left that sent nothing, or whose session is over already.
            Some(Incoming::FrontendLeft) if !self.serving => Ok(true),
            Some(Incoming::FrontendLeft) => Err(End::FrontendLeft.into()),
            Some(Incoming::Message(message)) => {
                self.serving = true;
                self.give_to_backend(message)?;
                Ok(true)
            }
        }
    }

    fn give_to_backend(&mut self, mut message: Message) -> Result<(), Halt> {
        let header = message.header;
        if header.is_reply() {
            let Some(channel) = &mut self.channel else {
                log::warn!("dropped the answer to request {}: no back-end waits for it", header.request);
                return Ok(());
            };
            // The next receive or flush finds a channel that is closed.
            let _ = channel.send(message.bytes, Vec::new());
            return Ok(());
        }
        let limits = Limits { queues: self.driver.queues(), shared_memory: self.driver.shared_memory_size() };
        let attachments = match Attachments::of(&message, limits) {
            Ok(attachments) => attachments,
            Err(refusal) if header.needs_reply() => {
                log::error!("refused a message of the front-end: {refusal}");
                self.driver.send(&Message::new(header.reply(8), &FAILURE).bytes)?;
                return Ok(());
            }
            Err(refusal) => return Err(refusal.into()),
        };
        let fds = match self.attach(attachments, &mut message) {
            // It passes, and the front-end that connects next finds what there is then.
            Err(Halt::Bridge(error)) if remedy_of_cause(&error).is_some() => {
                return Err(End::Refused(error.to_string()).into());
            }
            attached => attached?,
        };
        log::debug!("request {} to the back-end with {attachments:?}", header.request);
        self.backend.send(message.bytes, fds).map_err(|reason| self.backend_left(reason))?;
        if let Attachments::Kick(index) = attachments {
            // An earlier owner of this eventfd may have taken a kick that nobody has served yet. One kick
            // too many does no harm.
            self.driver.kick(index)?.signal();
        }
        Ok(())
    }

    /// Returns the descriptors that go with a message, whose offsets then fit them.
    fn attach(&mut self, attachments: Attachments, message: &mut Message) -> Result<Vec<OwnedFd>, Halt> {
        let io = |source| BridgeError::Io { what: "duplicate a descriptor for the back-end", source };
        let event = match attachments {
            Attachments::None => return Ok(Vec::new()),
            Attachments::Memory(regions) => {
                let BarFile { file, offset } = self.driver.shared_memory()?;
                move_offsets(message, offset);
                let each = (0..regions).map(|_| file.try_clone().map(OwnedFd::from));
                return Ok(each.collect::<Result<_, _>>().map_err(io)?);
            }
            Attachments::BackendChannel => {
                let (ours, theirs) = UnixStream::pair().map_err(io)?;
                self.channel = Some(MessageSocket::new(ours));
                return Ok(vec![theirs.into()]);
            }
            Attachments::Kick(index) => self.driver.kick(index)?,
            Attachments::Call(index) => self.driver.call(index)?,
            Attachments::Err(index) => self.driver.err(index)?,
        };
        Ok(vec![event.as_fd().try_clone_to_owned().map_err(io)?])
    }

    /// Moves an answer of the back-end to the front-end; false if there is none or no room.
    fn move_answer(&mut self) -> Result<bool, Halt> {
        if !self.driver.can_send()? {
            return Ok(false);
        }
        let message = match self.backend.receive() {
            Ok(Some(message)) => message,
            Ok(None) => return Ok(false),
            Err(reason) => return Err(self.backend_left(reason)),
        };
        let request = message.header.request;
        if !message.header.is_reply() {
            return Err(AttachmentError::Direction { request }.into());
        }
        // The descriptor of an in-flight region is not needed: the device replaces the region.
        if !message.fds.is_empty() && request != u32::from(FrontendReq::GET_INFLIGHT_FD) {
            log::warn!("closed the descriptors in the answer to request {request}: they cannot be carried");
        }
        self.driver.send(&message.bytes)?;
        Ok(true)
    }

    /// Moves a request of the back-end to the front-end; false if there is none or no room.
    fn move_backend_request(&mut self) -> Result<bool, Halt> {
        if self.channel_is_congested() || !self.driver.can_send()? {
            return Ok(false);
        }
        let Some(channel) = &mut self.channel else { return Ok(false) };
        let message = match channel.receive() {
            Ok(Some(message)) => message,
            Ok(None) => return Ok(false),
            Err(reason) => {
                log::info!("the back-end closed its request channel: {reason}");
                self.channel = None;
                return Ok(true);
            }
        };
        let header = message.header;
        if header.is_reply() {
            log::warn!("dropped an answer on the back-end's request channel");
        } else if message.fds.is_empty() {
            self.driver.send(&message.bytes)?;
        } else {
            log::warn!("refused request {} of the back-end: it carries descriptors", header.request);
            if header.needs_reply() {
                let refused = Message::new(header.reply(8), &FAILURE);
                // The next receive or flush finds a channel that is closed.
                let _ = channel.send(refused.bytes, Vec::new());
            }
        }
        Ok(true)
    }

    fn backend_left(&self, reason: SocketError) -> Halt {
        Halt::Session(End::BackendLeft { reason, serving: self.serving })
    }
}

/// Adds where the shared memory BAR begins in its file to the offsets in a message whose shape was checked.
fn move_offsets(message: &mut Message, begin: u64) {
    // The padded count or padding before the regions, and the offset at the end of each region.
    const REGIONS: usize = 8;
    const OFFSET_IN_REGION: usize = MemoryRegion::SIZE - 8;
    let payload = message.bytes.len() - HEADER_SIZE;
    let offsets: Vec<usize> = match FrontendReq::try_from(message.header.request) {
        Ok(FrontendReq::SET_MEM_TABLE | FrontendReq::ADD_MEM_REG) => {
            (REGIONS + OFFSET_IN_REGION..payload).step_by(MemoryRegion::SIZE).collect()
        }
        Ok(FrontendReq::SET_INFLIGHT_FD) => vec![8],
        _ => Vec::new(),
    };
    for at in offsets {
        if let Some(field) = message.payload_mut().get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
            *field = u64::from_le_bytes(*field).wrapping_add(begin).to_le_bytes();
        }
    }
}

/// A reason to stop moving messages.
enum Halt {
    Session(End),
    Bridge(BridgeError),
}

impl From<End> for Halt {
    fn from(end: End) -> Self {
        Self::Session(end)
    }
}

impl From<AttachmentError> for Halt {
    fn from(refusal: AttachmentError) -> Self {
        Self::Session(End::Refused(refusal.to_string()))
    }
}

impl From<BridgeError> for Halt {
    fn from(error: BridgeError) -> Self {
        Self::Bridge(error)
    }
}

impl From<DriverError> for Halt {
    fn from(error: DriverError) -> Self {
        Self::Bridge(error.into())
    }
}
