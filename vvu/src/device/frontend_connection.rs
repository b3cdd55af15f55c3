//! The connection of one front-end, from accept to hang-up.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};

use super::events::Source;
use super::peer::Peer;
use super::resources::{Ledgers, Resources};
use super::sibling_memory::MemoryError;
use super::trace::{Did, From, Trace};
use super::treatment::{MessageRefusal, Treatment, treat_backend_request, treat_reply, treat_request};
use crate::durable::{Adopted, Fd, RestoreError};
use crate::framed_socket::{Framing, SavedSocket};
use crate::message_socket::{Message, MessageSocket, SocketError};
use crate::spec::vhost_user::{Header, Request};
use rustix::io::Errno;
use vhost::vhost_user::VhostUserProtocolFeatures;

/// Most requests of either side that wait for answers of the other; an ordinary peer waits for each answer.
const UNANSWERED_MAX: usize = 64;

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("refused a message of the front-end, which does not wait for an answer: {0}")]
    Refused(#[from] MessageRefusal),
    /// No front-end can be served any more.
    #[error(transparent)]
    Orphaned(MemoryError),
    #[error("the front-end sent {UNANSWERED_MAX} requests without waiting for answers")]
    Flood,
    #[error("a message of {want} bytes does not fit a receive buffer of the guest driver, which has {got}")]
    TooSmall { got: usize, want: usize },
}

/// What came from the front-end.
#[derive(Debug)]
pub(super) enum Received {
    Nothing,
    /// A message for the driver, and what it changes in the device.
    Message(Message, Treatment),
    /// Something that the device has dealt with: a refused request, or the end of the back-end channel.
    Done,
}

/// A connected front-end.
#[derive(Debug)]
pub(super) struct FrontendConnection {
    frontend: MessageSocket,
    /// The front-end's process, if the kernel can name it.
    pub(super) peer: Option<Peer>,
    /// The socket for requests of the back-end.
    channel: Option<MessageSocket>,
    reply_ack: bool,
    /// Codes of the requests that the back-end has yet to answer, oldest first.
    unanswered: VecDeque<u32>,
    /// A message for the driver that waits for a receive buffer.
    pub(super) to_driver: Option<Message>,
    /// A message of the driver that was read and not passed on yet, and the head of its buffer until that is given back.
    pub(super) from_driver: Option<(Option<u16>, Message)>,
    /// Answers to requests of the back-end that failed here; they go to the driver next.
    pub(super) answers: VecDeque<Message>,
    /// Headers of the back-end's requests that the front-end has yet to acknowledge.
    asked: VecDeque<Header>,
}

impl FrontendConnection {
    pub(super) fn new(stream: impl Into<Fd>, peer: Option<Peer>, ledgers: Option<Ledgers>) -> Self {
        Self {
            frontend: MessageSocket::with_ledger(stream, ledgers.map(|ledgers| ledgers.frontend)),
            peer,
            channel: None,
            reply_ack: false,
            unanswered: VecDeque::new(),
            to_driver: None,
            from_driver: None,
            answers: VecDeque::new(),
            asked: VecDeque::new(),
        }
    }

    /// Begins to wait for messages.
    pub(super) fn watch(&self, resources: &Resources) -> Result<(), Errno> {
        resources.events.add(&self.frontend, Source::Socket)
    }

    /// Disconnects the front-end. What it sent and nobody read is closed by the closer.
    pub(super) fn hang_up(mut self, resources: &Resources) {
        self.close_channel(resources);
        resources.disconnect(self.frontend);
    }

    /// Uses `stream` for requests of the back-end from now on.
    pub(super) fn set_channel(&mut self, stream: UnixStream, resources: &Resources) -> Result<(), Errno> {
        self.close_channel(resources);
        let ledger = resources.ledgers.map(|ledgers| ledgers.channel);
        let channel = MessageSocket::with_ledger(OwnedFd::from(stream), ledger);
        let watched = resources.events.add(&channel, Source::Socket);
        self.channel = Some(channel);
        watched
    }

    /// Closes the channel. The front-end will not answer the back-end's requests on it any more, so they
    /// fail here.
    fn close_channel(&mut self, resources: &Resources) {
        if let Some(channel) = self.channel.take() {
            resources.disconnect(channel);
        }
        self.answers.extend(self.asked.drain(..).map(failure));
    }

    fn channel_broke(&mut self, error: &SocketError, resources: &Resources) {
        log::info!("the front-end's channel for requests of the back-end is gone: {error}");
        self.close_channel(resources);
    }

