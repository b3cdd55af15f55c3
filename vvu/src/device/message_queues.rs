//! vhost-user messages in virtqueues: one message in one buffer.

use std::io::{Read, Write};

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemory;

use crate::message_socket::Message;
use crate::spec::vhost_user::{Header, MESSAGE_SIZE_MAX, MessageError};

/// Why the guest driver's queues cannot be used any longer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueueError {
    #[error("virtqueue of the guest driver: {0}")]
    Queue(#[from] virtio_queue::Error),
    #[error("buffer of the guest driver: {0}")]
    Buffer(virtio_queue::Error),
    #[error("access to a buffer of the guest driver: {0}")]
    Access(#[from] std::io::Error),
    #[error("message of the guest driver: {0}")]
    Message(#[from] MessageError),
    #[error("message of the guest driver has {got} bytes: its header says {want}")]
    Length { got: usize, want: usize },
}

/// Whether something found a place in the receive queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placed {
    Yes,
    /// There is no buffer; the driver notifies when it adds one.
    NoBuffer,
    /// The next buffer, which stays where it is, has only `got` bytes.
    TooSmall {
        got: usize,
    },
}

/// Puts `bytes` into the next receive buffer. No bytes at all mark the end of a session.
pub(crate) fn place<M: GuestMemory>(
    queue: &mut Queue,
    memory: &M,
    bytes: &[u8],
) -> Result<Placed, QueueError> {
    let chain = match queue.pop_descriptor_chain(memory) {
        Some(chain) => chain,
        None if queue.enable_notification(memory)? => match queue.pop_descriptor_chain(memory) {
            Some(chain) => chain,
            None => return Ok(Placed::NoBuffer),
        },
        None => return Ok(Placed::NoBuffer),
    };
    queue.disable_notification(memory)?;
    let head = chain.head_index();
    if !bytes.is_empty() {
        let mut writer = chain.writer(memory).map_err(QueueError::Buffer)?;
        let got = writer.available_bytes();
        if got < bytes.len() {
            queue.set_next_avail(queue.next_avail().wrapping_sub(1));
            return Ok(Placed::TooSmall { got });
        }
        writer.write_all(bytes)?;
    }
    let length = u32::try_from(bytes.len()).unwrap_or(0);
    queue.add_used(memory, head, length)?;
    Ok(Placed::Yes)
}

/// Takes the next message of the driver, if there is one.
pub(crate) fn take<M: GuestMemory>(queue: &mut Queue, memory: &M) -> Result<Option<Message>, QueueError> {
    let chain = match queue.pop_descriptor_chain(memory) {
        Some(chain) => chain,
        None if queue.enable_notification(memory)? => match queue.pop_descriptor_chain(memory) {
            Some(chain) => chain,
            None => return Ok(None),
        },
        None => return Ok(None),
    };
    let head = chain.head_index();
    let mut reader = chain.reader(memory).map_err(QueueError::Buffer)?;
    let got = reader.available_bytes();
    let mut bytes = vec![0; got.min(MESSAGE_SIZE_MAX)];
    reader.read_exact(&mut bytes)?;
    let header = Header::parse(&bytes)?;
    let message = Message { header, fds: Vec::new(), bytes };
    let want = message.bytes.len() - message.payload().len() + header.payload_size();
    if got != want {
        return Err(QueueError::Length { got, want });
    }
    queue.add_used(memory, head, 0)?;
    Ok(Some(message))
}
