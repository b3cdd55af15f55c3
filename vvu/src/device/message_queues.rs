//! The guest driver's virtqueues: each vhost-user message is one buffer.

use std::io::{Read, Write};
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemory;

use super::Host;
use super::common_config::VirtQueue;
use crate::message_socket::Message;
use crate::spec::vhost_user::{Header, MESSAGE_SIZE_MAX, MessageError};
use crate::spec::virtio::{NO_VECTOR, isr};

/// Why the guest driver's queues cannot be used any longer.
#[derive(Debug, thiserror::Error)]
pub(super) enum QueueError {
    #[error("the virtqueues are not set up")]
    NotSetUp,
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

/// Whether a message was put into the receive queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placed {
    Yes,
    /// The queue has no buffer; the driver notifies the device when it adds one.
    NoBuffer,
    /// The next buffer has only `got` bytes; it stays in the queue.
    TooSmall {
        got: usize,
    },
}

/// The receive and the transmit queue. Every use interrupts the driver if the driver wants that.
pub(super) struct DriverQueues<'d, H> {
    pub(super) host: &'d H,
    pub(super) rx: &'d mut VirtQueue,
    pub(super) tx: &'d mut VirtQueue,
    pub(super) isr: &'d mut u8,
}

impl<H: Host> DriverQueues<'_, H> {
    /// Begins to use the queues. Messages that the driver sent to the last front-end too late are given
    /// back unread: the next front-end would take them for answers to its own requests.
    pub(super) fn start(&mut self) -> Result<(), QueueError> {
        if ![&*self.rx, &*self.tx].iter().all(|queue| queue.queue.is_valid(self.host.memory())) {
            return Err(QueueError::NotSetUp);
        }
        for _ in 0..self.tx.queue.size() {
            let Some((head, _)) = self.read()? else { break };
            self.give_back(head)?;
        }
        Ok(())
    }

    /// Puts `bytes` into the next receive buffer. No bytes at all mark the end of a connection.
    pub(super) fn place(&mut self, bytes: &[u8]) -> Result<Placed, QueueError> {
        let placed = place(&mut self.rx.queue, self.host.memory(), bytes)?;
        if placed == Placed::Yes {
            interrupt(self.host, self.rx, self.isr)?;
        }
        Ok(placed)
    }

    /// Reads the next message of the driver, if there is one, and returns the head of its buffer.
    pub(super) fn read(&mut self) -> Result<Option<(u16, Message)>, QueueError> {
        read(&mut self.tx.queue, self.host.memory())
    }

    /// Gives the buffer of a message that was read back to the driver.
    pub(super) fn give_back(&mut self, head: u16) -> Result<(), QueueError> {
        self.tx.queue.add_used(self.host.memory(), head, 0)?;
        interrupt(self.host, self.tx, self.isr)
    }

    /// Finds out how many buffers of the receive queue a predecessor used after its last commit, and takes note.
    pub(super) fn catch_up_receive(&mut self) -> u16 {
        let count = used_since(&self.rx.queue, self.host.memory());
        advance(&mut self.rx.queue, count, count);
        count
    }

    /// As [`catch_up_receive`](Self::catch_up_receive), for the transmit queue; the first `read` of the buffers were read before the commit.
    pub(super) fn catch_up_transmit(&mut self, read: u16) -> u16 {
        let count = used_since(&self.tx.queue, self.host.memory());
        advance(&mut self.tx.queue, count.saturating_sub(read), count);
        count
    }
}

/// The number of buffers that the used ring has and `queue` does not know of; 0 if the driver changed it to nonsense.
fn used_since(queue: &Queue, memory: &impl GuestMemory) -> u16 {
    if !queue.ready() {
        return 0;
    }
    let used = queue.used_idx(memory, Ordering::Acquire).map_or(queue.next_used(), |used| used.0);
    Some(used.wrapping_sub(queue.next_used())).filter(|count| *count <= queue.size()).unwrap_or(0)
}

/// Moves both positions of `queue` on.
fn advance(queue: &mut Queue, avail: u16, used: u16) {
    queue.set_next_avail(queue.next_avail().wrapping_add(avail));
    queue.set_next_used(queue.next_used().wrapping_add(used));
}

/// Interrupts the driver for a virtqueue if the driver wants that.
fn interrupt<H: Host>(host: &H, queue: &mut VirtQueue, isr: &mut u8) -> Result<(), QueueError> {
    if queue.queue.needs_notification(host.memory())? {
        *isr |= isr::QUEUE;
        if queue.vector != NO_VECTOR {
            host.signal(queue.vector);
        }
    }
    Ok(())
}

fn place<M: GuestMemory>(queue: &mut Queue, memory: &M, bytes: &[u8]) -> Result<Placed, QueueError> {
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

fn read<M: GuestMemory>(queue: &mut Queue, memory: &M) -> Result<Option<(u16, Message)>, QueueError> {
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
    Ok(Some((head, message)))
}
