//! Decides which file descriptors a message needs on its way to the back-end.
//!
//! The front-end attached file descriptors to its messages; the device carries only the bytes. The
//! table of requests says what was attached, and the bridge attaches its counterpart in this VM.

use crate::message_socket::Message;
use crate::spec::addr::{BarOffset, QueueIndex};
use crate::spec::vhost_user::{
    Fds, InflightArea, MemoryRegion, MessageError, Request, VringEventfd, parse_memory_table,
    parse_single_region,
};

/// What to attach to a message for the back-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attachments {
    None,
    /// The file of the sibling's memory, once for each of so many regions.
    Memory(usize),
    /// The eventfd that the device signals for a kick of the queue.
    Kick(QueueIndex),
    /// The eventfd tied to the call doorbell of the queue.
    Call(QueueIndex),
    /// The eventfd tied to the error doorbell of the queue.
    Err(QueueIndex),
    /// One end of a socket pair for requests of the back-end.
    BackendChannel,
}

/// Why a message cannot be passed to the back-end.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum AttachmentError {
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("request {request} is for vhost queue {index}: the device carries {queues}")]
    Queue { request: u32, index: QueueIndex, queues: u16 },
    #[error("memory region of {size:#x} bytes at {offset}: the shared memory BAR has {bar:#x} bytes")]
    OutsideBar { offset: BarOffset, size: u64, bar: u64 },
    #[error("request {request} needs a file descriptor that no vvu device can carry")]
    NotCarried { request: u32 },
    #[error("the message with request {request} came in the wrong direction")]
    Direction { request: u32 },
}

/// What the device can carry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// vhost queues.
    pub(super) queues: u16,
    /// Bytes of the shared memory BAR, or of the window in its place.
    pub(super) shared_memory: u64,
}

impl Attachments {
    /// Returns what a request of the front-end needs. A request that the table does not have needs
    /// nothing: the back-end may know it.
    ///
    /// # Errors
    /// [`AttachmentError`] when the request does not fit the device.
    pub(super) fn of(message: &Message, limits: Limits) -> Result<Self, AttachmentError> {
        let request = message.header.request;
        let payload = message.payload();
        let eventfd = |attach: fn(QueueIndex) -> Self| {
            let VringEventfd { queue, attached } = VringEventfd::parse(request, payload)?;
            let index = QueueIndex(u16::try_from(queue).unwrap_or(u16::MAX));
            if index.0 >= limits.queues {
                return Err(AttachmentError::Queue { request, index, queues: limits.queues });
            }
            Ok(if attached { attach(index) } else { Self::None })
        };
        match Request::of_frontend(request).map_or(Fds::None, |row| row.fds) {
            Fds::None | Fds::OfRegionOptional => Ok(Self::None),
            Fds::PerRegion => {
                let regions = parse_memory_table(payload)?;
                regions.iter().try_for_each(|region| limits.check(region.offset, region.size))?;
                Ok(Self::Memory(regions.len()))
            }
            Fds::OfRegion => {
                let MemoryRegion { offset, size, .. } = parse_single_region(request, payload)?;
                limits.check(offset, size)?;
                Ok(Self::Memory(1))
            }
            // The device has put the in-flight region into the shared memory.
            Fds::OfInflight => {
                let InflightArea { offset, size } = InflightArea::parse(request, payload)?;
                limits.check(offset, size)?;
                Ok(Self::Memory(1))
            }
            Fds::Kick => eventfd(Self::Kick),
            Fds::Call => eventfd(Self::Call),
            Fds::Err => eventfd(Self::Err),
            Fds::BackendChannel => Ok(Self::BackendChannel),
            Fds::Foreign(_) => Err(AttachmentError::NotCarried { request }),
        }
    }
}

