//! Tests of the driver against a device in memory.

use super::fake::FakeDevice;
use super::*;
use crate::spec::addr::QueueIndex;
use crate::spec::pci::config;
use crate::spec::vhost_user::MessageError;
use crate::spec::virtio::{device_config, feature, status};

fn driver(fake: &FakeDevice) -> Driver<FakeDevice> {
    Driver::new(fake.clone()).expect("bring-up")
}

fn refused(change: impl FnOnce(&FakeDevice)) -> DriverError {
    let fake = FakeDevice::new(16);
    change(&fake);
    Driver::new(fake).expect_err("a device that must be refused")
}

#[test]
fn bring_up_leaves_the_device_ready() {
    let fake = FakeDevice::new(16);
    let driver = driver(&fake);
    assert_eq!(driver.queues(), 16);
    let state = fake.state();
    assert_eq!(state.config[config::COMMAND] & 0b110, 0b110);
    assert_eq!(state.accepted, feature::VERSION_1 | feature::ACCESS_PLATFORM);
    assert_eq!(state.status, 0b1111);
    assert_eq!([state.queues[0].vector, state.queues[1].vector], [0, 1]);
    assert_eq!([state.queues[0].size, state.queues[1].size], [64, 64]);
    assert_eq!(state.kick_vectors, (2..18).collect::<Vec<_>>());
    // The device puts queue i's notify address at offset i + 1, in units of the multiplier.
    assert_eq!(state.notified, [(4, 0)]);
}

#[test]
fn queue_sizes_follow_the_device_down_to_a_power_of_two() {
    let fake = FakeDevice::new(1);
    fake.state().queue_max = 12;
    let _driver = driver(&fake);
    assert_eq!(fake.state().queues[0].size, 8);
}

#[test]
fn devices_that_cannot_be_driven_are_refused() {
    let missing = refused(|fake| fake.state().offered = feature::VERSION_1);
    assert!(matches!(missing, DriverError::Feature { missing: "ACCESS_PLATFORM", .. }));
    let stuck = refused(|fake| fake.state().stuck_status = status::NEEDS_RESET);
    assert!(matches!(stuck, DriverError::Reset { status: status::NEEDS_RESET }));
    let no_queue = refused(|fake| fake.state().queue_max = 0);
    assert!(matches!(no_queue, DriverError::NoQueue { queue: "receive" }));
    let fake = FakeDevice::new(1);
    fake.state().offered = 0;
    Driver::new(fake.clone()).expect_err("no VERSION_1");
    assert_eq!(fake.state().status, status::FAILED);
    let no_vhost_queue = refused(|fake| fake.state().vhost_queues = 0);
    assert!(matches!(no_vhost_queue, DriverError::NoVhostQueue { queues: 0, .. }));
}

#[test]
fn queues_without_a_vector_or_a_doorbell_are_not_served() {
    let few_vectors = FakeDevice::new(16);
    // MSI-X message control at 0x42: a table of five.
    few_vectors.state().config[0x42] = 4;
    assert_eq!(driver(&few_vectors).queues(), 3);
    let few_doorbells = FakeDevice::new(16);
    // Length of the doorbell structure at 0xac + 12: room for 20 doorbells, 16 of them calls.
    few_doorbells.state().config[0xb8..][..4].copy_from_slice(&[80, 0, 0, 0]);
    assert_eq!(driver(&few_doorbells).queues(), 4);
}

#[test]
fn doorbells_are_bound_once_and_errors_follow_calls() {
    let fake = FakeDevice::new(16);
    let mut driver = driver(&fake);
    driver.call(QueueIndex(3)).expect("call");
    driver.call(QueueIndex(3)).expect("call again");
    driver.err(QueueIndex(3)).expect("err");
    let bound: Vec<_> = fake.state().doorbells.iter().map(|(offset, value, _)| (*offset, *value)).collect();
    assert_eq!(bound, [(12, 3), (76, 19)]);
    assert!(matches!(driver.call(QueueIndex(16)), Err(DriverError::QueueIndex { queues: 16, .. })));
    assert!(matches!(driver.kick(QueueIndex(16)), Err(DriverError::QueueIndex { .. })));
}

#[test]
fn queues_wrap_around_many_times() {
    let fake = FakeDevice::new(1);
    fake.state().queue_max = 4;
    let mut driver = driver(&fake);
    for round in 0..70_000u32 {
        fake.request(round, 1, &round.to_le_bytes());
        let Some(Incoming::Message(message)) = driver.receive().expect("receive") else {
            panic!("no message in round {round}")
        };
        assert_eq!((message.header.request, message.payload()), (round, &round.to_le_bytes()[..]));
        assert!(driver.send(&message.bytes).expect("send"));
        assert_eq!(fake.sent(), [message.bytes]);
    }
    assert!(driver.receive().expect("receive").is_none());
}

