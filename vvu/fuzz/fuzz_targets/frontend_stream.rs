//! Feeds a device the messages of a hostile front-end, with and without the file descriptors that belong
//! to them. The guest driver is up and answers.

#![no_main]

use std::os::fd::{AsFd, OwnedFd};

use libfuzzer_sys::fuzz_target;
use vvu::device::LinkState;
use vvu::device::rig::{BUFFER, Rig};
use vvu::message_socket::{Message, MessageSocket};
use vvu::pci::PciFunction;
use vvu::spec::vhost_user::Header;
use vvu::spec::virtio::feature;
use vvu_fuzz::{Input, fds};

fuzz_target!(|data: &[u8]| run(Input(data)));

fn run(mut input: Input<'_>) {
    let mut rig = Rig::new();
    rig.bring_up(feature::OFFERED);
    let mut frontend = rig.connect();
    let mut last = None;
    while !input.is_empty() {
        match input.below(10) {
            // A message that QEMU sends, with up to one byte changed.
            8 | 9 => {
                let (request, mut payload, count) = sound(input.u8());
                let (at, change) = (usize::from(input.u8()), input.u8());
                if let Some(byte) = payload.get_mut(at) {
                    *byte ^= change;
                }
                let size = u32::try_from(payload.len()).expect("small");
                let header = Header { request, flags: 1 | u32::from(input.u8() & 8), size };
                // Bits of zero are memory files, bits of 01 are eventfds.
                let pattern = if request == 5 { count } else { count | 0b01_01_01_00 };
                send(&mut rig, &mut frontend, Message::new(header, &payload).bytes, pattern);
            }
            // A message whose header has the right size.
            0..=3 => {
                let (request, flags, pattern) = (u32::from(input.u8()), input.u8() & 0xc | 1, input.u8());
                let payload = input.block();
                let size = u32::try_from(payload.len()).expect("a byte");
                let message = Message::new(Header { request, flags: flags.into(), size }, payload);
                send(&mut rig, &mut frontend, message.bytes, pattern);
            }
            // Arbitrary bytes.
            4 => {
                let (pattern, bytes) = (input.u8(), input.block().to_vec());
                if !bytes.is_empty() {
                    send(&mut rig, &mut frontend, bytes, pattern);
                }
            }
            5 => frontend = rig.connect(),
            // The back-end replies to the last message, or sends a request.
            6 => {
                let (request, is_reply, payload) =
                    (u32::from(input.u8()), input.u8() & 1 == 0, input.block());
                let header = match last {
                    Some(header) if is_reply => header,
                    _ => Header { request, flags: 1, size: 0 },
                };
                let size = u32::try_from(payload.len()).expect("a byte");
                let flags = if is_reply { 5 } else { 9 };
                rig.send(&Message::new(Header { flags, size, ..header }, payload));
                while rig.used(1).is_some() {}
            }
            // A doorbell.
            _ => {
                let doorbell = u64::from(input.u8());
                rig.write(vvu::device::rig::BAR2, 4 * doorbell, &[1]);
            }
        }
        rig.device.process(&rig.host);
        let _ = frontend.receive();
        // The driver takes the messages, offers its buffers again, and asks for the next front-end after
        // the end of a connection.
        while let Some(bytes) = rig.used(0) {
            if !bytes.is_empty() {
                last = Some(Header::parse(&bytes).expect("the driver gets nothing but messages"));
            }
            rig.offer(0, &[], BUFFER);
        }
        match rig.device.link() {
            LinkState::Down => rig.backend_up(),
            LinkState::Broken => panic!("a front-end broke the driver's link"),
            _ => rig.notify(0),
        }
    }
    // After a reset the device serves a front-end.
    rig.device.reset();
    rig.bring_up(feature::OFFERED);
    drop(frontend);
    let _last = rig.connect();
    assert!(
        matches!(rig.device.link(), LinkState::Connected | LinkState::Leaving),
        "{:?}",
        rig.device.link()
    );
}

/// Returns a message that QEMU sends: request code, payload and number of file descriptors.
fn sound(index: u8) -> (u32, Vec<u8>, u8) {
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let sound = [
        (1, vec![], 0),
        (3, vec![], 0),
        (15, vec![], 0),
        (16, words(&[u64::MAX]), 0),
        (2, words(&[1 << 32]), 0),
        // A table of one region, and of two.
        (5, words(&[1, 0, 0x10000, 0, 0]), 1),
        (5, words(&[2, 0, 0x8000, 0, 0, 0x10000, 0x8000, 0x10000, 0x8000]), 2),
        (8, words(&[8 << 32]), 0),
        (9, words(&[0, 0, 0x1000, 0x2000, 0]), 0),
        (10, words(&[0]), 0),
        (11, words(&[0]), 0),
        (12, words(&[0]), 1),
        (13, words(&[0]), 1),
        (14, words(&[0]), 1),
        (18, words(&[1 << 32]), 0),
        (24, [&[0, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0][..], &[0; 60]].concat(), 0),
        (31, words(&[0x1000, 0, 0x0008_0001]), 0),
    ];
    sound[usize::from(index) % sound.len()].clone()
}

fn send(rig: &mut Rig, frontend: &mut MessageSocket, bytes: Vec<u8>, pattern: u8) {
    let own = || -> OwnedFd { rig.device.shared_memory().0.as_fd().try_clone_to_owned().expect("dup") };
    let attached = fds(pattern, &own);
    // Sending fails if the device has hung up.
    if !frontend.is_congested() {
        let _ = frontend.send(bytes, attached);
    }
}
