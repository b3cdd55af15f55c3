//! What the proxy does with each vhost-user message: what it takes out of it, what it changes, and
//! what it refuses.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{AddressFamily, SocketType, sockopt};

use super::sibling_memory::{MemoryError, SiblingMemory};
use super::vrings::{Eventfd, EventfdError, Notification};
use crate::message_socket::Message;
use crate::spec::addr::QueueIndex;
use crate::spec::vhost_user::{
    BackendReq, CARRIED_PROTOCOL_FEATURES, FrontendReq, InflightArea, MASKED_FEATURES, MessageError,
    VRING_INDEX_MASK, VRING_NO_FD, parse_memory_table, parse_single_region, parse_u64,
};

/// What a message changes in the device, besides being relayed.
#[derive(Debug)]
pub(crate) enum Treatment {
    /// Nothing.
    Relay,
    /// The front-end accepted these protocol features, of those it was offered.
    ProtocolFeatures(u64),
    /// The eventfd of a queue is to be replaced.
    Eventfd(QueueIndex, Notification, Option<Eventfd>),
    /// A queue stops: its kicks mean nothing any longer.
    Stop(QueueIndex),
    /// The back-end can send requests through this socket.
    BackendChannel(UnixStream),
}

/// Why a message is not relayed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
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
    Queue { request: u32, got: u64, queues: u16 },
    #[error("a virtio-vhost-user device cannot carry request {request}")]
    NotCarried { request: u32 },
    #[error("request {request} has the wrong direction")]
    Direction { request: u32 },
    #[error("the file descriptor of SET_BACKEND_REQ_FD is no UNIX stream socket")]
    Channel,
    #[error("the back-end has no channel to the front-end: SET_BACKEND_REQ_FD never came")]
    NoChannel,
}

/// Whether the back-end answers `request` whatever its flags are.
pub(crate) fn is_query(request: u32) -> bool {
    use FrontendReq as R;
    [
        R::GET_FEATURES,
        R::GET_PROTOCOL_FEATURES,
        R::GET_VRING_BASE,
        R::GET_QUEUE_NUM,
        R::GET_CONFIG,
        R::GET_MAX_MEM_SLOTS,
        R::GET_STATUS,
        R::CREATE_CRYPTO_SESSION,
        R::GET_INFLIGHT_FD,
    ]
    .iter()
    .any(|query| *query as u32 == request)
}

/// Examines a request of the front-end, takes its file descriptors and changes what the device cannot
/// carry. The region check is against `memory`, queue indices against `queues`.
pub(crate) fn treat_request(
    message: &mut Message,
    memory: &SiblingMemory,
    queues: u16,
) -> Result<Treatment, Refusal> {
    use FrontendReq as R;
    let code = message.header.request;
    if message.header.is_reply() {
        return Err(Refusal::Direction { request: code });
    }
    let fds = std::mem::take(&mut message.fds);
    let request = FrontendReq::try_from(code).map_err(|_| Refusal::NotCarried { request: code })?;
    match request {
        R::SET_MEM_TABLE => {
            let regions = parse_memory_table(message.payload())?;
            want_fds(code, &fds, regions.len())?;
            for (region, fd) in regions.iter().zip(&fds) {
                memory.check(region, fd)?;
            }
            Ok(Treatment::Relay)
        }
        R::ADD_MEM_REG => {
            let region = parse_single_region(code, message.payload())?;
            want_fds(code, &fds, 1)?;
            fds.iter().try_for_each(|fd| memory.check(&region, fd))?;
            Ok(Treatment::Relay)
        }
        R::REM_MEM_REG => {
            // The file descriptor may be there or not; either way it says nothing new.
            parse_single_region(code, message.payload())?;
            want_fds(code, &fds, fds.len().min(1))?;
            Ok(Treatment::Relay)
        }
        R::SET_VRING_KICK => treat_eventfd(message, fds, queues, Notification::Kick),
        R::SET_VRING_CALL => treat_eventfd(message, fds, queues, Notification::Call),
        R::SET_VRING_ERR => treat_eventfd(message, fds, queues, Notification::Err),
        R::SET_BACKEND_REQ_FD => {
            let [fd] = take_fds(code, fds)?;
            let is_stream = sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX)
                && sockopt::socket_type(&fd) == Ok(SocketType::STREAM);
            if is_stream { Ok(Treatment::BackendChannel(fd.into())) } else { Err(Refusal::Channel) }
        }
        R::SET_INFLIGHT_FD => {
            let area = InflightArea::parse(code, message.payload())?;
            let [fd] = take_fds(code, fds)?;
            memory.check_inflight(area, &fd)?;
            Ok(Treatment::Relay)
        }
        R::SET_LOG_BASE
        | R::SET_LOG_FD
        | R::POSTCOPY_ADVISE
        | R::POSTCOPY_LISTEN
        | R::POSTCOPY_END
        | R::GPU_SET_SOCKET
        | R::VRING_KICK
        | R::GET_SHARED_OBJECT
        | R::SET_DEVICE_STATE_FD
        | R::CHECK_DEVICE_STATE
        | R::GET_SHMEM_CONFIG => Err(Refusal::NotCarried { request: code }),
        _ => {
            want_fds(code, &fds, 0)?;
            treat_plain(message, request, queues)
        }
    }
}

