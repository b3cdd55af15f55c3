//! Decides what the device does with each vhost-user message: relay it, relay it changed, or refuse it.
//!
//! The table of requests ([`crate::spec::vhost_user::requests`]) says what belongs to each message.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{AddressFamily, SocketType, sockopt};

use super::sibling_memory::{MemoryError, SiblingMemory};
use super::vrings::{Eventfd, EventfdError, Notification};
use crate::message_socket::Message;
use crate::spec::addr::QueueIndex;
use crate::spec::vhost_user::{
    CARRIED_PROTOCOL_FEATURES, Carried, Fds, FrontendReq, InflightArea, MASKED_FEATURES, MessageError,
    Payload, Request, VringEventfd, parse_memory_table, parse_single_region, parse_u64,
};

/// What a relayed message changes in the device.
#[derive(Debug)]
pub(super) enum Treatment {
    /// Nothing.
    Relay,
    /// The front-end accepted these protocol features.
    ProtocolFeatures(u64),
    /// The front-end replaced an eventfd of a queue.
    Eventfd(QueueIndex, Notification, Option<Eventfd>),
    /// The front-end stopped a queue: its kick eventfd is no longer used.
    Stop(QueueIndex),
    /// The front-end set the socket for requests of the back-end.
    BackendChannel(UnixStream),
}

/// Why the device does not relay a message.
#[derive(Debug, thiserror::Error)]
pub(super) enum MessageRefusal {
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Eventfd(#[from] EventfdError),
    #[error("{got} file descriptors came with request {request}: want {want}")]
    Fds { request: u32, got: usize, want: usize },
    #[error(
        "request {request} is about queue {got}: the device has {queues}; start vvu proxy with more --queues"
    )]
    Queue { request: u32, got: u32, queues: u16 },
    #[error("a virtio-vhost-user device cannot carry request {request} ({name}): {why}")]
    NotCarried { request: u32, name: &'static str, why: &'static str },
    #[error("the message with request {request} came in the wrong direction")]
    Direction { request: u32 },
    #[error("the file descriptor of SET_BACKEND_REQ_FD is not a UNIX stream socket")]
    Channel,
    #[error(
        "the back-end has no channel to the front-end: the front-end sent no SET_BACKEND_REQ_FD, or closed it"
    )]
    NoChannel,
    #[error("the back-end sent many requests without waiting for answers")]
    Flood,
}

/// Examines a request of the front-end: checks its regions against `memory` and its queue index against
/// `queues`, and clears the feature bits that the device cannot carry. File descriptors that the device
/// has no use for stay in the message.
///
/// # Errors
/// [`MessageRefusal`] when the request cannot be relayed.
pub(super) fn treat_request(
    message: &mut Message,
    memory: &SiblingMemory,
    queues: u16,
) -> Result<Treatment, MessageRefusal> {
    let code = message.header.request;
    if message.header.is_reply() {
        return Err(MessageRefusal::Direction { request: code });
    }
    let row = carried(code, Request::of_frontend(code))?;
    match row.fds {
        Fds::None => {
            want_fds(message, 0)?;
            treat_plain(message, row, queues)
        }
        Fds::PerRegion => {
            let regions = parse_memory_table(message.payload())?;
            want_fds(message, regions.len())?;
            for (region, fd) in regions.iter().zip(&message.fds) {
                memory.check(region, fd)?;
            }
            Ok(Treatment::Relay)
        }
        Fds::OfRegion => {
            let region = parse_single_region(code, message.payload())?;
            memory.check(&region, only_fd(message)?)?;
            Ok(Treatment::Relay)
        }
        Fds::OfRegionOptional => {
            parse_single_region(code, message.payload())?;
            want_fds(message, message.fds.len().min(1))?;
            Ok(Treatment::Relay)
        }
        Fds::OfInflight => {
            let area = InflightArea::parse(code, message.payload())?;
            memory.check_inflight(area, only_fd(message)?)?;
            Ok(Treatment::Relay)
        }
        Fds::Kick => treat_eventfd(message, queues, Notification::Kick),
        Fds::Call => treat_eventfd(message, queues, Notification::Call),
        Fds::Err => treat_eventfd(message, queues, Notification::Err),
        Fds::BackendChannel => {
            let fd = only_fd(message)?;
            let is_stream = sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX)
                && sockopt::socket_type(fd) == Ok(SocketType::STREAM);
            let fd = if is_stream { message.fds.pop() } else { None };
            fd.map(|fd| Treatment::BackendChannel(fd.into())).ok_or(MessageRefusal::Channel)
        }
        Fds::Foreign(why) => Err(MessageRefusal::NotCarried { request: code, name: row.name, why }),
    }
}