impl Limits {
    /// Checks that a piece of memory lies inside the shared memory BAR.
    fn check(self, offset: BarOffset, size: u64) -> Result<(), AttachmentError> {
        match offset.0.checked_add(size) {
            Some(end) if end <= self.shared_memory => Ok(()),
            _ => Err(AttachmentError::OutsideBar { offset, size, bar: self.shared_memory }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::addr::{SiblingGpa, SiblingVa};
    use crate::spec::vhost_user::{Header, memory_table_to_bytes};
    use proptest::prelude::*;

    const LIMITS: Limits = Limits { queues: 4, shared_memory: 0x4000 };

    fn of(request: u32, payload: &[u8]) -> Result<Attachments, AttachmentError> {
        let size = u32::try_from(payload.len()).expect("small payload");
        Attachments::of(&Message::new(Header { request, flags: 1, size }, payload), LIMITS)
    }

    fn region(gpa: u64, offset: u64, size: u64) -> MemoryRegion {
        MemoryRegion { gpa: SiblingGpa(gpa), size, va: SiblingVa(gpa), offset: BarOffset(offset) }
    }

    #[test]
    fn vring_messages_get_the_eventfd_of_their_queue_unless_they_had_none() {
        let vring = |request, value: u64| of(request, &value.to_le_bytes());
        assert_eq!(vring(12, 3), Ok(Attachments::Kick(QueueIndex(3))));
        assert_eq!(vring(13, 2), Ok(Attachments::Call(QueueIndex(2))));
        assert_eq!(vring(14, 0), Ok(Attachments::Err(QueueIndex(0))));
        assert_eq!(vring(13, 0x102), Ok(Attachments::None));
        assert!(matches!(vring(12, 4), Err(AttachmentError::Queue { queues: 4, .. })));
        assert!(matches!(vring(12, 0x104), Err(AttachmentError::Queue { .. })));
        assert!(matches!(of(12, &[0; 7]), Err(AttachmentError::Message(MessageError::PayloadSize { .. }))));
    }

    #[test]
    fn memory_messages_get_the_shared_memory_once_a_region() {
        let table = |regions: &[MemoryRegion]| of(5, &memory_table_to_bytes(regions));
        assert_eq!(
            table(&[region(0, 0, 0x1000), region(0x10000, 0x2000, 0x2000)]),
            Ok(Attachments::Memory(2))
        );
        assert!(matches!(table(&[region(0, 0x3000, 0x2000)]), Err(AttachmentError::OutsideBar { .. })));
        let single = |request, region: MemoryRegion| of(request, &[&[0; 8], &region.to_bytes()[..]].concat());
        assert_eq!(single(37, region(0, 0x3000, 0x1000)), Ok(Attachments::Memory(1)));
        assert!(matches!(single(37, region(0, 0x4000, 0x1000)), Err(AttachmentError::OutsideBar { .. })));
        assert_eq!(single(38, region(0, 0x3000, 0x1000)), Ok(Attachments::None));
        let inflight = |request, size: u64, offset: u64| {
            of(request, &[size.to_le_bytes(), offset.to_le_bytes(), [1; 8]].concat())
        };
        assert_eq!(inflight(32, 0x1000, 0x3000), Ok(Attachments::Memory(1)));
        assert!(matches!(inflight(32, 0x1001, 0x3000), Err(AttachmentError::OutsideBar { .. })));
        assert_eq!(inflight(31, 0, 0), Ok(Attachments::None));
    }

    #[test]
    fn other_messages_go_as_they_are_unless_they_need_what_cannot_be_carried() {
        assert_eq!(of(1, &[]), Ok(Attachments::None));
        assert_eq!(of(1000, &[1, 2, 3]), Ok(Attachments::None));
        assert_eq!(of(21, &[]), Ok(Attachments::BackendChannel));
        for request in [6, 7, 28, 33, 41, 42] {
            assert_eq!(of(request, &[0; 16]), Err(AttachmentError::NotCarried { request }));
        }
    }

    proptest! {
        #[test]
        fn whatever_is_attached_is_within_the_limits(
            request in 0..50u32,
            payload in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            match of(request, &payload) {
                Ok(Attachments::Memory(regions)) => prop_assert!((1..=32).contains(&regions)),
                Ok(Attachments::Kick(i) | Attachments::Call(i) | Attachments::Err(i)) => prop_assert!(i.0 < 4),
                _ => {}
            }
        }
    }
}