/// Requests that have no file descriptors.
fn treat_plain(message: &mut Message, request: FrontendReq, queues: u16) -> Result<Treatment, Refusal> {
    use FrontendReq as R;
    let code = message.header.request;
    match request {
        R::SET_FEATURES => {
            mask_u64(message, !MASKED_FEATURES)?;
            Ok(Treatment::Relay)
        }
        R::SET_PROTOCOL_FEATURES => {
            Ok(Treatment::ProtocolFeatures(mask_u64(message, CARRIED_PROTOCOL_FEATURES.bits())?))
        }
        R::SET_VRING_NUM | R::SET_VRING_BASE | R::SET_VRING_ENABLE | R::SET_VRING_ENDIAN => {
            // Index and value, 32 bits each.
            queue_index(code, parse_u64(code, message.payload())? & u64::from(u32::MAX), queues)?;
            Ok(Treatment::Relay)
        }
        R::GET_VRING_BASE => {
            let index = parse_u64(code, message.payload())? & u64::from(u32::MAX);
            Ok(Treatment::Stop(queue_index(code, index, queues)?))
        }
        R::SET_VRING_ADDR => {
            let size = MessageError::PayloadSize { request: code, got: message.payload().len(), want: 40 };
            let (index, rest) = message.payload().split_first_chunk::<4>().ok_or(size)?;
            if rest.len() != 36 {
                return Err(size.into());
            }
            queue_index(code, u64::from(u32::from_le_bytes(*index)), queues)?;
            Ok(Treatment::Relay)
        }
        _ => Ok(Treatment::Relay),
    }
}

/// `SET_VRING_KICK`, `SET_VRING_CALL` and `SET_VRING_ERR`.
fn treat_eventfd(
    message: &Message,
    fds: Vec<OwnedFd>,
    queues: u16,
    which: Notification,
) -> Result<Treatment, Refusal> {
    let code = message.header.request;
    let value = parse_u64(code, message.payload())?;
    let index = queue_index(code, value & VRING_INDEX_MASK, queues)?;
    let eventfd = if value & VRING_NO_FD == 0 {
        let [fd] = take_fds(code, fds)?;
        Some(Eventfd::new(fd)?)
    } else {
        want_fds(code, &fds, 0)?;
        None
    };
    Ok(Treatment::Eventfd(index, which, eventfd))
}

