//! Every ring that a driver may set up, filled with requests of every length.

use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::common::{Descriptor, Driver, INDIRECT, NEXT, Setup, SiblingMemory, WRITE, pattern};
use crate::{DATA, memory, start};

/// Bytes of a piece of memory in a request.
const PIECE: u64 = 512;
/// Most pieces in a request.
const PIECES_MAX: u64 = 126;
/// Requests in flight at a time. Each has memory and a part of the disk to itself.
const IN_FLIGHT: u64 = 16;
/// Bytes of the disk for each of them.
const PART: u64 = 64 << 10;
/// Bytes of memory for each of them: the data, and the table of indirect descriptors at its end.
const SLOT: u64 = 0x1_2000;
const TABLE: u64 = 0x1_1000;
/// How often each ring is filled.
const ROUNDS: u64 = 6;

/// Small random numbers, the same in each run.
struct Random(u64);

impl Random {
    /// A number below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % end
    }
}

/// A request that is in the ring.
struct Request {
    writes: bool,
    /// Bytes of data, where they are on the disk, and where in memory.
    len: usize,
    at: usize,
    data: u64,
}

/// A driver of one queue, with what the disk has to hold.
struct Load<'a> {
    driver: &'a mut Driver,
    memory: Arc<SiblingMemory>,
    disk: &'a mut Vec<u8>,
    random: Random,
    indirect: bool,
    size: u16,
}

impl Load<'_> {
    /// Fills the ring, awaits every request, and checks what it did.
    fn round(&mut self, round: u64) {
        let free = self.driver.rings[0].snapshot();
        let before = self.driver.rings[0].next_avail();
        let mut left = usize::from(self.size);
        let mut requests = Vec::new();
        for slot in 0..IN_FLIGHT {
            // The first request is as long as any can be.
            let pieces = if slot == 0 { self.longest() } else { 1 + self.random.below(self.longest()) };
            let needed = if self.indirect { 1 } else { usize::try_from(pieces).expect("few") + 2 };
            if !requests.is_empty() && needed > left {
                break;
            }
            let (request, parts) = self.request(slot, round, pieces);
            let parts = if self.indirect { self.indirect(slot, &parts) } else { parts };
            left -= parts.len();
            requests.push((self.push(&parts), request));
        }
        if self.driver.rings[0].wants_kick(&self.memory, before) {
            self.driver.rings[0].kick();
        }
        for _ in 0..requests.len() {
            let (head, used) = self.driver.rings[0].wait(&self.memory).expect("every request comes back");
            let found = requests.iter().find(|(its, _)| *its == head);
            self.check(&found.expect("a request that was sent").1, used);
        }
        self.driver.rings[0].restore(free);
    }

    /// Pieces of data in the longest request that fits into the ring.
    fn longest(&self) -> u64 {
        if self.indirect { PIECES_MAX } else { u64::from(self.size).saturating_sub(2).clamp(1, PIECES_MAX) }
    }

    /// A random request, and its pieces of memory: address, length, whether the device writes.
    fn request(&mut self, slot: u64, round: u64, pieces: u64) -> (Request, Vec<(u64, u64, bool)>) {
        // A ring of two descriptors has room for a request whose header or status is in one piece with the data.
        let merged = self.size == 2 && !self.indirect;
        let sectors = (PART - pieces * PIECE) / PIECE + 1;
        let at = slot * PART + self.random.below(sectors) * PIECE;
        let writes = self.random.below(2) == 0;
        let data = DATA + slot * SLOT + 0x1000;
        let len = usize::try_from(pieces * PIECE).expect("length");
        let at = usize::try_from(at).expect("offset");
        let request = Request { writes, len, at, data };

        let kind = if writes { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
        let sector = at as u64 / PIECE;
        self.memory.write(data - 16, &[kind.to_le_bytes(), [0; 4]].concat());
        self.memory.write(data - 8, &sector.to_le_bytes());
        self.memory.write(data + len as u64, &[0xff]);
        if writes {
            let content = pattern(round * IN_FLIGHT + slot, len);
            self.memory.write(data, &content);
            self.disk[at..at + len].copy_from_slice(&content);
        } else {
            self.memory.write(data, &vec![0; len]);
        }
        let (header, status) = ((data - 16, 16), (data + len as u64, 1));
        let parts = match (merged, writes) {
            (true, true) => vec![(header.0, 16 + len as u64, false), (status.0, 1, true)],
            (true, false) => vec![(header.0, 16, false), (data, len as u64 + 1, true)],
            (false, _) => {
                let piece = |piece| (data + piece * PIECE, PIECE, !writes);
                let all = [(header.0, header.1, false)].into_iter().chain((0..pieces).map(piece));
                all.chain([(status.0, status.1, true)]).collect()
            }
        };
        (request, parts)
    }

    /// Puts the pieces into a table of their own, and returns the one descriptor that leads to it.
    fn indirect(&self, slot: u64, parts: &[(u64, u64, bool)]) -> Vec<(u64, u64, bool)> {
        let table = DATA + slot * SLOT + TABLE;
        for (index, descriptor) in (0..).zip(descriptors(parts, |index| index)) {
            self.memory.write(table + index * 16, &descriptor.to_bytes());
        }
        vec![(table, parts.len() as u64 * 16, false)]
    }

    /// Makes a request available.
    fn push(&mut self, parts: &[(u64, u64, bool)]) -> u16 {
        let ring = &mut self.driver.rings[0];
        let indices: Vec<u16> = parts.iter().map(|_| ring.allocate()).collect();
        let chain = descriptors(parts, |index| indices[usize::from(index)]);
        for (index, mut descriptor) in indices.iter().zip(chain) {
            descriptor.flags |= if self.indirect { INDIRECT } else { 0 };
            ring.store(&self.memory, *index, descriptor);
        }
        ring.push(&self.memory, indices[0]);
        indices[0]
    }

    fn check(&self, request: &Request, used: u32) {
        let Request { writes, len, at, data } = *request;
        let size = self.size;
        let status = self.memory.read(data + len as u64, 1)[0];
        let written = if writes { 1 } else { len + 1 };
        assert_eq!((status, usize::try_from(used)), (0, Ok(written)), "ring of {size}: {len} bytes at {at}");
        if !writes {
            assert!(
                self.memory.read(data, len) == self.disk[at..at + len],
                "ring of {size}: {len} bytes at {at}"
            );
        }
    }
}

