//! What the driver was told is durable is on the disk, whatever the disk does and whenever the back-end dies.

use std::time::Duration;

use proptest::prelude::*;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress};

use super::disk::SECTOR_SIZE;
use super::faults::{Call, Fault};
use super::rig::{Descriptor, Rig, SECTORS, Way};

const HEADER: u64 = 0x4000;
const STATUS: u64 = 0x7000;
const DATA: u64 = 0x8000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const OK: u8 = 0;
const IOERR: u8 = 1;
const SECTOR: usize = SECTOR_SIZE as usize;
/// Sectors that take part: few, so that they are written again and again.
const TAKING_PART: usize = 8;
/// What a full, broken, over-quota or limited disk answers.
const ERRORS: [i32; 5] = [libc::ENOSPC, libc::EIO, libc::EDQUOT, libc::EFBIG, libc::EROFS];

/// Sends a request with `sectors` sectors of data in pieces of half a sector, and returns the status.
fn request(rig: &mut Rig, kind: u32, sector: usize, sectors: usize) -> u8 {
    rig.memory.write_obj(u64::from(kind), GuestAddress(HEADER)).expect("header");
    rig.memory.write_obj(sector as u64, GuestAddress(HEADER + 8)).expect("header");
    rig.memory.write_obj(0xffu8, GuestAddress(STATUS)).expect("status");
    let writes = if kind == VIRTIO_BLK_T_IN { WRITE } else { 0 };
    let names_range = matches!(kind, VIRTIO_BLK_T_WRITE_ZEROES | VIRTIO_BLK_T_DISCARD);
    let len = if names_range { 16 } else { u32::from(SECTOR_SIZE) / 2 };
    let pieces = if names_range { 1 } else { 2 * sectors as u64 };
    let piece =
        |index| Descriptor { addr: DATA + index * u64::from(len), len, flags: NEXT | writes, next: 0 };
    let mut chain = vec![Descriptor { addr: HEADER, len: 16, flags: NEXT, next: 0 }];
    chain.extend((0..pieces).map(piece));
    chain.push(Descriptor { addr: STATUS, len: 1, flags: WRITE, next: 0 });
    for (next, descriptor) in (1..).zip(&mut chain) {
        descriptor.next = next;
    }
    let before = rig.used().0;
    rig.offer(&chain);
    rig.process();
    assert_eq!(rig.used().0, before.wrapping_add(1), "each request is answered");
    assert!(rig.is_running());
    rig.memory.read_obj(GuestAddress(STATUS)).expect("status")
}

fn write(rig: &mut Rig, sector: usize, value: u8, sectors: usize) -> u8 {
    rig.memory.write_slice(&vec![value; sectors * SECTOR], GuestAddress(DATA)).expect("data");
    request(rig, VIRTIO_BLK_T_OUT, sector, sectors)
}

fn write_zeroes(rig: &mut Rig, sector: usize, sectors: u32) -> u8 {
    erase(rig, Erase::Zeroes { unmap: false }, sector, sectors)
}

/// How sectors lose what they hold.
#[derive(Clone, Copy, Debug)]
enum Erase {
    Zeroes {
        unmap: bool,
    },
    /// They may hold anything from then on.
    Discard,
}

fn erase(rig: &mut Rig, how: Erase, sector: usize, sectors: u32) -> u8 {
    let (kind, flags) = match how {
        Erase::Zeroes { unmap } => (VIRTIO_BLK_T_WRITE_ZEROES, u32::from(unmap)),
        Erase::Discard => (VIRTIO_BLK_T_DISCARD, 0),
    };
    rig.memory.write_obj(sector as u64, GuestAddress(DATA)).expect("range");
    rig.memory.write_obj(sectors, GuestAddress(DATA + 8)).expect("range");
    rig.memory.write_obj(flags, GuestAddress(DATA + 12)).expect("range");
    request(rig, kind, 0, 1)
}

