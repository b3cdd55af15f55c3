//! Drivers and front-ends break the rules.

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use crate::common::{DEADLINE, Descriptor, Driver, INDIRECT, NEXT, Setup, WRITE, pattern};
use crate::{DATA, memory, start};

#[test]
fn an_indirect_table_is_followed_once() {
    let content = pattern(10, 4096);
    let backend = start(&content, |_| {});
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup::default());
    let table = DATA + 0x8000;
    let header = Driver::header(&memory, 0, 0);
    let read = |addr, len, flags, next| Descriptor { addr, len, flags, next }.to_bytes();
    memory.write(header, &[0; 17]);
    let direct =
        [read(header, 16, NEXT, 1), read(DATA, 4096, NEXT | WRITE, 2), read(header + 16, 1, WRITE, 0)];
    memory.write(table, &direct.concat());
    let ring = &mut driver.rings[0];
    ring.store(&memory, 0, Descriptor { addr: table, len: 48, flags: INDIRECT, next: 0 });
    ring.push(&memory, 0);
    ring.kick();
    assert_eq!(ring.wait(&memory), Ok((0, 4097)));
    assert_eq!(memory.read(DATA, 4096), content);

    // A table within a table.
    memory.write(table, &read(table, 48, INDIRECT, 0));
    ring.store(&memory, 1, Descriptor { addr: table, len: 48, flags: INDIRECT, next: 0 });
    ring.push(&memory, 1);
    ring.kick();
    assert_eq!(ring.wait(&memory), Ok((1, 0)));
    backend.end();
}

/// No driver would make these chains. Each comes back, and the device goes on.
#[test]
fn hostile_chains_come_back_and_change_nothing() {
    let content = pattern(11, 64 << 10);
    let backend = start(&content, |_| {});
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup::default());
    let header = Driver::header(&memory, 0, 100);
    let write = |kind: u32, sector: u64| {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        bytes.push(0xff);
        memory.write(header, &bytes);
    };
    let d = |addr, len, flags, next| Descriptor { addr, len, flags, next };
    let head = d(header, 16, NEXT, 1);
    let status = d(header + 16, 1, WRITE, 0);
    type Case<'a> = (&'a str, u32, u64, &'a [Descriptor], (u32, u8));
    let cases: &[Case<'_>] = &[
        ("loop of one", 0, 0, &[d(header, 16, NEXT, 0)], (0, 0xff)),
        ("loop behind the header", 0, 0, &[head, d(DATA, 512, NEXT | WRITE, 1)], (1, 0xff)),
        ("next outside of the table", 0, 0, &[d(header, 16, NEXT, 500)], (0, 0xff)),
        ("no descriptor but the status", 0, 0, &[status], (1, 1)),
        ("no status", 1, 0, &[head, d(DATA, 512, 0, 0)], (0, 0xff)),
        ("short header", 0, 0, &[d(header, 15, NEXT, 1), status], (1, 1)),
        ("header of no memory", 0, 0, &[d(1 << 40, 16, NEXT, 1), status], (1, 1)),
        (
            "readable behind writable",
            1,
            0,
            &[head, d(DATA, 512, NEXT | WRITE, 2), d(DATA, 512, NEXT, 3), status],
            (1, 0xff),
        ),
        ("data outside of memory", 0, 0, &[head, d(1 << 40, 512, NEXT | WRITE, 2), status], (1, 1)),
        (
            "data at the end of the address space",
            0,
            0,
            &[head, d(u64::MAX - 255, 512, NEXT | WRITE, 2), status],
            (1, 1),
        ),
        ("data across the end of memory", 1, 0, &[head, d((4 << 20) - 256, 512, NEXT, 2), status], (1, 1)),
        ("huge data", 0, 0, &[head, d(0, u32::MAX - 511, NEXT | WRITE, 2), status], (1, 1)),
        (
            "more data than a chain may have",
            0,
            0,
            &[head, d(0, u32::MAX, NEXT | WRITE, 2), status],
            (0, 0xff),
        ),
        ("data of 511 bytes", 1, 0, &[head, d(DATA, 511, NEXT, 2), status], (1, 1)),
        ("sector past the end", 0, 128, &[head, d(DATA, 512, NEXT | WRITE, 2), status], (1, 1)),
        ("last sector and one more", 1, 127, &[head, d(DATA, 1024, NEXT, 2), status], (1, 1)),
        ("sector that overflows", 0, u64::MAX, &[head, d(DATA, 512, NEXT | WRITE, 2), status], (1, 1)),
        ("offset that overflows", 1, 1 << 55, &[head, d(DATA, 512, NEXT, 2), status], (1, 1)),
        (
            "status outside of memory",
            0,
            0,
            &[head, d(DATA, 512, NEXT | WRITE, 2), d(1 << 40, 1, WRITE, 0)],
            (0, 0xff),
        ),
        ("unknown request", 77, 0, &[head, status], (1, 2)),
        ("discard without a range", 11, 0, &[head, status], (1, 1)),
        ("discard of half a range", 11, 0, &[head, d(DATA, 8, NEXT, 2), status], (1, 1)),
        ("empty descriptors", 1, 0, &[head, d(0, 0, NEXT, 2), d(0, 0, NEXT | WRITE, 3), status], (1, 0)),
    ];
    for (name, kind, sector, chain, (used, want)) in cases {
        write(*kind, *sector);
        for (index, descriptor) in chain.iter().enumerate() {
            driver.rings[0].store(&memory, u16::try_from(index).expect("index"), *descriptor);
        }
        driver.rings[0].push(&memory, 0);
        driver.rings[0].kick();
        let got = driver.rings[0].wait(&memory).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((got, memory.read(header + 16, 1)[0]), ((0, *used), *want), "{name}");
    }
    driver.rings[0].restore((0..100).rev().collect());
    assert_eq!(driver.read(0, 0, DATA, 64 << 10), content);
    assert_eq!(backend.content(), content);
    backend.end();
}