/// A request without file descriptors.
fn treat_plain(message: &mut Message, row: &Request, queues: u16) -> Result<Treatment, MessageRefusal> {
    let queue = row.payload.queue(row.code, message.payload())?;
    match (row.payload, queue.map(|index| queue_index(row.code, index, queues)).transpose()?) {
        (Payload::Features, _) => {
            mask_u64(message, !MASKED_FEATURES)?;
            Ok(Treatment::Relay)
        }
        (Payload::ProtocolFeatures, _) => {
            Ok(Treatment::ProtocolFeatures(mask_u64(message, CARRIED_PROTOCOL_FEATURES.bits())?))
        }
        (_, Some(queue)) if row.code == FrontendReq::GET_VRING_BASE as u32 => Ok(Treatment::Stop(queue)),
        _ => Ok(Treatment::Relay),
    }
}

/// `SET_VRING_KICK`, `SET_VRING_CALL` and `SET_VRING_ERR`.
fn treat_eventfd(
    message: &mut Message,
    queues: u16,
    which: Notification,
) -> Result<Treatment, MessageRefusal> {
    let code = message.header.request;
    let VringEventfd { queue, attached } = VringEventfd::parse(code, message.payload())?;
    let queue = queue_index(code, queue, queues)?;
    let eventfd = if attached {
        Eventfd::check(only_fd(message)?)?;
        message.fds.pop().map(Eventfd::new)
    } else {
        want_fds(message, 0)?;
        None
    };
    Ok(Treatment::Eventfd(queue, which, eventfd))
}

/// Changes a reply of the back-end: clears the feature bits that the device cannot carry, limits the
/// number of queues to `queues`, and moves the in-flight region into `memory`, which both sides map.
///
/// # Errors
/// [`MessageRefusal`] when the reply is malformed or there is no room for the in-flight region.
pub(super) fn treat_reply(
    message: &mut Message,
    memory: &SiblingMemory,
    queues: u16,
) -> Result<(), MessageRefusal> {
    let code = message.header.request;
    let Some(row) = Request::of_frontend(code) else { return Ok(()) };
    match row.reply_payload() {
        Payload::Features => {
            mask_u64(message, !MASKED_FEATURES)?;
        }
        Payload::ProtocolFeatures => {
            mask_u64(message, CARRIED_PROTOCOL_FEATURES.bits())?;
        }
        Payload::QueueCount => {
            let number = parse_u64(code, message.payload())?;
            set_u64(message, number.min(u64::from(queues)));
        }
        Payload::Inflight => {
            // A size of 0 says that the back-end has no region.
            let size = InflightArea::parse(code, message.payload())?.size;
            if size != 0 {
                memory.allocate_inflight(size)?.write(message.payload_mut());
                message.fds = vec![memory.file().try_clone().map_err(MemoryError::File)?.into()];
            }
        }
        _ => {}
    }
    Ok(())
}

/// Examines a request of the back-end to the front-end.
///
/// # Errors
/// [`MessageRefusal::NotCarried`].
pub(super) fn treat_backend_request(message: &Message) -> Result<(), MessageRefusal> {
    let code = message.header.request;
    carried(code, Request::of_backend(code)).map(|_| ())
}

/// The row of a request, if the device carries it.
fn carried(code: u32, row: Option<&'static Request>) -> Result<&'static Request, MessageRefusal> {
    let (name, why) = match row {
        None => ("unknown", "it is not in the vhost-user specification"),
        Some(Request { name, carried: Carried::No(why), .. }) => (*name, *why),
        Some(row) => return Ok(row),
    };
    Err(MessageRefusal::NotCarried { request: code, name, why })
}

fn queue_index(request: u32, got: u32, queues: u16) -> Result<QueueIndex, MessageRefusal> {
    let index = u16::try_from(got).ok().filter(|index| *index < queues);
    index.map(QueueIndex).ok_or(MessageRefusal::Queue { request, got, queues })
}

fn want_fds(message: &Message, want: usize) -> Result<(), MessageRefusal> {
    match message.fds.len() {
        got if got == want => Ok(()),
        got => Err(MessageRefusal::Fds { request: message.header.request, got, want }),
    }
}

fn only_fd(message: &Message) -> Result<&OwnedFd, MessageRefusal> {
    match message.fds.as_slice() {
        [fd] => Ok(fd),
        fds => Err(MessageRefusal::Fds { request: message.header.request, got: fds.len(), want: 1 }),
    }
}

/// Clears the bits outside `mask` in a payload that is one u64; returns the bits that are left.
fn mask_u64(message: &mut Message, mask: u64) -> Result<u64, MessageError> {
    let value = parse_u64(message.header.request, message.payload())? & mask;
    set_u64(message, value);
    Ok(value)
}

fn set_u64(message: &mut Message, value: u64) {
    message.payload_mut().copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
#[path = "treatment_test.rs"]
mod tests;