    /// Sends what the front-end did not take before.
    pub(super) fn flush(&mut self, resources: &Resources) -> Result<(), ConnectionError> {
        self.frontend.flush()?;
        if let Some(channel) = &mut self.channel
            && let Err(error) = channel.flush()
        {
            self.channel_broke(&error, resources);
        }
        Ok(())
    }

    /// Whether messages for the front-end have to wait.
    pub(super) fn is_congested(&self) -> bool {
        self.frontend.is_congested() || self.channel.as_ref().is_some_and(MessageSocket::is_congested)
    }

    /// Takes the next message of the front-end. A refused request is answered here if the front-end waits for
    /// an acknowledgement; otherwise it ends the connection.
    pub(super) fn next_message(&mut self, resources: &mut Resources) -> Result<Received, ConnectionError> {
        if let Some(mut message) = self.frontend.receive()? {
            let treatment = self.examine(&mut message, resources);
            resources.close_all(&mut message.fds);
            return match treatment? {
                Some(treatment) => Ok(Received::Message(message, treatment)),
                None => Ok(Received::Done),
            };
        }
        if self.frontend.is_unfinished() {
            return Ok(Received::Done);
        }
        let Some(channel) = &mut self.channel else { return Ok(Received::Nothing) };
        match channel.receive() {
            Ok(Some(mut message)) => {
                let answer = self.examine_answer(&message, resources);
                resources.close_all(&mut message.fds);
                answer.map(|()| Received::Message(message, Treatment::Relay))
            }
            Ok(None) if channel.is_unfinished() => Ok(Received::Done),
            Ok(None) => Ok(Received::Nothing),
            Err(error) => {
                self.channel_broke(&error, resources);
                Ok(Received::Done)
            }
        }
    }

    /// Examines a request of the front-end; `None` if it was refused and the front-end knows.
    fn examine(
        &mut self,
        message: &mut Message,
        Resources { memory, queues, trace, .. }: &mut Resources,
    ) -> Result<Option<Treatment>, ConnectionError> {
        let arrived = Trace::arrived(trace, message);
        let Header { request, .. } = message.header;
        let is_query = Request::of_frontend(request).is_some_and(Request::is_query);
        let answered = is_query || self.reply_ack && message.header.needs_reply();
        if answered && self.unanswered.len() == UNANSWERED_MAX {
            Trace::record(trace, From::Frontend, arrived, Did::Refused(&ConnectionError::Flood));
            return Err(ConnectionError::Flood);
        }
        match treat_request(message, memory, *queues) {
            Ok(treatment) => {
                Trace::record(trace, From::Frontend, arrived, Did::Passed(message.payload()));
                if answered {
                    self.unanswered.push_back(request);
                }
                if let Treatment::ProtocolFeatures(bits) = treatment {
                    self.reply_ack = bits & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0;
                }
                Ok(Some(treatment))
            }
            Err(refusal) => {
                Trace::record(trace, From::Frontend, arrived, Did::Refused(&refusal));
                if let MessageRefusal::Memory(error @ MemoryError::Orphaned) = refusal {
                    return Err(ConnectionError::Orphaned(error));
                }
                if !answered || is_query || self.frontend.is_congested() {
                    return Err(refusal.into());
                }
                log::error!("refused request {request} of the front-end: {refusal}");
                self.frontend.send(failure(message.header).bytes, Vec::new())?;
                Ok(None)
            }
        }
    }

    /// Examines a message on the back-end channel, which must be the answer to a request of the back-end.
    fn examine_answer(
        &mut self,
        message: &Message,
        resources: &mut Resources,
    ) -> Result<(), ConnectionError> {
        let trace = &mut resources.trace;
        let arrived = Trace::arrived(trace, message);
        let Header { request, .. } = message.header;
        if !message.header.is_reply() || !message.fds.is_empty() {
            let refusal = MessageRefusal::Direction { request };
            Trace::record(trace, From::Frontend, arrived, Did::Refused(&refusal));
            return Err(refusal.into());
        }
        // Answers come in the order of the requests.
        if self.asked.front().is_some_and(|asked| asked.request == request) {
            self.asked.pop_front();
        }
        Trace::record(trace, From::Frontend, arrived, Did::Passed(message.payload()));
        Ok(())
    }

