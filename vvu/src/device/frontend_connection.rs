//! The connection of one front-end, from accept to hang-up.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;

use super::peer::Peer;
use super::sibling_memory::SiblingMemory;
use super::trace::{Did, From, Trace};
use super::treatment::{MessageRefusal, Treatment, treat_backend_request, treat_reply, treat_request};
use crate::message_socket::{Message, MessageSocket, SocketError};
use crate::spec::vhost_user::{Header, Request};
use vhost::vhost_user::VhostUserProtocolFeatures;

/// Most requests that wait for answers of the back-end; an ordinary front-end waits for each answer.
const UNANSWERED_MAX: usize = 64;

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("refused a message of the front-end, which does not wait for an answer: {0}")]
    Refused(#[from] MessageRefusal),
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
    /// A request that was refused and answered.
    Refused,
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
    /// The answer to a refused request of the back-end, which goes to the driver next.
    pub(super) answer: Option<Message>,
}

impl FrontendConnection {
    pub(super) fn new(stream: UnixStream, peer: Option<Peer>) -> Self {
        Self {
            frontend: MessageSocket::new(stream),
            peer,
            channel: None,
            reply_ack: false,
            unanswered: VecDeque::new(),
            to_driver: None,
            answer: None,
        }
    }

    /// The front-end's socket.
    pub(super) fn frontend(&self) -> &MessageSocket {
        &self.frontend
    }

    /// The socket for requests of the back-end.
    pub(super) fn channel(&self) -> Option<&MessageSocket> {
        self.channel.as_ref()
    }

    pub(super) fn set_channel(&mut self, stream: UnixStream) {
        self.channel = Some(MessageSocket::new(stream));
    }

    /// Sends what the front-end did not take before.
    pub(super) fn flush(&mut self) -> Result<(), ConnectionError> {
        self.frontend.flush()?;
        if let Some(channel) = &mut self.channel {
            channel.flush()?;
        }
        Ok(())
    }

    /// Whether messages for the front-end have to wait.
    pub(super) fn is_congested(&self) -> bool {
        self.frontend.is_congested() || self.channel.as_ref().is_some_and(MessageSocket::is_congested)
    }

    /// Takes the next message of the front-end. A refused request is answered here if the front-end waits for
    /// an acknowledgement; otherwise it ends the connection.
    pub(super) fn next_message(
        &mut self,
        memory: &SiblingMemory,
        queues: u16,
        trace: &mut Option<Trace>,
    ) -> Result<Received, ConnectionError> {
        if let Some(mut message) = self.frontend.receive()? {
            let arrived = Trace::arrived(trace, &message);
            let Header { request, .. } = message.header;
            let is_query = Request::of_frontend(request).is_some_and(Request::is_query);
            let answered = is_query || self.reply_ack && message.header.needs_reply();
            match treat_request(&mut message, memory, queues) {
                Ok(treatment) => {
                    Trace::record(trace, From::Frontend, arrived, Did::Passed(message.payload()));
                    if answered && self.unanswered.len() == UNANSWERED_MAX {
                        return Err(ConnectionError::Flood);
                    }
                    if answered {
                        self.unanswered.push_back(request);
                    }
                    if let Treatment::ProtocolFeatures(bits) = treatment {
                        self.reply_ack = bits & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0;
                    }
                    return Ok(Received::Message(message, treatment));
                }
                Err(refusal) if answered && !is_query && !self.frontend.is_congested() => {
                    log::error!("refused request {request} of the front-end: {refusal}");
                    Trace::record(trace, From::Frontend, arrived, Did::Refused(&refusal));
                    let refused = Message::new(message.header.reply(8), &1u64.to_le_bytes());
                    self.frontend.send(refused.bytes, Vec::new())?;
                    return Ok(Received::Refused);
                }
                Err(refusal) => {
                    Trace::record(trace, From::Frontend, arrived, Did::Refused(&refusal));
                    return Err(refusal.into());
                }
            }
        }
        let Some(channel) = &mut self.channel else { return Ok(Received::Nothing) };
        let Some(message) = channel.receive()? else { return Ok(Received::Nothing) };
        let arrived = Trace::arrived(trace, &message);
        if message.header.is_reply() && message.fds.is_empty() {
            Trace::record(trace, From::Frontend, arrived, Did::Passed(message.payload()));
            Ok(Received::Message(message, Treatment::Relay))
        } else {
            let refusal = MessageRefusal::Direction { request: message.header.request };
            Trace::record(trace, From::Frontend, arrived, Did::Refused(&refusal));
            Err(refusal.into())
        }
    }

    /// Passes a message of the driver to the front-end. A request that the device cannot carry is not
    /// passed on: the answer to it is returned, if the back-end asks for one.
    pub(super) fn deliver(
        &mut self,
        mut message: Message,
        memory: &SiblingMemory,
        queues: u16,
        trace: &mut Option<Trace>,
    ) -> Result<Option<Message>, ConnectionError> {
        let arrived = Trace::arrived(trace, &message);
        if message.header.is_reply() {
            if self.unanswered.front() != Some(&message.header.request) {
                log::warn!(
                    "dropped a reply to request {}: the front-end waits for none",
                    message.header.request
                );
                Trace::record(trace, From::Backend, arrived, Did::Dropped(&"nobody asked for it"));
                return Ok(None);
            }
            self.unanswered.pop_front();
            if let Err(refusal) = treat_reply(&mut message, memory, queues) {
                Trace::record(trace, From::Backend, arrived, Did::Refused(&refusal));
                return Err(refusal.into());
            }
            Trace::record(trace, From::Backend, arrived, Did::Passed(message.payload()));
            self.frontend.send(message.bytes, message.fds)?;
            return Ok(None);
        }
        let refusal = match (treat_backend_request(&message), &mut self.channel) {
            (Ok(()), Some(channel)) => {
                Trace::record(trace, From::Backend, arrived, Did::Passed(message.payload()));
                channel.send(message.bytes, Vec::new())?;
                return Ok(None);
            }
            (Ok(()), None) => MessageRefusal::NoChannel,
            (Err(refusal), _) => refusal,
        };
        log::warn!("refused request {} of the back-end: {refusal}", message.header.request);
        Trace::record(trace, From::Backend, arrived, Did::Refused(&refusal));
        let answer = || Message::new(message.header.reply(8), &1u64.to_le_bytes());
        Ok(message.header.needs_reply().then(answer))
    }
}
