//! Which file descriptors a message of the front-end had, and so needs again.

use vhost::vhost_user::message::FrontendReq;

use crate::message_socket::Message;
use crate::spec::addr::{BarOffset, QueueIndex};
use crate::spec::vhost_user::{
    InflightArea, MemoryRegion, MessageError, VRING_INDEX_MASK, VRING_NO_FD, parse_memory_table,
    parse_single_region, parse_u64,
};

/// What to attach to a message on its way to the back-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attachments {
    None,
    /// The shared memory, once for each of so many regions.
    Memory(usize),
    /// The eventfd that the device signals for a kick of a queue.
    Kick(QueueIndex),
    /// The eventfd tied to the call doorbell of a queue.
    Call(QueueIndex),
    /// The eventfd tied to the error doorbell of a queue.
    Err(QueueIndex),
    /// One end of a socket pair for requests of the back-end.
    BackendChannel,
}

/// Why a message cannot be given to the back-end.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("request {request} for vhost queue {index}: the device carries {queues}")]
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
    /// Bytes of the shared memory BAR.
    pub(super) shared_memory: u64,
}

impl Attachments {
    /// What goes with a request of the front-end.
    pub(super) fn of(message: &Message, limits: Limits) -> Result<Self, Refusal> {
        use FrontendReq as Req;
        let request = message.header.request;
        let payload = message.payload();
        let vring = |attach: fn(QueueIndex) -> Self| {
            let value = parse_u64(request, payload)?;
            let index = QueueIndex(u16::try_from(value & VRING_INDEX_MASK).unwrap_or(u16::MAX));
            match value & VRING_NO_FD {
                _ if index.0 >= limits.queues => {
                    Err(Refusal::Queue { request, index, queues: limits.queues })
                }
                0 => Ok(attach(index)),
                _ => Ok(Self::None),
            }
        };
        // A request that this crate has no name for needs no descriptor that is known of.
        match Req::try_from(request) {
            Ok(Req::SET_MEM_TABLE) => {
                let regions = parse_memory_table(payload)?;
                regions.iter().try_for_each(|region| limits.check(region.offset, region.size))?;
                Ok(Self::Memory(regions.len()))
            }
            Ok(Req::ADD_MEM_REG) => {
                let MemoryRegion { offset, size, .. } = parse_single_region(request, payload)?;
                limits.check(offset, size)?;
                Ok(Self::Memory(1))
            }
            // The device has put the in-flight region into the shared memory.
            Ok(Req::SET_INFLIGHT_FD) => {
                let InflightArea { offset, size } = InflightArea::parse(request, payload)?;
                limits.check(offset, size)?;
                Ok(Self::Memory(1))
            }
            Ok(Req::SET_VRING_KICK) => vring(Self::Kick),
            Ok(Req::SET_VRING_CALL) => vring(Self::Call),
            Ok(Req::SET_VRING_ERR) => vring(Self::Err),
            Ok(Req::SET_BACKEND_REQ_FD) => Ok(Self::BackendChannel),
            Ok(
                Req::SET_LOG_BASE
                | Req::SET_LOG_FD
                | Req::GPU_SET_SOCKET
                | Req::POSTCOPY_ADVISE
                | Req::GET_SHARED_OBJECT
                | Req::SET_DEVICE_STATE_FD,
            ) => Err(Refusal::NotCarried { request }),
            _ => Ok(Self::None),
        }
    }
}

impl Limits {
    /// Checks that a piece of memory lies inside the shared memory BAR.
    fn check(self, offset: BarOffset, size: u64) -> Result<(), Refusal> {
        match offset.0.checked_add(size) {
            Some(end) if end <= self.shared_memory => Ok(()),
            _ => Err(Refusal::OutsideBar { offset, size, bar: self.shared_memory }),
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

    fn of(request: u32, payload: &[u8]) -> Result<Attachments, Refusal> {
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
        assert!(matches!(vring(12, 4), Err(Refusal::Queue { queues: 4, .. })));
        assert!(matches!(vring(12, 0x104), Err(Refusal::Queue { .. })));
        assert!(matches!(of(12, &[0; 7]), Err(Refusal::Message(MessageError::PayloadSize { .. }))));
    }

    #[test]
    fn memory_messages_get_the_shared_memory_once_a_region() {
        let table = |regions: &[MemoryRegion]| of(5, &memory_table_to_bytes(regions));
        assert_eq!(
            table(&[region(0, 0, 0x1000), region(0x10000, 0x2000, 0x2000)]),
            Ok(Attachments::Memory(2))
        );
        assert!(matches!(table(&[region(0, 0x3000, 0x2000)]), Err(Refusal::OutsideBar { .. })));
        let single = |request, region: MemoryRegion| of(request, &[&[0; 8], &region.to_bytes()[..]].concat());
        assert_eq!(single(37, region(0, 0x3000, 0x1000)), Ok(Attachments::Memory(1)));
        assert!(matches!(single(37, region(0, 0x4000, 0x1000)), Err(Refusal::OutsideBar { .. })));
        assert_eq!(single(38, region(0, 0x3000, 0x1000)), Ok(Attachments::None));
        let inflight = |request, size: u64, offset: u64| {
            of(request, &[size.to_le_bytes(), offset.to_le_bytes(), [1; 8]].concat())
        };
        assert_eq!(inflight(32, 0x1000, 0x3000), Ok(Attachments::Memory(1)));
        assert!(matches!(inflight(32, 0x1001, 0x3000), Err(Refusal::OutsideBar { .. })));
        assert_eq!(inflight(31, 0, 0), Ok(Attachments::None));
    }

    #[test]
    fn other_messages_go_as_they_are_unless_they_need_what_cannot_be_carried() {
        assert_eq!(of(1, &[]), Ok(Attachments::None));
        assert_eq!(of(1000, &[1, 2, 3]), Ok(Attachments::None));
        assert_eq!(of(21, &[]), Ok(Attachments::BackendChannel));
        for request in [6, 7, 28, 33, 41, 42] {
            assert_eq!(of(request, &[0; 16]), Err(Refusal::NotCarried { request }));
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