/// A driver that breaks a ring loses that queue, until it starts the queue again. Its other queues go on.
#[test]
fn a_broken_ring_stops_one_queue_until_it_is_started_again() {
    let content = pattern(12, 4096);
    let backend = start(&content, |_| {});
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup { queues: 2, ..Setup::default() });
    assert_eq!(driver.read(0, 0, DATA, 4096), content);
    let far = driver.rings[0].next_avail().wrapping_add(1000);
    driver.rings[0].set_avail_index(&memory, far);
    driver.rings[0].kick();
    assert_eq!(driver.read(1, 0, DATA, 4096), content);

    // The device has to have seen the index before it is set right again.
    driver.frontend.get_vring_base(0).expect("stopped");
    let right = driver.rings[0].next_avail();
    driver.rings[0].set_avail_index(&memory, right);
    driver.start_queue(0).expect("started");
    assert_eq!(driver.read(0, 0, DATA, 4096), content);
    backend.end();
}

#[test]
fn a_front_end_that_breaks_the_protocol_costs_only_itself() {
    use std::io::{Read, Write};
    let backend = start(&pattern(16, 512), |_| {});
    for garbage in [&[0xff; 64][..], &[1, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], &[1, 0, 0]] {
        let mut stream = std::os::unix::net::UnixStream::connect(&backend.socket).expect("connect");
        stream.set_read_timeout(Some(DEADLINE)).expect("timeout");
        stream.write_all(garbage).expect("garbage");
        stream.shutdown(std::net::Shutdown::Write).expect("end");
        let mut rest = Vec::new();
        // A reset ends the connection as well.
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty());
    }
    // Ring addresses before the memory table, a queue size of 0, a queue that is too large.
    for attempt in 0..3 {
        let memory = memory();
        let mut driver = Driver::negotiate(&backend.socket, &memory, Setup::default()).expect("negotiation");
        let config = driver.rings[0].config(&memory);
        let refused = match attempt {
            0 => driver.frontend.set_vring_addr(0, &config),
            1 => driver.frontend.set_vring_num(0, 0),
            _ => driver.frontend.set_vring_num(0, 2048),
        };
        assert!(refused.is_err(), "attempt {attempt}");
        drop(driver.frontend.get_queue_num());
    }
    let memory = memory();
    backend.connect(&memory, Setup::default()).read(0, 0, DATA, 512);
    backend.end();
}