fn flush(rig: &mut Rig) -> u8 {
    request(rig, VIRTIO_BLK_T_FLUSH, 0, 0)
}

/// The kernel reports a failed write-back once, and drops the data.
#[test]
fn after_a_failed_flush_nothing_is_durable_until_the_disk_is_opened_again() {
    for mut rig in Rig::engines() {
        assert_eq!(write(&mut rig, 0, 9, 1), OK);
        rig.faults().inject(Call::Flush, Fault::Error(libc::ENOSPC));
        assert_eq!(flush(&mut rig), IOERR);
        assert_eq!(flush(&mut rig), IOERR, "the next flush");
        // A new front-end, which may repeat a flush that was in flight.
        rig.reconnect(1 << VIRTIO_BLK_F_FLUSH);
        assert_eq!(flush(&mut rig), IOERR, "a flush of the next front-end");
        assert_eq!(write(&mut rig, 0, 9, 1), OK, "a write that promises nothing");
        rig.reconnect(0);
        assert_eq!(write(&mut rig, 0, 9, 1), IOERR, "a write that is durable when it is done");
        assert_eq!(write_zeroes(&mut rig, 0, 1), IOERR, "zeroes that are durable when they are done");
        assert_eq!(request(&mut rig, VIRTIO_BLK_T_IN, 0, 1), OK, "a read");
        rig.reopen();
        assert_eq!(flush(&mut rig), OK);
    }
}

#[test]
fn every_error_of_the_disk_is_an_error_of_the_request() {
    for (number, way) in
        ERRORS.into_iter().flat_map(|number| [Way::SYNC, Way::IO_URING].map(|way| (number, way)))
    {
        let new_rig = || Rig::with(way, Duration::ZERO);
        for (call, kind) in [
            (Call::Read, VIRTIO_BLK_T_IN),
            (Call::Write, VIRTIO_BLK_T_OUT),
            (Call::Flush, VIRTIO_BLK_T_FLUSH),
            (Call::Allocate, VIRTIO_BLK_T_WRITE_ZEROES),
        ] {
            let mut rig = new_rig();
            rig.memory.write_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], GuestAddress(DATA)).expect("range");
            rig.faults().inject(call, Fault::Error(number));
            assert_eq!(request(&mut rig, kind, 0, 1), IOERR, "{call:?} {number}");
        }
        // In the middle of a request.
        let mut rig = new_rig();
        for fault in [Fault::Short, Fault::Short, Fault::Error(number)] {
            rig.faults().inject(Call::Write, fault);
        }
        assert_eq!(write(&mut rig, 0, 9, 2), IOERR, "{number} after a short write");
        assert_eq!(rig.content()[SECTOR], 1, "the second sector was not reached");
        // Zeroes are written where the file system cannot make holes.
        rig.faults().clear();
        rig.faults().inject(Call::Allocate, Fault::Error(libc::ENOSPC));
        assert_eq!(write_zeroes(&mut rig, 4, 2), IOERR);
        assert_eq!(rig.content()[4 * SECTOR], 4);
    }
}

#[test]
fn short_transfers_are_completed() {
    for mut rig in Rig::engines() {
        for _ in 0..3 {
            rig.faults().inject(Call::Write, Fault::Short);
            rig.faults().inject(Call::Read, Fault::Short);
        }
        assert_eq!(write(&mut rig, 2, 9, 2), OK);
        assert_eq!(rig.content()[2 * SECTOR..4 * SECTOR], [9; 2 * SECTOR]);
        assert_eq!(request(&mut rig, VIRTIO_BLK_T_IN, 2, 2), OK);
        let mut data = [0; 2 * SECTOR];
        rig.memory.read_slice(&mut data, GuestAddress(DATA)).expect("data");
        assert_eq!(data, [9; 2 * SECTOR]);
    }
}

