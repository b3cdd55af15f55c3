//! Feeds the block back-end descriptor chains and rings of a hostile driver in the sibling, in queues of every size, with
//! and without event indices, tracking and flushes, while the disk fails.

#![no_main]

use std::cell::RefCell;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vvu::backend::block::hostile_driver::{
    AVAILABLE, Agreed, BOUNDARY, BUFFERS, DESCRIPTORS, DiskFault, HostileDriver, MEMORY, USED, descriptor,
};

/// Most commands in one execution.
const COMMANDS: usize = 24;
/// Address of the request header.
const HEADER: u64 = BUFFERS;
/// Address of an indirect table.
const INDIRECT: u64 = BUFFERS + 0x400;
/// Address of the data of a request that is sound.
const DATA: u64 = BOUNDARY - 0x200;

#[derive(Arbitrary, Debug)]
struct Setup {
    size_log2: u8,
    event_idx: bool,
    flush: bool,
    read_only: bool,
    two_regions: bool,
    tracked: bool,
    /// The region of in-flight requests is for rings of another size.
    other_region: bool,
    base: u16,
}

#[derive(Arbitrary, Debug)]
enum Command {
    /// The driver makes a request of header, data and status.
    Sound {
        kind: u8,
        sector: u8,
        sectors: u8,
        indirect: bool,
    },
    /// The driver writes ranges to discard or to zero, and makes a request of them.
    Ranges {
        discard: bool,
        ranges: Vec<(u8, u8, u8)>,
    },
    /// The driver writes a header and data.
    Header {
        kind: u16,
        sector: u64,
        data: Vec<u8>,
    },
    /// The driver makes a chain.
    Chain {
        head: u8,
        indirect: bool,
        descriptors: Vec<Descriptor>,
    },
    /// The driver offers a chain that is there already.
    Offer(u8),
    /// The driver overwrites rings, descriptors or buffers.
    Overwrite {
        place: u8,
        offset: u16,
        data: u64,
    },
    /// The driver overwrites an index or a wish for notifications.
    Ring {
        field: u8,
        value: u16,
    },
    /// The front-end overwrites the region of in-flight requests.
    Region {
        offset: u16,
        data: u64,
    },
    Process,
    /// Another back-end takes over.
    Resume,
    Fault(Fault),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Fault {
    Read,
    Write,
    ShortWrite,
    ShortRead,
    Flush,
    Allocate,
    NoAllocate,
}

/// A descriptor that is mostly one of a sound chain.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Descriptor {
    lie: Lie,
    sectors: u8,
    write: bool,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Lie {
    None,
    Addr(u64),
    Len(u32),
    Flags(u16),
    Next(u16),
}

fuzz_target!(|input: (Setup, Vec<Command>)| DRIVER.with_borrow_mut(|driver| run(driver, input.0, input.1)));

thread_local! {
    static DRIVER: RefCell<HostileDriver> = RefCell::new(HostileDriver::new().expect("driver"));
}

fn run(driver: &mut HostileDriver, setup: Setup, commands: Vec<Command>) {
    let size = 1 << (setup.size_log2 % 11);
    let agreed = Agreed {
        size,
        event_idx: setup.event_idx,
        flush: setup.flush,
        read_only: setup.read_only,
        two_regions: setup.two_regions,
        tracked: match (setup.tracked, setup.other_region) {
            (false, _) => 0,
            (true, false) => size,
            (true, true) => 16,
        },
        base: setup.base,
    };
    driver.restart(agreed);
    for command in commands.into_iter().take(COMMANDS) {
        carry_out(driver, size, command);
    }
    driver.process();
    // A queue that stopped with an error works after a restart.
    driver.restart(agreed);
    driver.write(HEADER, &[0; 16]);
    let table: Vec<_> = sound_chain(1, 1).into_iter().flatten().collect();
    driver.write(INDIRECT, &table);
    driver.describe(0, INDIRECT, 48, 4, 0);
    driver.offer(0);
    assert!(driver.process(), "a sound request does not break a queue");
    assert_eq!(driver.used(), (setup.base.wrapping_add(1), [0, 513]));
}

fn carry_out(driver: &mut HostileDriver, size: u16, command: Command) {
    match command {
        Command::Sound { kind, sector, sectors, indirect } => {
            let mut header = u64::from(kind % 16).to_le_bytes().to_vec();
            header.extend(u64::from(sector).to_le_bytes());
            driver.write(HEADER, &header);
            let is_write = matches!(kind % 16, 1 | 11 | 13);
            offer(
                driver,
                size,
                0,
                indirect,
                sound_chain(sectors % 16, if is_write { 0 } else { 1 }).to_vec(),
            );
            driver.process();
        }
        Command::Ranges { discard, ranges } => {
            let mut header = if discard { 11u64 } else { 13 }.to_le_bytes().to_vec();
            header.extend([0; 8]);
            driver.write(HEADER, &header);
            let count = u32::try_from(ranges.len().min(40)).expect("few");
            for (at, (sector, sectors, flags)) in (0..40).zip(ranges) {
                let mut range = u64::from(sector).to_le_bytes().to_vec();
                range.extend(u32::from(sectors).to_le_bytes());
                range.extend(u32::from(flags & 3).to_le_bytes());
                driver.write(DATA + 16 * at, &range);
            }
            let chain = [
                descriptor(HEADER, 16, 1, 1),
                descriptor(DATA, 16 * count, 1, 2),
                descriptor(HEADER + 0x300, 1, 2, 0),
            ];
            offer(driver, size, 0, true, chain.to_vec());
            driver.process();
        }
        Command::Header { kind, sector, data } => {
            let mut header = u64::from(kind).to_le_bytes().to_vec();
            header.extend(sector.to_le_bytes());
            header.extend(data);
            driver.write(HEADER, &header);
        }
        Command::Chain { head, indirect, descriptors } => {
            let count = descriptors.len();
            let chain = descriptors.into_iter().enumerate().map(|(index, it)| it.bytes(index, count, head));
            offer(driver, size, head, indirect, chain.take(32).collect());
        }
        Command::Offer(head) => driver.offer(head.into()),
        Command::Overwrite { place, offset, data } => {
            let base = [DESCRIPTORS, AVAILABLE, USED, BUFFERS][usize::from(place % 4)];
            driver.write(base + u64::from(offset % 0x4000), &data.to_le_bytes());
        }
        Command::Ring { field, value } => {
            let event = 4 + u64::from(size) * if field & 1 == 0 { 2 } else { 8 };
            let ring = if field & 1 == 0 { AVAILABLE } else { USED };
            let offset = [0, 2, event, 4][usize::from(field >> 1 & 3)];
            driver.write(ring + offset, &value.to_le_bytes());
        }
        Command::Region { offset, data } => driver.write_region(offset % 0x200, &data.to_le_bytes()),
        Command::Process => {
            driver.process();
        }
        Command::Resume => driver.resume(),
        Command::Fault(fault) => driver.inject(match fault {
            Fault::Read => DiskFault::Read,
            Fault::Write => DiskFault::Write,
            Fault::ShortWrite => DiskFault::ShortWrite,
            Fault::ShortRead => DiskFault::ShortRead,
            Fault::Flush => DiskFault::Flush,
            Fault::Allocate => DiskFault::Allocate,
            Fault::NoAllocate => DiskFault::NoAllocate,
        }),
    }
}

/// Header, data and status.
fn sound_chain(sectors: u8, write: u16) -> [[u8; 16]; 3] {
    [
        descriptor(HEADER, 16, 1, 1),
        descriptor(DATA, 512 * u32::from(sectors), 1 | write << 1, 2),
        descriptor(HEADER + 0x300, 1, 2, 0),
    ]
}

/// Makes a chain available, in the queue's table from `head` on or in an indirect one.
fn offer(driver: &mut HostileDriver, size: u16, head: u8, indirect: bool, chain: Vec<[u8; 16]>) {
    if indirect {
        let len = u32::try_from(16 * chain.len()).expect("short");
        driver.write(INDIRECT, &chain.concat());
        driver.describe(u16::from(head) % size, INDIRECT, len, 4, 0);
    } else {
        driver.write(DESCRIPTORS + 16 * u64::from(head), &chain.concat());
    }
    driver.offer(u16::from(head) % if indirect { size } else { u16::MAX });
}

impl Descriptor {
    fn bytes(self, index: usize, count: usize, head: u8) -> [u8; 16] {
        let at = u16::try_from(index).expect("few");
        let is_last = index + 1 == count;
        let addr = if index == 0 { HEADER } else { DATA + 0x1000 * u64::from(at - 1) };
        let len = match index {
            0 => 16,
            _ if is_last => 1,
            _ => 512 * u32::from(self.sectors % 8),
        };
        let flags = u16::from(!is_last) | if is_last || self.write && index > 0 { 2 } else { 0 };
        let next = u16::from(head) + at + 1;
        match self.lie {
            Lie::None => descriptor(addr % MEMORY, len, flags, next),
            Lie::Addr(addr) => descriptor(addr, len, flags, next),
            Lie::Len(len) => descriptor(addr, len, flags, next),
            Lie::Flags(flags) => descriptor(addr, len, flags, next),
            Lie::Next(next) => descriptor(addr, len, flags, next),
        }
    }
}
