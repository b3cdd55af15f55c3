//! Tests of the driver against the vvu device in the same process, honest and lying.

use super::*;
use crate::device::VvuDevice;
use crate::pci::PciFunction;
use crate::pci::{DoorbellValue, PciDevice};
use crate::rig::{Liar, LocalDevice, vvu_device};
use crate::spec::addr::QueueIndex;
use crate::spec::pci::{COMMON_CFG, DEVICE_CFG, Region, Structure, VECTOR_SELECT_CFG, config};
use crate::spec::vhost_user::MessageError;
use crate::spec::virtio::{common, device_config, feature, status, vector_select};

type Lying = LocalDevice<Liar>;

fn driver(liar: &Lying) -> Driver<Lying> {
    Driver::new(liar.clone()).expect("bring-up")
}

fn refused(lie: impl FnOnce(&mut Liar)) -> DriverError {
    let liar = LocalDevice::liar(16);
    liar.lie(lie);
    Driver::new(liar).expect_err("a device that must be refused")
}

/// Reads a register of the device itself.
fn register<const N: usize>(device: &LocalDevice<VvuDevice>, at: Structure, offset: u64) -> [u8; N] {
    let mut bytes = [0; N];
    device.read(Region::Bar(at.bar), at.offset + offset, &mut bytes).expect("register");
    bytes
}

/// Selects something and reads the register that belongs to it.
fn selected(
    device: &LocalDevice<VvuDevice>,
    at: Structure,
    select: (u64, u32),
    width: usize,
    offset: u64,
) -> [u8; 4] {
    let (register_of_select, value) = select;
    let bytes = &value.to_le_bytes()[..width];
    device.write(Region::Bar(at.bar), at.offset + register_of_select, bytes).expect("select");
    let mut bytes = [0; 4];
    device.read(Region::Bar(at.bar), at.offset + offset, &mut bytes[..width]).expect("register");
    bytes
}

#[test]
fn bring_up_leaves_the_device_ready() {
    let device = LocalDevice::new(vvu_device(16));
    let driver = Driver::new(device.clone()).expect("bring-up");
    assert_eq!(driver.queues(), 16);
    let mut command = [0];
    device.read(Region::Config, config::COMMAND as u64, &mut command).expect("command");
    assert_eq!(command[0] & 0b110, 0b110);
    let accepted = |half| {
        let select = (common::DRIVER_FEATURE_SELECT, half);
        u64::from(u32::from_le_bytes(selected(&device, COMMON_CFG, select, 4, common::DRIVER_FEATURE)))
    };
    assert_eq!(accepted(1) << 32 | accepted(0), feature::VERSION_1 | feature::ACCESS_PLATFORM);
    assert_eq!(register(&device, COMMON_CFG, common::DEVICE_STATUS), [0b1111]);
    let of_queue = |queue, offset| selected(&device, COMMON_CFG, (common::QUEUE_SELECT, queue), 2, offset)[0];
    assert_eq!([0, 1].map(|queue| of_queue(queue, common::QUEUE_MSIX_VECTOR)), [0, 1]);
    assert_eq!([0, 1].map(|queue| of_queue(queue, common::QUEUE_SIZE)), [64, 64]);
    let kick_vector = |queue| {
        selected(&device, VECTOR_SELECT_CFG, (vector_select::SELECT, queue), 2, vector_select::MSIX_VECTOR)[0]
    };
    assert_eq!((0..16).map(kick_vector).collect::<Vec<_>>(), (2..18).collect::<Vec<_>>());
    let liar = LocalDevice::liar(16);
    // Queue 1 has its notify address at offset 1, in units of the multiplier.
    liar.lie(|liar| liar.pretend_register(COMMON_CFG, common::QUEUE_NOTIFY_OFF, &[1, 0]));
    let _driver = self::driver(&liar);
    assert_eq!(liar.lock().function.notified, [(4, 0)]);
}

#[test]
fn queue_sizes_follow_the_device_down_to_a_power_of_two() {
    let liar = LocalDevice::liar(1);
    liar.lie(|liar| liar.pretend_register(COMMON_CFG, common::QUEUE_SIZE, &[12, 0]));
    let _driver = driver(&liar);
    assert_eq!(liar.lock().function.queue_size(0), 8);
}

