//! Feeds the block back-end descriptor chains and rings of a hostile driver in the sibling.

#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vvu::backend::block::rig::{AVAILABLE, Descriptor, QUEUE_SIZE, Rig, USED};
use vvu_fuzz::Input;

thread_local! {
    static RIG: RefCell<Rig> = RefCell::new(Rig::new());
}

fuzz_target!(|data: &[u8]| RIG.with_borrow_mut(|rig| run(rig, Input(data))));

/// Address of the request header.
const HEADER: u64 = 0x4000;

fn run(rig: &mut Rig, mut input: Input<'_>) {
    rig.restart();
    while !input.is_empty() {
        match input.below(4) {
            0 | 1 => {
                let mut header = u64::from(input.below(16)).to_le_bytes().to_vec();
                header.extend(u64::from(input.u8()).to_le_bytes());
                header.extend(input.block());
                rig.memory.write_slice(&header, GuestAddress(HEADER)).expect("header");
            }
            2 => {
                let count = input.below(8);
                let chain: Vec<_> = (0..count).map(|index| descriptor(index, count, &mut input)).collect();
                rig.offer(&chain);
                rig.process();
            }
            // Overwrite rings and descriptors.
            _ => {
                let base = [0, AVAILABLE, USED][usize::from(input.below(3))];
                let at = base + u64::from(input.u8());
                rig.memory.write_obj(input.u64(), GuestAddress(at)).expect("in range");
                rig.process();
            }
        }
    }
    // A queue that stopped with an error works after a restart.
    rig.restart();
    rig.memory.write_slice(&[0; 16], GuestAddress(HEADER)).expect("header");
    rig.offer(&[
        Descriptor { addr: HEADER, len: 16, flags: 1, next: 1 },
        Descriptor { addr: 0x8000, len: 512, flags: 3, next: 2 },
        Descriptor { addr: 0x9000, len: 1, flags: 2, next: 0 },
    ]);
    rig.process();
    assert_eq!(rig.used(), (1, 513));
}

/// Makes descriptor `index` of a chain of `count`: mostly that of a valid chain of header, data and
/// status.
fn descriptor(index: u8, count: u8, input: &mut Input<'_>) -> Descriptor {
    let shape = input.u8();
    let last = index + 1 == count;
    let flags = u16::from(!last) | if shape & 1 == 0 || last { 2 } else { 0 };
    let sound = match index {
        0 => Descriptor { addr: HEADER, len: 16, flags: u16::from(!last), next: 1 },
        _ => Descriptor {
            addr: 0x8000 + 0x1000 * u64::from(index),
            len: if last { 1 } else { 512 * u32::from(shape >> 5) },
            flags,
            next: u16::from(index + 1),
        },
    };
    match shape >> 1 & 0xf {
        0 => Descriptor { addr: input.u64(), ..sound },
        1 => Descriptor { len: input.u32(), ..sound },
        2 => Descriptor { flags: input.u16(), ..sound },
        3 => Descriptor { next: input.u16() % (QUEUE_SIZE + 1), ..sound },
        _ => sound,
    }
}