#[test]
fn a_full_receive_queue_loses_nothing() {
    let fake = FakeDevice::new(1);
    let mut driver = driver(&fake);
    let taken = (0..100u32).take_while(|i| {
        fake.deliver(&[&[1, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0], &i.to_le_bytes()[..]].concat())
    });
    assert_eq!(taken.count(), 64);
    for i in 0..64u32 {
        let Some(Incoming::Message(message)) = driver.receive().expect("receive") else {
            panic!("message {i}")
        };
        assert_eq!(message.payload(), i.to_le_bytes());
    }
    assert!(driver.receive().expect("receive").is_none());
    // One notification at the start, one after the burst.
    assert_eq!(fake.state().notified, [(4, 0), (4, 0)]);
}

#[test]
fn a_device_that_completes_late_fills_the_transmit_queue_and_frees_it() {
    let fake = FakeDevice::new(1);
    let mut driver = driver(&fake);
    for i in 0..64 {
        assert!(driver.send(&[i; 20]).expect("send"));
    }
    assert!(!driver.send(&[64; 20]).expect("no room"));
    assert_eq!(fake.sent_next(), Some(vec![0; 20]));
    assert!(driver.can_send().expect("room again"));
    assert!(driver.send(&[64; 20]).expect("send"));
    assert_eq!(fake.sent().last(), Some(&vec![64; 20]));
}

#[test]
fn an_empty_buffer_means_that_the_front_end_left() {
    let fake = FakeDevice::new(1);
    let mut driver = driver(&fake);
    fake.request(1, 1, &[]);
    fake.deliver(&[]);
    assert!(matches!(driver.receive(), Ok(Some(Incoming::Message(_)))));
    assert!(matches!(driver.receive(), Ok(Some(Incoming::FrontendLeft))));
}

#[test]
fn lies_about_received_messages_are_errors() {
    let receive = |lie: &dyn Fn(&FakeDevice)| {
        let fake = FakeDevice::new(1);
        let mut driver = driver(&fake);
        lie(&fake);
        driver.receive().expect_err("lie")
    };
    let header = [1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0];
    let oversized = receive(&|fake| assert!(fake.deliver_as(&header, 4097)));
    assert!(matches!(oversized, DriverError::Queue { source: QueueError::UsedLength { got: 4097 }, .. }));
    let cut = receive(&|fake| assert!(fake.deliver_as(&header, 19)));
    assert!(matches!(cut, DriverError::Length { got: 19, want: 20 }));
    let short = receive(&|fake| assert!(fake.deliver_as(&header, 11)));
    assert!(matches!(short, DriverError::Message(MessageError::Short { got: 11 })));
    let absent = receive(&|fake| fake.claim_used(0, 64, 12, 1));
    assert!(matches!(absent, DriverError::Queue { source: QueueError::UsedBuffer { id: 64 }, .. }));
    let ahead = receive(&|fake| fake.claim_used(0, 0, 12, 65));
    assert!(matches!(ahead, DriverError::Queue { source: QueueError::UsedIndex { got: 65, have: 64 }, .. }));
    let twice = {
        let fake = FakeDevice::new(1);
        let mut driver = driver(&fake);
        driver.send(&[0; 12]).expect("send");
        driver.send(&[0; 12]).expect("send");
        fake.claim_used(1, 0, 0, 2);
        driver.can_send().expect_err("the same buffer twice")
    };
    assert!(matches!(twice, DriverError::Queue { source: QueueError::UsedBuffer { id: 0 }, .. }));
}

#[test]
fn the_link_is_read_and_written() {
    let fake = FakeDevice::new(1);
    let driver = driver(&fake);
    driver.set_backend_up(true).expect("up");
    fake.set_link(device_config::BACKEND_UP | device_config::FRONTEND_UP);
    assert_eq!(driver.rx_event().read().expect("configuration interrupt"), 1);
    assert_eq!(driver.link().expect("link"), Link { backend_up: true, frontend_up: true });
    driver.set_backend_up(false).expect("down");
    assert!(!driver.link().expect("link").backend_up);
    fake.state().stuck_status = status::NEEDS_RESET;
    assert!(matches!(driver.link(), Err(DriverError::NeedsReset { .. })));
    fake.state().stuck_status = 0xff;
    assert!(matches!(driver.link(), Err(DriverError::Gone)));
    fake.state().stuck_status = 0;
}

#[test]
fn dropping_the_driver_resets_the_device() {
    let fake = FakeDevice::new(1);
    drop(driver(&fake));
    assert_eq!(fake.state().status, 0);
}