#[test]
fn devices_that_cannot_be_driven_are_refused() {
    let missing = refused(|liar| liar.offer_only(1));
    assert!(matches!(missing, DriverError::Feature { missing: "ACCESS_PLATFORM", .. }));
    let stuck = refused(|liar| liar.stick_status(status::NEEDS_RESET));
    assert!(matches!(stuck, DriverError::Reset { status: status::NEEDS_RESET }));
    let no_queue = refused(|liar| liar.pretend_register(COMMON_CFG, common::QUEUE_SIZE, &[0, 0]));
    assert!(matches!(no_queue, DriverError::NoQueue { queue: "receive" }));
    let liar = LocalDevice::liar(1);
    liar.lie(|liar| liar.offer_only(0));
    Driver::new(liar.clone()).expect_err("no VERSION_1");
    assert_eq!(liar.status(), status::FAILED);
    let no_vhost_queue =
        refused(|liar| liar.pretend_register(DEVICE_CFG, device_config::MAX_VHOST_QUEUES, &[0; 4]));
    assert!(matches!(no_vhost_queue, DriverError::NoVhostQueue { queues: 0, .. }));
}

#[test]
fn queues_without_a_vector_or_a_doorbell_are_not_served() {
    let few_vectors = LocalDevice::liar(16);
    // MSI-X message control at 0x42: a table of five.
    few_vectors.lie(|liar| liar.pretend(Region::Config, 0x42, &[4]));
    assert_eq!(driver(&few_vectors).queues(), 3);
    let few_doorbells = LocalDevice::liar(16);
    // Length of the doorbell structure at 0xac + 12: room for 20 doorbells, 16 of them calls.
    few_doorbells.lie(|liar| liar.pretend(Region::Config, 0xb8, &[80, 0, 0, 0]));
    assert_eq!(driver(&few_doorbells).queues(), 4);
}

#[test]
fn doorbells_are_bound_once_and_errors_follow_calls() {
    let liar = LocalDevice::liar(16);
    let mut driver = driver(&liar);
    driver.call(QueueIndex(3)).expect("call");
    driver.call(QueueIndex(3)).expect("call again");
    driver.err(QueueIndex(3)).expect("err");
    let bound = liar.lock().doorbells.clone();
    let bound: Vec<_> = bound.iter().map(|bound| (bound.offset, bound.value)).collect();
    assert_eq!(bound, [(12, DoorbellValue::Le16(3)), (76, DoorbellValue::Le16(19))]);
    assert!(matches!(driver.call(QueueIndex(16)), Err(DriverError::QueueIndex { queues: 16, .. })));
    assert!(matches!(driver.kick(QueueIndex(16)), Err(DriverError::QueueIndex { .. })));
}

#[test]
fn queues_wrap_around_many_times() {
    let liar = LocalDevice::liar(1);
    liar.lie(|liar| liar.pretend_register(COMMON_CFG, common::QUEUE_SIZE, &[4, 0]));
    let mut driver = driver(&liar);
    for round in 0..70_000u32 {
        liar.request(round, 1, &round.to_le_bytes());
        let Some(Incoming::Message(message)) = driver.receive().expect("receive") else {
            panic!("no message in round {round}")
        };
        assert_eq!((message.header.request, message.payload()), (round, &round.to_le_bytes()[..]));
        assert!(driver.send(&message.bytes).expect("send"));
        assert_eq!(liar.sent(), [message.bytes]);
    }
    assert!(driver.receive().expect("receive").is_none());
}