#[test]
fn a_disk_that_shrinks_gives_errors() {
    for mut rig in Rig::engines() {
        rig.resize((SECTORS - 1) * u64::from(SECTOR_SIZE));
        let last = usize::try_from(SECTORS).expect("small") - 1;
        assert_eq!(request(&mut rig, VIRTIO_BLK_T_IN, last, 1), IOERR);
        assert_eq!(request(&mut rig, VIRTIO_BLK_T_IN, last - 1, 2), IOERR);
        assert_eq!(request(&mut rig, VIRTIO_BLK_T_IN, last - 1, 1), OK);
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Writes, with errors at the write or at the flush that follows it if writes are durable when they are done.
    Write {
        sector: usize,
        sectors: usize,
        write_fails: Option<usize>,
        flush_fails: Option<(usize, u8)>,
    },
    /// Erases sectors, with errors as for a write.
    Erase {
        how: Erase,
        sector: usize,
        sectors: usize,
        erase_fails: Option<usize>,
        flush_fails: Option<(usize, u8)>,
    },
    Flush {
        fails: Option<(usize, u8)>,
    },
    Read {
        sector: usize,
    },
    Kill,
}

fn step() -> impl Strategy<Value = Step> {
    let error = || 0..ERRORS.len();
    let failed_flush = || prop::option::weighted(0.15, (error(), any::<u8>()));
    let write = (0..TAKING_PART - 1, 1..=2usize, prop::option::weighted(0.15, error()), failed_flush());
    let how = prop_oneof![any::<bool>().prop_map(|unmap| Erase::Zeroes { unmap }), Just(Erase::Discard)];
    let erase = (how, 0..TAKING_PART - 1, 1..=2usize, prop::option::weighted(0.15, error()), failed_flush());
    prop_oneof![
        3 => erase.prop_map(|(how, sector, sectors, erase_fails, flush_fails)| {
            Step::Erase { how, sector, sectors, erase_fails, flush_fails }
        }),
        6 => write.prop_map(|(sector, sectors, write_fails, flush_fails)| {
            Step::Write { sector, sectors, write_fails, flush_fails }
        }),
        3 => failed_flush().prop_map(|fails| Step::Flush { fails }),
        1 => (0..TAKING_PART).prop_map(|sector| Step::Read { sector }),
        1 => Just(Step::Kill),
    ]
}

/// A disk that drops writes which it cannot make durable, and what the driver may expect of it.
struct Model {
    rig: Rig,
    features: u64,
    /// For each sector the bytes that it may consist of, if all writes that were acknowledged are there.
    expected: Vec<Vec<u8>>,
    /// What is on the disk itself, where `rig.content()` is what is in the page cache.
    durable: Vec<u8>,
}

impl Model {
    fn new(way: Way, features: u64) -> Self {
        let mut rig = Rig::with(way, Duration::ZERO);
        rig.reconnect(features);
        let durable = rig.content();
        let expected = (0..8).map(|sector| vec![sector]).collect();
        Self { rig, features, expected, durable }
    }

    fn is_write_through(&self) -> bool {
        self.features & 1 << VIRTIO_BLK_F_FLUSH == 0
    }

    /// The disk refuses what is not durable yet; of that, the page cache drops the sectors in `lost`.
    fn lose(&mut self, lost: u8) {
        let mut content = self.rig.content();
        for sector in (0..TAKING_PART).filter(|sector| lost & 1 << sector != 0) {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            content[range.clone()].copy_from_slice(&self.durable[range]);
        }
        self.rig.set_content(&content);
    }

    /// The driver was told that everything is durable.
    fn promised(&mut self) -> Result<(), TestCaseError> {
        let content = self.rig.content();
        for (sector, expected) in self.expected.iter().enumerate() {
            let got = &content[sector * SECTOR..(sector + 1) * SECTOR];
            prop_assert!(
                got.iter().all(|byte| expected.contains(byte)),
                "sector {sector} has {}, want {expected:?}",
                got[0]
            );
        }
        self.durable = content;
        Ok(())
    }

    fn step(&mut self, step: &Step, value: u8) -> Result<(), TestCaseError> {
        self.rig.faults().clear();
        match *step {
            Step::Write { sector, sectors, write_fails, flush_fails } => {
                let flush_fails = flush_fails.filter(|_| self.is_write_through() && write_fails.is_none());
                if let Some(error) = write_fails {
                    self.rig.faults().inject(Call::Write, Fault::Short);
                    self.rig.faults().inject(Call::Write, Fault::Error(ERRORS[error]));
                }
                if let Some((error, _)) = flush_fails {
                    self.rig.faults().inject(Call::Flush, Fault::Error(ERRORS[error]));
                }
                let status = write(&mut self.rig, sector, value, sectors);
                for expected in &mut self.expected[sector..sector + sectors] {
                    if status == OK {
                        expected.clear();
                    }
                    expected.push(value);
                }
                prop_assert!(status != OK || write_fails.is_none() && flush_fails.is_none());
                if let Some((_, lost)) = flush_fails {
                    self.lose(lost);
                }
                if status == OK && self.is_write_through() {
                    self.promised()?;
                }
            }
            Step::Erase { how, sector, sectors, erase_fails, flush_fails } => {
                let flush_fails = flush_fails.filter(|_| self.is_write_through() && erase_fails.is_none());
                if let Some(error) = erase_fails {
                    self.rig.faults().inject(Call::Allocate, Fault::Error(ERRORS[error]));
                }
                if let Some((error, _)) = flush_fails {
                    self.rig.faults().inject(Call::Flush, Fault::Error(ERRORS[error]));
                }
                let status = erase(&mut self.rig, how, sector, u32::try_from(sectors).expect("few"));
                for expected in &mut self.expected[sector..sector + sectors] {
                    match how {
                        Erase::Zeroes { .. } if status == OK => *expected = vec![0],
                        Erase::Zeroes { .. } => expected.push(0),
                        Erase::Discard => *expected = (0..=u8::MAX).collect(),
                    }
                }
                prop_assert!(status != OK || erase_fails.is_none() && flush_fails.is_none());
                if let Some((_, lost)) = flush_fails {
                    self.lose(lost);
                }
                if status == OK && self.is_write_through() {
                    self.promised()?;
                }
            }
            Step::Flush { fails: Some((error, lost)) } => {
                self.rig.faults().inject(Call::Flush, Fault::Error(ERRORS[error]));
                prop_assert_eq!(flush(&mut self.rig), IOERR);
                self.lose(lost);
            }
            Step::Flush { fails: None } => {
                if flush(&mut self.rig) == OK {
                    self.promised()?;
                }
            }
            Step::Read { sector } => {
                prop_assert_eq!(request(&mut self.rig, VIRTIO_BLK_T_IN, sector, 1), OK);
                let mut data = [0; SECTOR];
                self.rig.memory.read_slice(&mut data, GuestAddress(DATA)).expect("data");
                prop_assert_eq!(&data[..], &self.rig.content()[sector * SECTOR..(sector + 1) * SECTOR]);
            }
            // The next back-end finds the page cache as it is, and answers for that only.
            Step::Kill => {
                self.rig.reopen();
                self.rig.reconnect(self.features);
                let content = self.rig.content();
                for (sector, expected) in self.expected.iter_mut().enumerate() {
                    *expected = content[sector * SECTOR..(sector + 1) * SECTOR].to_vec();
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn what_was_acknowledged_as_durable_is_on_the_disk(
        way in prop::sample::select(&[Way::SYNC, Way::IO_URING]),
        write_through: bool,
        steps in prop::collection::vec((step(), 8..=u8::MAX), 1..60),
    ) {
        let mut model = Model::new(way, if write_through { 0 } else { 1 << VIRTIO_BLK_F_FLUSH });
        for (step, value) in &steps {
            model.step(step, *value)?;
        }
    }
}
