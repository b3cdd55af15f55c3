//! The device against a driver, sound or hostile.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::backend::block::rig::{AVAILABLE, Descriptor, MEMORY, QUEUE_SIZE, Rig, SECTORS, USED};

const HEADER: u64 = 0x4000;
const DATA: u64 = 0x8000;
const STATUS: u64 = 0x7000;
/// Flags of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Flag in the used ring: the device wants no kicks.
const NO_NOTIFY: u16 = 1;
/// Types of request, and an unknown one.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNKNOWN: u32 = 77;
/// Statuses, and the byte that is there before the device writes one.
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const UNTOUCHED: u8 = 0xee;

fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { addr, len, flags, next }
}

fn header(rig: &Rig, kind: u32, sector: u64) {
    rig.memory.write_obj(u64::from(kind), GuestAddress(HEADER)).expect("header");
    rig.memory.write_obj(sector, GuestAddress(HEADER + 8)).expect("header");
    rig.memory.write_obj(UNTOUCHED, GuestAddress(STATUS)).expect("status");
}

fn status(rig: &Rig) -> u8 {
    rig.memory.read_obj(GuestAddress(STATUS)).expect("status")
}

/// Sends a request with a header, data and a status, and returns the status and the used length.
fn request(rig: &mut Rig, kind: u32, sector: u64, data: Descriptor) -> (u8, u32) {
    header(rig, kind, sector);
    let before = rig.used().0;
    rig.offer(&[
        descriptor(HEADER, 16, NEXT, 1),
        Descriptor { flags: data.flags | NEXT, next: 2, ..data },
        descriptor(STATUS, 1, WRITE, 0),
    ]);
    rig.process();
    let (used, length) = rig.used();
    assert_eq!(used, before.wrapping_add(1), "each request is answered");
    (status(rig), length)
}

/// Offers `chain` with the header of a read in memory. Returns the number of used chains, the status and the used length.
fn chain(rig: &mut Rig, chain: &[Descriptor]) -> (u16, u8, u32) {
    rig.restart();
    header(rig, IN, 0);
    rig.offer(chain);
    rig.process();
    let (used, length) = rig.used();
    (used, status(rig), length)
}

#[test]
fn reads_writes_and_flushes_do_what_they_say() {
    for mut rig in Rig::all() {
        assert_eq!(request(&mut rig, IN, 7, descriptor(DATA, 1024, WRITE, 0)), (OK, 1025));
        let mut data = [0; 1024];
        rig.memory.read_slice(&mut data, GuestAddress(DATA)).expect("data");
        assert_eq!((data[0], data[511], data[512], data[1023]), (7, 7, 8, 8));
        assert_eq!(request(&mut rig, OUT, 3, descriptor(DATA, 512, 0, 0)), (OK, 1));
        assert_eq!((rig.content()[3 * 512], rig.content()[4 * 512]), (7, 4));
        assert_eq!(request(&mut rig, FLUSH, 0, descriptor(DATA, 0, 0, 0)), (OK, 1));
        assert_eq!(request(&mut rig, GET_ID, 0, descriptor(DATA, 20, WRITE, 0)).0, OK);
    }
}

#[test]
fn sectors_beyond_the_disk_and_odd_sizes_are_errors() {
    for mut rig in Rig::all() {
        let before = rig.content();
        for (kind, flags) in [(IN, WRITE), (OUT, 0)] {
            for (sector, len) in [
                (SECTORS, 512),
                (SECTORS - 1, 1024),
                (u64::MAX, 512),
                (1 << 55, 512),
                (u64::MAX / 512, 512),
                (0, 511),
                (0, 513),
            ] {
                let answer = request(&mut rig, kind, sector, descriptor(DATA, len, flags, 0));
                assert_eq!(answer, (IOERR, 1), "{kind} {sector} {len}");
            }
        }
        assert_eq!(rig.content(), before);
        assert_eq!(request(&mut rig, UNKNOWN, 0, descriptor(DATA, 512, 0, 0)), (UNSUPP, 1));
    }
}