#[test]
fn a_full_receive_queue_loses_nothing() {
    let liar = LocalDevice::liar(1);
    let mut driver = driver(&liar);
    let taken = (0..100u32).take_while(|i| {
        liar.deliver(&[&[1, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0], &i.to_le_bytes()[..]].concat())
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
    assert_eq!(liar.lock().function.notified, [(0, 0), (0, 0)]);
}

#[test]
fn a_device_that_completes_late_fills_the_transmit_queue_and_frees_it() {
    let liar = LocalDevice::liar(1);
    let mut driver = driver(&liar);
    for i in 0..64 {
        assert!(driver.send(&[i; 20]).expect("send"));
    }
    assert!(!driver.send(&[64; 20]).expect("no room"));
    assert_eq!(liar.sent_next(), Some(vec![0; 20]));
    assert!(driver.can_send().expect("room again"));
    assert!(driver.send(&[64; 20]).expect("send"));
    assert_eq!(liar.sent().last(), Some(&vec![64; 20]));
}

#[test]
fn an_empty_buffer_means_that_the_front_end_left() {
    let liar = LocalDevice::liar(1);
    let mut driver = driver(&liar);
    liar.request(1, 1, &[]);
    liar.deliver(&[]);
    assert!(matches!(driver.receive(), Ok(Some(Incoming::Message(_)))));
    assert!(matches!(driver.receive(), Ok(Some(Incoming::FrontendLeft))));
}

#[test]
fn lies_about_received_messages_are_errors() {
    let receive = |lie: &dyn Fn(&Lying)| {
        let liar = LocalDevice::liar(1);
        let mut driver = driver(&liar);
        lie(&liar);
        driver.receive().expect_err("lie")
    };
    let header = [1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0];
    let oversized = receive(&|liar| assert!(liar.deliver_as(&header, 4097)));
    assert!(matches!(oversized, DriverError::Queue { source: QueueError::UsedLength { got: 4097 }, .. }));
    let cut = receive(&|liar| assert!(liar.deliver_as(&header, 19)));
    assert!(matches!(cut, DriverError::Length { got: 19, want: 20 }));
    let short = receive(&|liar| assert!(liar.deliver_as(&header, 11)));
    assert!(matches!(short, DriverError::Message(MessageError::Short { got: 11 })));
    let absent = receive(&|liar| liar.claim_used(0, 64, 12, 1));
    assert!(matches!(absent, DriverError::Queue { source: QueueError::UsedBuffer { id: 64 }, .. }));
    let ahead = receive(&|liar| liar.claim_used(0, 0, 12, 65));
    assert!(matches!(ahead, DriverError::Queue { source: QueueError::UsedIndex { got: 65, have: 64 }, .. }));
    let twice = {
        let liar = LocalDevice::liar(1);
        let mut driver = driver(&liar);
        driver.send(&[0; 12]).expect("send");
        driver.send(&[0; 12]).expect("send");
        liar.claim_used(1, 0, 0, 2);
        driver.can_send().expect_err("the same buffer twice")
    };
    assert!(matches!(twice, DriverError::Queue { source: QueueError::UsedBuffer { id: 0 }, .. }));
}

#[test]
fn the_link_is_read_and_written() {
    let liar = LocalDevice::liar(1);
    let driver = driver(&liar);
    driver.set_backend_up(true).expect("up");
    liar.set_link(device_config::BACKEND_UP | device_config::FRONTEND_UP);
    assert_eq!(driver.rx_event().drain(), 1);
    assert_eq!(driver.link().expect("link"), Link { backend_up: true, frontend_up: true });
    driver.set_backend_up(false).expect("down");
    assert!(!driver.link().expect("link").backend_up);
    liar.lie(|liar| liar.stick_status(status::NEEDS_RESET));
    assert!(matches!(driver.link(), Err(DriverError::NeedsReset { .. })));
    liar.lie(|liar| liar.stick_status(0xff));
    assert!(matches!(driver.link(), Err(DriverError::Gone)));
    liar.lie(|liar| liar.stick_status(0));
}

#[test]
fn dropping_the_driver_resets_the_device() {
    let liar = LocalDevice::liar(1);
    drop(driver(&liar));
    assert_eq!(liar.status(), 0);
}

#[test]
fn a_reset_by_somebody_else_is_noticed() {
    let device = LocalDevice::new(vvu_device(1));
    let driver = Driver::new(device.clone()).expect("bring-up");
    assert_eq!(driver.link().expect("link"), Link { backend_up: false, frontend_up: false });
    device.lock().function.reset();
    let error = driver.link().expect_err("a reset");
    assert!(matches!(error, DriverError::WasReset { status: 0 }), "{error}");
}
