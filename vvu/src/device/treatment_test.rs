use super::*;
use crate::spec::addr::{BarOffset, SiblingGpa, SiblingVa};
use crate::spec::vhost_user::{Header, MemoryRegion, VRING_NO_FD, memory_table_to_bytes};
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

fn treat(request: FrontendReq, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Treatment, MessageRefusal> {
    treat_request(&mut message(request, payload, fds), &memory(), QUEUES)
}

#[test]
fn every_request_without_a_place_on_the_wire_is_refused() {
    for request in [6, 7, 28, 29, 30, 33, 35, 41, 42, 43, 44] {
        let request = FrontendReq::try_from(request).expect("known");
        assert!(
            matches!(treat(request, &[0; 8], vec![]), Err(MessageRefusal::NotCarried { .. })),
            "{request:?}"
        );
    }
    let mut unknown = message(FrontendReq::SET_OWNER, &[], vec![]);
    for code in [0, 45, u32::MAX] {
        unknown.header.request = code;
        assert!(matches!(
            treat_request(&mut unknown, &memory(), QUEUES),
            Err(MessageRefusal::NotCarried { .. })
        ));
    }
}

#[test]
fn a_reply_is_no_request() {
    let mut reply = message(FrontendReq::SET_OWNER, &[], vec![]);
    reply.header = reply.header.reply(0);
    assert!(matches!(treat_request(&mut reply, &memory(), QUEUES), Err(MessageRefusal::Direction { .. })));
}

#[test]
fn file_descriptors_are_there_when_and_only_when_they_belong() {
    use FrontendReq as R;
    assert!(matches!(
        treat(R::SET_OWNER, &[], vec![event()]),
        Err(MessageRefusal::Fds { got: 1, want: 0, .. })
    ));
    assert!(matches!(
        treat(R::SET_VRING_KICK, &[0; 8], vec![]),
        Err(MessageRefusal::Fds { got: 0, want: 1, .. })
    ));
    let two = vec![event(), event()];
    assert!(matches!(
        treat(R::SET_VRING_CALL, &[0; 8], two),
        Err(MessageRefusal::Fds { got: 2, want: 1, .. })
    ));
    let none = VRING_NO_FD.to_le_bytes();
    assert!(matches!(
        treat(R::SET_VRING_CALL, &none, vec![event()]),
        Err(MessageRefusal::Fds { got: 1, want: 0, .. })
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
        assert!(matches!(refused, Err(MessageRefusal::Queue { got: 16, .. })), "{request:?}");
    }
    let mut address = [0; 40];
    address[3] = 1;
    assert!(matches!(treat(R::SET_VRING_ADDR, &address, vec![]), Err(MessageRefusal::Queue { .. })));
    assert!(matches!(treat(R::SET_VRING_ADDR, &address[..39], vec![]), Err(MessageRefusal::Message(_))));
    let kick = treat(R::SET_VRING_KICK, &[16, 0, 0, 0, 0, 0, 0, 0], vec![event()]);
    assert!(matches!(kick, Err(MessageRefusal::Queue { .. })));
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
    assert!(matches!(treat_request(&mut bad, &memory, QUEUES), Err(MessageRefusal::Memory(_))));
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