    /// Passes a message of the driver to the front-end. A request of the back-end that cannot be passed on
    /// is answered with a failure if the back-end asks for an acknowledgement.
    pub(super) fn deliver(
        &mut self,
        mut message: Message,
        resources: &mut Resources,
    ) -> Result<(), ConnectionError> {
        let Resources { memory, queues, trace, .. } = resources;
        let arrived = Trace::arrived(trace, &message);
        let header = message.header;
        if header.is_reply() {
            if self.unanswered.front() != Some(&header.request) {
                log::warn!("dropped a reply to request {}: the front-end waits for none", header.request);
                Trace::record(trace, From::Backend, arrived, Did::Dropped(&"nobody asked for it"));
                return Ok(());
            }
            self.unanswered.pop_front();
            if let Err(refusal) = treat_reply(&mut message, memory, *queues) {
                Trace::record(trace, From::Backend, arrived, Did::Refused(&refusal));
                return Err(refusal.into());
            }
            Trace::record(trace, From::Backend, arrived, Did::Passed(message.payload()));
            self.frontend.send(message.bytes, message.fds)?;
            return Ok(());
        }
        let refusal = match (treat_backend_request(&message), &mut self.channel) {
            (Ok(()), Some(_)) if header.needs_reply() && self.asked.len() == UNANSWERED_MAX => {
                MessageRefusal::Flood
            }
            (Ok(()), Some(channel)) => {
                Trace::record(trace, From::Backend, arrived, Did::Passed(message.payload()));
                if header.needs_reply() {
                    self.asked.push_back(header);
                }
                if let Err(error) = channel.send(message.bytes, Vec::new()) {
                    self.channel_broke(&error, resources);
                }
                return Ok(());
            }
            (Ok(()), None) => MessageRefusal::NoChannel,
            (Err(refusal), _) => refusal,
        };
        log::warn!("refused request {} of the back-end: {refusal}", header.request);
        Trace::record(trace, From::Backend, arrived, Did::Refused(&refusal));
        if header.needs_reply() {
            self.answers.push_back(failure(header));
        }
        Ok(())
    }
}

/// A connection as it is saved. Messages are their bytes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedConnection {
    frontend: SavedSocket,
    channel: Option<SavedSocket>,
    reply_ack: bool,
    unanswered: VecDeque<u32>,
    to_driver: Option<Vec<u8>>,
    from_driver: Option<(Option<u16>, Vec<u8>)>,
    answers: Vec<Vec<u8>>,
    asked: Vec<Vec<u8>>,
}

impl FrontendConnection {
    /// Returns the state for a successor; `None` if it is not to be kept.
    pub(super) fn save(&self) -> Option<SavedConnection> {
        let header = |header: &Header| header.to_bytes().to_vec();
        Some(SavedConnection {
            frontend: self.frontend.save()?,
            channel: self.channel.as_ref().and_then(MessageSocket::save),
            reply_ack: self.reply_ack,
            unanswered: self.unanswered.clone(),
            to_driver: self.to_driver.as_ref().map(|message| message.bytes.clone()),
            from_driver: self.from_driver.as_ref().map(|(head, message)| (*head, message.bytes.clone())),
            answers: self.answers.iter().map(|message| message.bytes.clone()).collect(),
            asked: self.asked.iter().map(header).collect(),
        })
    }

    /// Restores what [`save`](Self::save) returned.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub(super) fn restore(
        saved: SavedConnection,
        ledgers: Ledgers,
        left: &mut Adopted,
    ) -> Result<Self, RestoreError> {
        let frontend = MessageSocket::restore(saved.frontend, ledgers.frontend, left)?;
        let channel = saved.channel.map(|saved| MessageSocket::restore(saved, ledgers.channel, left));
        let from_driver =
            saved.from_driver.map(|(head, bytes)| Ok::<_, RestoreError>((head, message(bytes)?)));
        Ok(Self {
            peer: Peer::of(&frontend)?,
            frontend,
            channel: channel.transpose()?,
            reply_ack: saved.reply_ack,
            unanswered: saved.unanswered,
            to_driver: saved.to_driver.map(message).transpose()?,
            from_driver: from_driver.transpose()?,
            answers: saved.answers.into_iter().map(message).collect::<Result<_, _>>()?,
            asked: saved.asked.iter().map(|bytes| header(bytes)).collect::<Result<_, _>>()?,
        })
    }

    /// Begins to wait for messages of the channel, if there is one.
    pub(super) fn watch_channel(&self, resources: &Resources) -> Result<(), Errno> {
        self.channel.as_ref().map_or(Ok(()), |channel| resources.events.add(channel, Source::Socket))
    }
}

fn header(bytes: &[u8]) -> Result<Header, RestoreError> {
    Header::from_wire(bytes).map_err(|error| RestoreError::Value(error.to_string()))
}

fn message(bytes: Vec<u8>) -> Result<Message, RestoreError> {
    Ok(Message { header: header(&bytes)?, bytes, fds: Vec::new() })
}

/// The answer to a request that failed.
fn failure(header: Header) -> Message {
    Message::new(header.reply(8), &1u64.to_le_bytes())
}
