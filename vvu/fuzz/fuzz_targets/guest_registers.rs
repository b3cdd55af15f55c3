//! Feeds a device the register accesses and the queues of a hostile guest, while front-ends connect, send
//! and leave.

#![no_main]

use std::io::Write;
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vvu::device::LinkState;
use vvu::device::rig::{BAR0, BAR2, BUFFER, Rig};
use vvu::message_socket::Message;
use vvu::pci::PciFunction;
use vvu::spec::pci::{self, Region};
use vvu::spec::virtio::feature;
use vvu_fuzz::Input;

fuzz_target!(|data: &[u8]| run(Input(data)));

/// Most front-ends that are connected at one time.
const FRONTENDS: usize = 4;
/// Most front-ends in one run; those that leave stay in the socket's backlog.
const CONNECTIONS: usize = 16;

fn run(mut input: Input<'_>) {
    let mut rig = Rig::new();
    let mut frontends: Vec<UnixStream> = Vec::new();
    let mut connections = 0;
    while !input.is_empty() {
        match input.below(12) {
            0 | 1 => write(&mut rig, BAR0, &mut input),
            2 => write(&mut rig, BAR2, &mut input),
            3 => write(&mut rig, Region::Config, &mut input),
            4 => write(&mut rig, Region::Bar(pci::SHARED_MEMORY_BAR), &mut input),
            5 => {
                let region = [BAR0, BAR2, Region::Config, Region::Bar(4)][usize::from(input.below(4))];
                let offset = u64::from(input.u16());
                let _: [u8; 8] = rig.read(region, offset);
            }
            6 => rig.bring_up(feature::OFFERED),
            // Overwrite rings and descriptors.
            7 | 8 => {
                let ring = rig.rings[usize::from(input.below(2))].base;
                let address = ring + u64::from(input.u16() % 0x4000);
                let data = &input.u64().to_le_bytes()[..usize::from(1 + input.below(8))];
                rig.host.memory.write_slice(data, GuestAddress(address)).expect("in range");
            }
            // A message of the driver, or a buffer for one.
            9 => {
                if input.below(2) == 0 {
                    rig.offer(0, &[], BUFFER);
                } else {
                    let bytes = input.block();
                    rig.offer(1, bytes, 0);
                }
                rig.notify(0);
            }
            10 => match frontends.len() {
                FRONTENDS => drop(frontends.pop()),
                _ if connections == CONNECTIONS => {}
                _ => {
                    connections += 1;
                    let stream = UnixStream::connect(rig.dir.path().join("s")).expect("connect");
                    stream.set_nonblocking(true).expect("non-blocking");
                    frontends.push(stream);
                }
            },
            _ => {
                let (request, payload) = (u32::from(input.u8()), input.block());
                let size = u32::try_from(payload.len()).expect("a byte");
                let header = vvu::spec::vhost_user::Header { request, flags: 1, size };
                if let Some(stream) = frontends.first_mut() {
                    // The device may have hung up or not read yet.
                    let _ = stream.write(&Message::new(header, payload).bytes);
                }
            }
        }
        rig.device.process(&rig.host);
    }
    drop(frontends);
    rig.device.reset();
    // The device first accepts the front-ends that left before it did.
    for _ in 0..=connections {
        rig.bring_up(feature::OFFERED);
        rig.device.process(&rig.host);
    }
    rig.bring_up(feature::OFFERED);
    let _frontend = rig.connect();
    assert_eq!(rig.device.link(), LinkState::Connected);
}

/// Writes up to eight bytes, mostly to registers.
fn write(rig: &mut Rig, region: Region, input: &mut Input<'_>) {
    let offset = u64::from(input.u16());
    let offset = if offset & 1 << 15 == 0 { offset & 0xff } else { offset };
    let data = input.u64().to_le_bytes();
    let length = usize::from(1 + input.below(8));
    rig.write(region, offset, &data[..length]);
}