/// A chain of descriptors for `parts`, the ones of which are at `index`.
fn descriptors(parts: &[(u64, u64, bool)], index: impl Fn(u16) -> u16) -> Vec<Descriptor> {
    let last = parts.len() - 1;
    let descriptor = |(position, (addr, len, device_writes)): (usize, &(u64, u64, bool))| {
        let next =
            if position == last { 0 } else { index(u16::try_from(position + 1).expect("short chain")) };
        let flags = if position == last { 0 } else { NEXT } | if *device_writes { WRITE } else { 0 };
        Descriptor { addr: *addr, len: u32::try_from(*len).expect("length"), flags, next }
    };
    parts.iter().enumerate().map(descriptor).collect()
}

/// Fills rings of every size, with and without event indices and indirect descriptors, again and again with verified
/// reads and writes, up to the longest that fit.
fn every_ring_is_served(poll: Duration) {
    let mut disk = pattern(40, usize::try_from(IN_FLIGHT * PART).expect("size"));
    let backend = start(&disk, |options| {
        options.poll = poll;
        options.segments = u16::try_from(PIECES_MAX).expect("few");
    });
    let memory = memory();
    let bits = [0, 1 << VIRTIO_RING_F_EVENT_IDX, 1 << VIRTIO_RING_F_INDIRECT_DESC];
    for size in (1..=10).map(|power| 1 << power) {
        for without in [bits[0], bits[1], bits[2], bits[1] | bits[2]] {
            let setup = Setup { queue_size: size, without, ..Setup::default() };
            let mut driver = backend.connect(&memory, setup);
            let mut load = Load {
                driver: &mut driver,
                memory: Arc::clone(&memory),
                disk: &mut disk,
                random: Random(u64::from(size) << 32 | without),
                indirect: without & bits[2] == 0,
                size,
            };
            (0..ROUNDS).for_each(|round| load.round(round));
        }
    }
    assert!(backend.content() == disk, "the disk holds what was written");
    backend.end();
}

#[test]
fn every_ring_is_served_with_notifications() {
    every_ring_is_served(Duration::ZERO);
}

#[test]
fn every_ring_is_served_while_the_back_end_polls() {
    every_ring_is_served(Duration::from_millis(2));
}
