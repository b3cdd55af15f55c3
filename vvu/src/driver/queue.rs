//! The driver's side of a split virtqueue (virtio 1.2, 2.7). Descriptor i always owns buffer i.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, VolatileMemory, VolatileMemoryError};

use crate::pci::{DeviceError, DmaBuffer, PciDevice};
use crate::spec::addr::Iova;
use crate::spec::vhost_user::MESSAGE_SIZE_MAX;

/// Bytes of a buffer: one whole message.
const BUFFER_SIZE: usize = MESSAGE_SIZE_MAX;
const DESCRIPTOR_SIZE: usize = 16;
const USED_ELEMENT_SIZE: usize = 8;
/// Descriptor flag: the device writes the buffer (virtio 1.2, 2.7.5).
const DESCRIPTOR_WRITE: u16 = 2;
const INDEX: usize = 2;
const RING: usize = 4;

/// The device broke a rule of virtqueues (virtio 1.2, 2.7).
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The used index ran ahead of what the driver made available.
    #[error("the device used {got} buffers, but has only {have}")]
    UsedIndex {
        /// Buffers that the device claims to have used.
        got: u16,
        /// Buffers that the device has.
        have: u16,
    },
    /// The device used a buffer that it does not have.
    #[error("the device used buffer {id}, which it does not have")]
    UsedBuffer {
        /// Number of the buffer.
        id: u32,
    },
    /// The device claims to have written more bytes than the buffer holds.
    #[error("the device wrote {got} bytes into a buffer of {BUFFER_SIZE}")]
    UsedLength {
        /// Bytes that the device claims to have written.
        got: u32,
    },
    /// The queue's own memory could not be accessed.
    #[error("queue memory: {0}")]
    Memory(#[from] VolatileMemoryError),
}

/// A buffer that the device is done with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Used {
    /// Number of the buffer.
    pub(super) id: u16,
    /// Bytes that the device wrote.
    pub(super) len: u32,
}

/// A split virtqueue in memory that the device can reach.
#[derive(Debug)]
pub(super) struct Queue {
    dma: DmaBuffer,
    size: u16,
    available: usize,
    used: usize,
    buffers: usize,
    next_available: u16,
    next_used: u16,
    /// Buffers that the device does not have.
    free: Vec<u16>,
    /// For each buffer, whether the device has it.
    posted: Vec<bool>,
}

impl Queue {
    /// Allocates a queue of `size` descriptors, a power of two.
    pub(super) fn new<D: PciDevice>(device: &D, size: u16) -> Result<Self, DeviceError> {
        let count = usize::from(size);
        let available = DESCRIPTOR_SIZE * count;
        let used = (available + RING + 2 * count + 2).next_multiple_of(4);
        let buffers = (used + RING + USED_ELEMENT_SIZE * count + 2).next_multiple_of(BUFFER_SIZE);
        Ok(Self {
            dma: device.allocate_dma(buffers + BUFFER_SIZE * count)?,
            size,
            available,
            used,
            buffers,
            next_available: 0,
            next_used: 0,
            free: (0..size).rev().collect(),
            posted: vec![false; count],
        })
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Returns the addresses of the descriptors, the available ring and the used ring.
    pub(super) fn addresses(&self) -> [Iova; 3] {
        [0, self.available, self.used]
            .map(|offset| Iova(self.dma.iova.0 + u64::try_from(offset).unwrap_or(u64::MAX)))
    }

    pub(super) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Gives every free buffer to the device to write to.
    pub(super) fn post_all(&mut self) -> Result<(), QueueError> {
        while let Some(id) = self.free.pop() {
            self.post(id, BUFFER_SIZE, DESCRIPTOR_WRITE)?;
        }
        Ok(())
    }

    /// Gives `bytes`, at most one buffer, to the device to read; false if every buffer is in use.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<bool, QueueError> {
        let Some(id) = self.free.pop() else { return Ok(false) };
        self.dma.memory.as_volatile_slice().write_slice(bytes, self.buffer(id))?;
        self.post(id, bytes.len(), 0)?;
        Ok(true)
    }

    /// Takes back the next buffer that the device is done with.
    pub(super) fn pop(&mut self) -> Result<Option<Used>, QueueError> {
        let memory = self.dma.memory.as_volatile_slice();
        let index = u16::from_le(memory.load(self.used + INDEX, Ordering::Acquire)?);
        let got = index.wrapping_sub(self.next_used);
        let have = self.next_available.wrapping_sub(self.next_used);
        if got > have {
            return Err(QueueError::UsedIndex { got, have });
        }
        if got == 0 {
            return Ok(None);
        }
        let element = self.used + RING + USED_ELEMENT_SIZE * usize::from(self.next_used % self.size);
        let id = u32::from_le(memory.load(element, Ordering::Relaxed)?);
        let len = u32::from_le(memory.load(element + 4, Ordering::Relaxed)?);
        let number = u16::try_from(id).ok();
        let posted = number.and_then(|number| self.posted.get_mut(usize::from(number)));
        let (Some(number), Some(true)) = (number, posted.map(std::mem::take)) else {
            return Err(QueueError::UsedBuffer { id });
        };
        self.next_used = self.next_used.wrapping_add(1);
        self.free.push(number);
        Ok(Some(Used { id: number, len }))
    }

    /// Copies what the device wrote out of a buffer that was just [popped](Self::pop).
    pub(super) fn read(&self, used: Used) -> Result<Vec<u8>, QueueError> {
        let len = usize::try_from(used.len).ok().filter(|len| *len <= BUFFER_SIZE);
        let mut bytes = vec![0; len.ok_or(QueueError::UsedLength { got: used.len })?];
        self.dma.memory.as_volatile_slice().read_slice(&mut bytes, self.buffer(used.id))?;
        Ok(bytes)
    }

    fn buffer(&self, id: u16) -> usize {
        self.buffers + BUFFER_SIZE * usize::from(id)
    }

    fn post(&mut self, id: u16, len: usize, flags: u16) -> Result<(), QueueError> {
        let memory = self.dma.memory.as_volatile_slice();
        let mut descriptor = [0; DESCRIPTOR_SIZE];
        let buffer = u64::try_from(self.buffer(id)).unwrap_or(u64::MAX);
        descriptor[..8].copy_from_slice(&(self.dma.iova.0 + buffer).to_le_bytes());
        descriptor[8..12].copy_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        memory.write_slice(&descriptor, DESCRIPTOR_SIZE * usize::from(id))?;
        let slot = self.available + RING + 2 * usize::from(self.next_available % self.size);
        memory.store(id.to_le(), slot, Ordering::Relaxed)?;
        self.next_available = self.next_available.wrapping_add(1);
        // The device sees the index only after the descriptor and the ring entry.
        memory.store(self.next_available.to_le(), self.available + INDEX, Ordering::Release)?;
        self.posted[usize::from(id)] = true;
        Ok(())
    }
}