#[test]
fn memory_that_the_sibling_does_not_have_is_an_error() {
    for mut rig in Rig::all() {
        let end = MEMORY as u64;
        for addr in [end, end - 511, u64::MAX - 511, u64::MAX, 1 << 63] {
            for (kind, flags) in [(IN, WRITE), (OUT, 0)] {
                let answer = request(&mut rig, kind, 0, descriptor(addr, 512, flags, 0));
                assert_eq!(answer, (IOERR, 1), "{addr:#x}");
            }
        }
        // The queue goes on when the status cannot be written.
        let lost = [descriptor(HEADER, 16, NEXT, 1), descriptor(end, 1, WRITE, 0)];
        assert_eq!(chain(&mut rig, &lost), (1, UNTOUCHED, 0));
        let header_elsewhere = [descriptor(end, 16, NEXT, 1), descriptor(STATUS, 1, WRITE, 0)];
        assert_eq!(chain(&mut rig, &header_elsewhere), (1, IOERR, 1));
    }
}

#[test]
fn huge_and_empty_descriptors_are_survived() {
    for mut rig in Rig::all() {
        for (kind, flags) in [(IN, WRITE), (OUT, 0), (GET_ID, WRITE), (DISCARD, 0), (WRITE_ZEROES, 0)] {
            let answer = request(&mut rig, kind, 0, descriptor(DATA, 0x8000_0000, flags, 0));
            assert_eq!(answer, (IOERR, 1), "{kind}");
            // More than 4 GiB in all: no chain may have that (virtio 1.2, 2.7.4.2), and its end is not seen.
            let answer = request(&mut rig, kind, 0, descriptor(DATA, u32::MAX, flags, 0));
            assert_eq!(answer, (UNTOUCHED, 0), "{kind}");
            assert!(rig.is_running());
        }
        assert_eq!(request(&mut rig, IN, 0, descriptor(u64::MAX, 0, WRITE, 0)), (OK, 1));
        let empty = [descriptor(HEADER, 0, NEXT, 1), descriptor(STATUS, 1, WRITE, 0)];
        assert_eq!(chain(&mut rig, &empty), (1, IOERR, 1));
        let short = [descriptor(HEADER, 15, NEXT, 1), descriptor(STATUS, 1, WRITE, 0)];
        assert_eq!(chain(&mut rig, &short), (1, IOERR, 1));
    }
}

#[test]
fn loops_and_chains_that_lead_nowhere_end() {
    for mut rig in Rig::all() {
        let endless: [&[Descriptor]; 4] = [
            &[descriptor(HEADER, 16, NEXT, 0)],
            &[descriptor(HEADER, 16, NEXT, 1), descriptor(DATA, 512, NEXT | WRITE, 1)],
            &[descriptor(HEADER, 16, NEXT, QUEUE_SIZE)],
            &[descriptor(HEADER, 16, NEXT, u16::MAX)],
        ];
        for descriptors in endless {
            let (used, status, _) = chain(&mut rig, descriptors);
            assert_eq!((used, status), (1, UNTOUCHED), "{descriptors:?}");
            assert!(rig.is_running());
        }
        // A table that contains itself, and one outside memory.
        for table in [DATA, MEMORY as u64] {
            let own = [table, 0x10 | u64::from(INDIRECT) << 32];
            if table == DATA {
                rig.memory.write_obj(own, GuestAddress(DATA)).expect("table");
            }
            let (used, ..) = chain(&mut rig, &[descriptor(table, 16, INDIRECT, 0)]);
            assert_eq!(used, 1);
            assert!(rig.is_running());
        }
        assert_eq!(request(&mut rig, IN, 0, descriptor(DATA, 512, WRITE, 0)), (OK, 513));
    }
}

#[test]
fn wrong_directions_and_missing_parts_are_errors() {
    for mut rig in Rig::all() {
        // The data of a read has to be writable, that of a write readable.
        assert_eq!(request(&mut rig, IN, 0, descriptor(DATA, 512, 0, 0)), (OK, 1));
        assert_eq!(request(&mut rig, OUT, 0, descriptor(DATA, 512, WRITE, 0)), (OK, 1));
        assert_eq!(rig.content()[0], 0, "nothing was written");
        let no_status = [descriptor(HEADER, 16, 0, 0)];
        assert_eq!(chain(&mut rig, &no_status), (1, UNTOUCHED, 0));
        let no_header = [descriptor(STATUS, 1, WRITE, 0)];
        assert_eq!(chain(&mut rig, &no_header), (1, IOERR, 1));
        let reversed = [
            descriptor(HEADER, 16, NEXT, 1),
            descriptor(STATUS, 1, WRITE | NEXT, 2),
            descriptor(DATA, 512, 0, 0),
        ];
        assert_eq!(chain(&mut rig, &reversed), (1, IOERR, 1));
    }
}