/// Changes a reply of the back-end so that the front-end asks for nothing that the device cannot carry,
/// and puts the back-end's in-flight region where both sides can map it.
pub(crate) fn treat_reply(message: &mut Message, memory: &SiblingMemory, queues: u16) -> Result<(), Refusal> {
    let code = message.header.request;
    match FrontendReq::try_from(message.header.request) {
        Ok(FrontendReq::GET_FEATURES) => {
            mask_u64(message, !MASKED_FEATURES)?;
        }
        Ok(FrontendReq::GET_PROTOCOL_FEATURES) => {
            mask_u64(message, CARRIED_PROTOCOL_FEATURES.bits())?;
        }
        Ok(FrontendReq::GET_QUEUE_NUM) => {
            let number = parse_u64(code, message.payload())?;
            set_u64(message, number.min(u64::from(queues)));
        }
        Ok(FrontendReq::GET_INFLIGHT_FD) => {
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
pub(crate) fn treat_backend_request(message: &Message) -> Result<(), Refusal> {
    let request = message.header.request;
    match BackendReq::try_from(request) {
        Ok(BackendReq::IOTLB_MSG | BackendReq::CONFIG_CHANGE_MSG) => Ok(()),
        _ => Err(Refusal::NotCarried { request }),
    }
}

fn queue_index(request: u32, got: u64, queues: u16) -> Result<QueueIndex, Refusal> {
    let index = u16::try_from(got).ok().filter(|index| *index < queues);
    index.map(QueueIndex).ok_or(Refusal::Queue { request, got, queues })
}

fn want_fds(request: u32, fds: &[OwnedFd], want: usize) -> Result<(), Refusal> {
    if fds.len() == want { Ok(()) } else { Err(Refusal::Fds { request, got: fds.len(), want }) }
}

fn take_fds<const N: usize>(request: u32, fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], Refusal> {
    fds.try_into().map_err(|fds: Vec<_>| Refusal::Fds { request, got: fds.len(), want: N })
}

/// Clears the bits outside `mask` in a payload that is one u64; returns what is left.
fn mask_u64(message: &mut Message, mask: u64) -> Result<u64, MessageError> {
    let value = parse_u64(message.header.request, message.payload())? & mask;
    set_u64(message, value);
    Ok(value)
}

fn set_u64(message: &mut Message, value: u64) {
    message.payload_mut().copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::addr::{BarOffset, SiblingGpa, SiblingVa};
    use crate::spec::vhost_user::{Header, MemoryRegion, memory_table_to_bytes};
    use proptest::prelude::*;
    use rustix::event::{EventfdFlags, eventfd};

    const QUEUES: u16 = 16;

    fn memory() -> SiblingMemory {
        SiblingMemory::create(0x10000).expect("memory")
    }

    fn message(request: FrontendReq, payload: &[u8], fds: Vec<OwnedFd>) -> Message {
        let size = u32::try_from(payload.len()).expect("small");
        let mut message = Message::new(Header { request: request as u32, flags: 1, size }, payload);
        message.fds = fds;
        message
    }

    fn event() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd")
    }

    fn treat(request: FrontendReq, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Treatment, Refusal> {
        treat_request(&mut message(request, payload, fds), &memory(), QUEUES)
    }

    #[test]
    fn every_request_without_a_place_on_the_wire_is_refused() {
        for request in [6, 7, 28, 29, 30, 33, 35, 41, 42, 43, 44] {
            let request = FrontendReq::try_from(request).expect("known");
            assert!(
                matches!(treat(request, &[0; 8], vec![]), Err(Refusal::NotCarried { .. })),
                "{request:?}"
            );
        }
        let mut unknown = message(FrontendReq::SET_OWNER, &[], vec![]);
        for code in [0, 45, u32::MAX] {
            unknown.header.request = code;
            assert!(matches!(
                treat_request(&mut unknown, &memory(), QUEUES),
                Err(Refusal::NotCarried { .. })
            ));
        }
    }

    #[test]
    fn a_reply_is_no_request() {
        let mut reply = message(FrontendReq::SET_OWNER, &[], vec![]);
        reply.header = reply.header.reply(0);
        assert!(matches!(treat_request(&mut reply, &memory(), QUEUES), Err(Refusal::Direction { .. })));
    }

    #[test]
    fn file_descriptors_are_there_when_and_only_when_they_belong() {
        use FrontendReq as R;
        assert!(matches!(treat(R::SET_OWNER, &[], vec![event()]), Err(Refusal::Fds { got: 1, want: 0, .. })));
        assert!(matches!(
            treat(R::SET_VRING_KICK, &[0; 8], vec![]),
            Err(Refusal::Fds { got: 0, want: 1, .. })
        ));
        let two = vec![event(), event()];
        assert!(matches!(treat(R::SET_VRING_CALL, &[0; 8], two), Err(Refusal::Fds { got: 2, want: 1, .. })));
        let none = VRING_NO_FD.to_le_bytes();
        assert!(matches!(
            treat(R::SET_VRING_CALL, &none, vec![event()]),
            Err(Refusal::Fds { got: 1, want: 0, .. })
        ));
        assert!(matches!(
            treat(R::SET_VRING_CALL, &none, vec![]),
            Ok(Treatment::Eventfd(QueueIndex(0), Notification::Call, None))
        ));
        assert!(matches!(
            treat(R::SET_VRING_ERR, &[3, 0, 0, 0, 0, 0, 0, 0], vec![event()]),
            Ok(Treatment::Eventfd(QueueIndex(3), Notification::Err, Some(_)))
        ));
    }

    #[test]
    fn queues_the_device_does_not_have_are_refused() {
        use FrontendReq as R;
        for request in [R::SET_VRING_NUM, R::SET_VRING_BASE, R::GET_VRING_BASE, R::SET_VRING_ENABLE] {
            let refused = treat(request, &[16, 0, 0, 0, 0, 0, 0, 0], vec![]);
            assert!(matches!(refused, Err(Refusal::Queue { got: 16, .. })), "{request:?}");
        }
        let mut address = [0; 40];
        address[3] = 1;
        assert!(matches!(treat(R::SET_VRING_ADDR, &address, vec![]), Err(Refusal::Queue { .. })));
        assert!(matches!(treat(R::SET_VRING_ADDR, &address[..39], vec![]), Err(Refusal::Message(_))));
        let kick = treat(R::SET_VRING_KICK, &[16, 0, 0, 0, 0, 0, 0, 0], vec![event()]);
        assert!(matches!(kick, Err(Refusal::Queue { .. })));
    }

    #[test]
    fn memory_is_accepted_only_from_the_sibling_memory_file() {
        let memory = memory();
        let region = |offset, size| MemoryRegion {
            gpa: SiblingGpa(offset),
            size,
            va: SiblingVa(offset),
            offset: BarOffset(offset),
        };
        let own = || OwnedFd::from(memory.file().try_clone().expect("dup"));
        let table = memory_table_to_bytes(&[region(0, 0x4000), region(0x8000, 0x8000)]);
        let mut good = message(FrontendReq::SET_MEM_TABLE, &table, vec![own(), own()]);
        let before = good.bytes.clone();
        assert!(matches!(treat_request(&mut good, &memory, QUEUES), Ok(Treatment::Relay)));
        assert_eq!(good.bytes, before);
        let foreign = SiblingMemory::create(0x10000).expect("memory").file().try_clone().expect("dup").into();
        let mut bad = message(FrontendReq::SET_MEM_TABLE, &table, vec![own(), foreign]);
        let refusal = treat_request(&mut bad, &memory, QUEUES).expect_err("foreign");
        assert!(refusal.to_string().contains("mem-path="), "{refusal}");
        let beyond = memory_table_to_bytes(&[region(0x8000, 0x9000)]);
        let mut bad = message(FrontendReq::SET_MEM_TABLE, &beyond, vec![own()]);
        assert!(matches!(treat_request(&mut bad, &memory, QUEUES), Err(Refusal::Memory(_))));
    }

    #[test]
    fn features_the_device_cannot_carry_are_masked_both_ways() {
        let all = u64::MAX.to_le_bytes();
        let mut request = message(FrontendReq::SET_PROTOCOL_FEATURES, &all, vec![]);
        let treatment = treat_request(&mut request, &memory(), QUEUES).expect("relayed");
        assert!(
            matches!(treatment, Treatment::ProtocolFeatures(bits) if bits == CARRIED_PROTOCOL_FEATURES.bits())
        );
        assert_eq!(request.payload(), CARRIED_PROTOCOL_FEATURES.bits().to_le_bytes());
        let mut reply = message(FrontendReq::GET_PROTOCOL_FEATURES, &all, vec![]);
        treat_reply(&mut reply, &memory(), QUEUES).expect("reply");
        assert_eq!(reply.payload(), CARRIED_PROTOCOL_FEATURES.bits().to_le_bytes());
        let mut reply = message(FrontendReq::GET_FEATURES, &all, vec![]);
        treat_reply(&mut reply, &memory(), QUEUES).expect("reply");
        assert_eq!(reply.payload(), (!(1u64 << 26)).to_le_bytes());
        let mut reply = message(FrontendReq::GET_QUEUE_NUM, &all, vec![]);
        treat_reply(&mut reply, &memory(), QUEUES).expect("reply");
        assert_eq!(reply.payload(), 16u64.to_le_bytes());
        let mut short = message(FrontendReq::GET_FEATURES, &all[..7], vec![]);
        assert!(treat_reply(&mut short, &memory(), QUEUES).is_err());
    }

    #[test]
    fn an_in_flight_region_comes_from_the_sibling_memory_file_and_goes_back() {
        let memory = memory();
        let mut description = [0; 24];
        description[1] = 0x20;
        description[16] = 1;
        let mut reply = message(FrontendReq::GET_INFLIGHT_FD, &description, vec![]);
        treat_reply(&mut reply, &memory, QUEUES).expect("reply");
        let area = InflightArea::parse(31, reply.payload()).expect("area");
        assert_eq!(area, InflightArea { size: 0x2000, offset: BarOffset(0x10000) });
        assert_eq!(reply.payload()[16..], description[16..]);
        let fds = std::mem::take(&mut reply.fds);
        let mut set = message(FrontendReq::SET_INFLIGHT_FD, reply.payload(), fds);
        assert!(matches!(treat_request(&mut set, &memory, QUEUES), Ok(Treatment::Relay)));
        let mut other = message(FrontendReq::SET_INFLIGHT_FD, reply.payload(), vec![event()]);
        assert!(treat_request(&mut other, &memory, QUEUES).is_err());
        let mut none = message(FrontendReq::GET_INFLIGHT_FD, &[0; 24], vec![]);
        treat_reply(&mut none, &memory, QUEUES).expect("reply");
        assert!(none.fds.is_empty());
    }

    proptest! {
        #[test]
        fn any_message_is_treated_without_panic(code in 0..50u32, reply: bool, payload in proptest::collection::vec(any::<u8>(), 0..300)) {
            let flags = 1 | u32::from(reply) << 2;
            let size = u32::try_from(payload.len()).expect("small");
            let mut message = Message::new(Header { request: code, flags, size }, &payload);
            let _ = treat_reply(&mut message, &memory(), QUEUES);
            let _ = treat_backend_request(&message);
            let _ = treat_request(&mut message, &memory(), QUEUES);
        }
    }
}
