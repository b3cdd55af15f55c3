use std::fs;

use tempfile::NamedTempFile;

use super::super::config::Shape;
use super::super::disk::tests::disk_of;
use super::super::faults::{Call, Fault};
use super::super::options::EngineKind;
use super::super::sync::SyncEngine;
use super::*;
use crate::backend::chain::{Segment, Segments};
use crate::backend::engine::Engine;
use crate::backend::queue::Taken;

const SHAPE: Shape = Shape { queues: 1, segments: 126, access_platform: false };
const STATUS: u64 = 0x100;
const DATA: u64 = 0x1000;

struct Rig {
    file: NamedTempFile,
    device: Arc<BlockDevice>,
    engine: SyncEngine,
}

impl Rig {
    /// A disk of 256 KiB that is full of sevens; with `blocks` for direct I/O on blocks of that size.
    fn new(blocks: Option<u32>) -> Self {
        let (file, mut disk) = disk_of(&[7; 256 << 10], false);
        if let Some(blocks) = blocks {
            disk.set_alignment(512, blocks);
        }
        let device = Arc::new(BlockDevice::new(Arc::new(disk), SHAPE, EngineKind::Sync));
        let engine = SyncEngine::new(Arc::clone(&device));
        Self { file, device, engine }
    }

    /// Carries out a request on ranges of sectors, and returns its status.
    fn change(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut data = Vec::new();
        for (sector, sectors, flags) in ranges {
            data.extend(sector.to_le_bytes());
            data.extend([sectors.to_le_bytes(), flags.to_le_bytes()].concat());
        }
        request(&mut self.engine, kind, 0, &data)
    }

    fn content(&self) -> Vec<u8> {
        fs::read(self.file.path()).expect("file")
    }
}

/// Carries out a request that the device reads, and returns its status.
fn request(engine: &mut dyn Engine, kind: u32, sector: u64, data: &[u8]) -> u8 {
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000)]).expect("memory"));
    memory.write_obj([u64::from(kind), sector], GuestAddress(0)).expect("header");
    memory.write_slice(data, GuestAddress(DATA)).expect("data");
    let segment = |addr, len| Segment { addr: GuestAddress(addr), len };
    let len = u32::try_from(data.len()).expect("small");
    let readable = Segments(vec![segment(0, 16), segment(DATA, len)]);
    let writable = Segments(vec![segment(STATUS, 1)]);
    let taken = Taken { head: 3, chain: Chain { readable, writable, shape: Ok(()) } };
    let finished = engine.begin(&memory, taken, &mut || {}).expect("finished");
    assert_eq!((finished.head, finished.written), (3, 1));
    memory.read_obj(GuestAddress(STATUS)).expect("status")
}

/// With and without support of the file system, on whole blocks and on parts.
#[test]
fn zeroes_reach_the_file_with_and_without_holes() {
    for blocks in [None, Some(512), Some(4096)] {
        for unsupported in [None, Some(libc::EOPNOTSUPP), Some(libc::EINVAL)] {
            let mut rig = Rig::new(blocks);
            for _ in unsupported.iter().flat_map(|_| 0..2) {
                let fault = Fault::Error(unsupported.unwrap_or_default());
                rig.device.disk().faults.inject(Call::Allocate, fault);
            }
            let ranges = [(1, 200, 0), (256, 128, 1)];
            assert_eq!(rig.change(VIRTIO_BLK_T_WRITE_ZEROES, &ranges), 0);
            let content = rig.content();
            let zero = |range: std::ops::Range<usize>| content[range].iter().all(|byte| *byte == 0);
            assert!(zero(512..(100 << 10) + 512) && zero(128 << 10..192 << 10), "{blocks:?} {unsupported:?}");
            assert_eq!(content.iter().filter(|byte| **byte == 7).count(), (256 - 100 - 64) << 10);
        }
    }
}

#[test]
fn a_discard_that_is_not_supported_does_nothing_and_one_that_fails_is_an_error() {
    for (number, status) in [(libc::EOPNOTSUPP, 0), (libc::EINVAL, 0), (libc::EIO, 1), (libc::ENOSPC, 1)] {
        let mut rig = Rig::new(None);
        rig.device.disk().faults.inject(Call::Allocate, Fault::Error(number));
        assert_eq!(rig.change(VIRTIO_BLK_T_DISCARD, &[(8, 8, 0)]), status, "{number}");
        assert_eq!(rig.content(), [7; 256 << 10]);
    }
}

/// What a request has locked is free when it is over, however that was.
#[test]
fn nothing_stays_locked() {
    let mut rig = Rig::new(Some(4096));
    for (call, number) in
        [(Call::Allocate, libc::EIO), (Call::Allocate, libc::EOPNOTSUPP), (Call::Write, libc::EIO)]
    {
        rig.device.disk().faults.inject(call, Fault::Error(number));
        rig.change(VIRTIO_BLK_T_WRITE_ZEROES, &[(1, 3, 0)]);
        let gate = &rig.device.disk().gate;
        assert!(gate.lock((0, 256 << 10), None), "{call:?}");
        gate.unlock((0, 256 << 10));
    }
}

/// Two threads write every second sector each, to blocks that they share.
#[test]
fn neighbours_in_a_block_keep_what_the_other_one_writes() {
    let rig = Rig::new(Some(4096));
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let mut engine = SyncEngine::new(Arc::clone(&rig.device));
            scope.spawn(move || {
                for round in 1..=8 {
                    for sector in (thread..512).step_by(2) {
                        assert_eq!(request(&mut engine, VIRTIO_BLK_T_OUT, sector, &[round; 512]), 0);
                    }
                }
            });
        }
    });
    assert!(rig.content() == [8; 256 << 10]);
}