#[test]
fn ranges_to_zero_that_lie_change_nothing() {
    for mut rig in Rig::all() {
        let before = rig.content();
        let record = |sector: u64, sectors: u32, flags: u32| {
            [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        for kind in [DISCARD, WRITE_ZEROES] {
            for (bytes, want) in [
                (record(0, 0, 0), IOERR),
                (record(SECTORS, 1, 0), IOERR),
                (record(u64::MAX, 1, 0), IOERR),
                (record(0, u32::MAX, 0), IOERR),
                (record(0, 1, 0x80), UNSUPP),
                (record(1, 1, 0)[..15].to_vec(), IOERR),
                // If one range is wrong, none is carried out.
                ([record(1, 1, 0), record(SECTORS, 1, 0)].concat(), IOERR),
                (record(1, 1, 0).repeat(1000), IOERR),
            ] {
                rig.memory.write_slice(&bytes, GuestAddress(DATA)).expect("ranges");
                let len = u32::try_from(bytes.len()).expect("small");
                assert_eq!(request(&mut rig, kind, 0, descriptor(DATA, len, 0, 0)), (want, 1), "{bytes:?}");
            }
        }
        assert_eq!(rig.content(), before);
        rig.memory.write_slice(&record(1, 2, 0), GuestAddress(DATA)).expect("range");
        assert_eq!(request(&mut rig, WRITE_ZEROES, 0, descriptor(DATA, 16, 0, 0)), (OK, 1));
        assert_eq!((rig.content()[512], rig.content()[1024], rig.content()[1536]), (0, 0, 3));
    }
}

#[test]
fn an_available_index_that_jumps_stops_the_queue_and_no_other_is_harmed() {
    for mut rig in Rig::all() {
        rig.memory.write_obj(QUEUE_SIZE + 1, GuestAddress(AVAILABLE + 2)).expect("index");
        rig.process();
        assert!(!rig.is_running());
        rig.process();
        rig.restart();
        assert_eq!(request(&mut rig, IN, 1, descriptor(DATA, 512, WRITE, 0)), (OK, 513));
    }
}

/// Waits until the used index is `want`.
fn wait_for_used(memory: &GuestMemoryMmap, want: u16) {
    let far = Instant::now() + Duration::from_secs(20);
    let used = || memory.load::<u16>(GuestAddress(USED + 2), Ordering::Acquire).expect("used index");
    while used() != want {
        assert!(Instant::now() < far, "{} requests are done, want {want}", used());
        std::thread::yield_now();
    }
}

#[test]
fn a_request_that_comes_soon_needs_no_notification() {
    let mut rig = Rig::with_poll(Duration::from_secs(60));
    // However late this machine runs the thread that makes the next request.
    rig.widen_window();
    header(&rig, IN, 1);
    rig.offer(&[
        descriptor(HEADER, 16, NEXT, 1),
        descriptor(DATA, 512, WRITE | NEXT, 2),
        descriptor(STATUS, 1, WRITE, 0),
    ]);
    let (memory, interrupt) = (rig.memory.clone(), rig.interrupt.clone());
    std::thread::scope(|scope| {
        // The thread handles one kick during all this time.
        scope.spawn(|| rig.process());
        for available in 2..=5u16 {
            wait_for_used(&memory, available - 1);
            let flags: u16 = memory.read_obj(GuestAddress(USED)).expect("flags");
            assert_eq!(flags, NO_NOTIFY, "the driver is not asked for notifications");
            memory.store(available, GuestAddress(AVAILABLE + 2), Ordering::Release).expect("available index");
        }
        wait_for_used(&memory, 5);
        interrupt.store(true, Ordering::Relaxed);
    });
}

#[test]
fn after_a_look_in_vain_notifications_are_on() {
    let mut rig = Rig::with_poll(Duration::from_micros(1));
    for sector in 0..3 {
        assert_eq!(request(&mut rig, IN, sector, descriptor(DATA, 512, WRITE, 0)), (OK, 513));
        assert_eq!(rig.memory.read_obj::<u16>(GuestAddress(USED)).expect("flags"), 0);
    }
}

#[test]
fn a_driver_without_front_end_is_not_served() {
    let mut rig = Rig::with_poll(Duration::from_secs(60));
    rig.interrupt.store(true, Ordering::Relaxed);
    header(&rig, IN, 0);
    rig.offer(&[descriptor(HEADER, 16, NEXT, 1), descriptor(STATUS, 1, WRITE, 0)]);
    rig.process();
    assert_eq!(rig.used().0, 0);
}
