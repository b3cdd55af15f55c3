use std::fs;

use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};

use super::super::config::Shape;
use super::super::device::BlockDevice;
use super::super::disk::Disk;
use super::super::disk::tests::disk_of;
use super::super::faults::{Call, Fault};
use super::super::options::EngineKind;
use super::*;
use crate::backend::chain::{Segment, Segments};

const SHAPE: Shape = Shape { queues: 1, segments: 126, access_platform: false };
/// Blocks of direct I/O; `None` is buffered I/O.
const BLOCKS: [Option<u32>; 3] = [None, Some(512), Some(4096)];

fn means(mut disk: Disk, blocks: Option<u32>) -> Means {
    if let Some(blocks) = blocks {
        disk.set_alignment(512, blocks);
    }
    Means::new(Arc::new(BlockDevice::new(Arc::new(disk), SHAPE, EngineKind::Sync)), None)
}

fn rig(content: &[u8], blocks: Option<u32>) -> (NamedTempFile, Means) {
    let (file, disk) = disk_of(content, false);
    (file, means(disk, blocks))
}

fn read(means: &mut Means, offset: u64, memory: &Arc<GuestMemoryMmap>, pieces: &Segments) -> io::Result<()> {
    let pieces = Pieces::guest(memory, pieces, Permissions::Write).expect("memory");
    carry_out(Transfer::read(offset, pieces), means)
}

fn write(means: &mut Means, offset: u64, memory: &Arc<GuestMemoryMmap>, pieces: &Segments) -> io::Result<()> {
    let pieces = Pieces::guest(memory, pieces, Permissions::Read).expect("memory");
    carry_out(Transfer::write(offset, pieces), means)
}

fn memory(size: usize) -> Arc<GuestMemoryMmap> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).expect("memory"))
}

fn segments(pieces: impl IntoIterator<Item = (u64, u32)>) -> Segments {
    Segments(pieces.into_iter().map(|(addr, len)| Segment { addr: GuestAddress(addr), len }).collect())
}

/// Returns memory, and every second 16 bytes in it.
fn striped(count: u64) -> (Arc<GuestMemoryMmap>, Segments) {
    (memory(usize::try_from(count).expect("small") * 32), segments((0..count).map(|index| (index * 32, 16))))
}

fn pattern(len: u32) -> Vec<u8> {
    (0..len).map(|index| index.to_le_bytes()[index as usize % 2]).collect()
}

#[test]
fn moves_more_pieces_than_one_call_takes() {
    for blocks in BLOCKS {
        let content = pattern(64 << 10);
        let (file, mut means) = rig(&content, blocks);
        let (memory, pieces) = striped(2048);
        read(&mut means, 512, &memory, &pieces).expect("read");
        for (index, piece) in pieces.0.iter().enumerate() {
            let mut got = [0; 16];
            memory.read_slice(&mut got, piece.addr).expect("memory");
            assert_eq!(got, content[512 + index * 16..][..16], "piece {index}");
        }
        write(&mut means, 0, &memory, &pieces).expect("write");
        let want = [&content[512..][..32 << 10], &content[32 << 10..]].concat();
        assert_eq!(fs::read(file.path()).expect("file"), want);
    }
}

#[test]
fn a_disk_that_shrank_is_an_error() {
    for blocks in BLOCKS {
        let (file, mut means) = rig(&[1; 8192], blocks);
        file.as_file().set_len(512).expect("shrink");
        let (memory, pieces) = (memory(4096), segments([(0, 512)]));
        for offset in [512, 4096] {
            let error = read(&mut means, offset, &memory, &pieces).expect_err("end");
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{blocks:?}");
        }
        read(&mut means, 0, &memory, &pieces).expect("what is left");
    }
}

/// Whatever a driver may ask for, in any memory: larger than a buffer, and at every place in a block.
#[test]
fn every_offset_length_and_address_is_served() {
    const SIZE: u32 = 1 << 20;
    for blocks in BLOCKS {
        let mut content = pattern(SIZE);
        let (file, mut means) = rig(&content, blocks);
        let memory = memory(2 << 20);
        for (round, (offset, len)) in [
            (0, 512),
            (512, 512),
            (3584, 1024),
            (4096, 8192),
            (7680, 300 << 10),
            (0, SIZE),
            (512, SIZE - 1024),
        ]
        .into_iter()
        .enumerate()
        {
            // In two pieces that meet anywhere.
            for (address, cut) in [(0, len), (512, 512), (4096, len / 2), (3, len), (1024, len - 1), (5, 7)] {
                let pieces = segments(
                    [(address, cut), (address + u64::from(cut) + 1, len - cut)]
                        .into_iter()
                        .filter(|piece| piece.1 != 0),
                );
                let from = usize::try_from(offset).expect("small");
                let want = &mut content[from..from + len as usize];
                read(&mut means, offset, &memory, &pieces).expect("read");
                let mut got = Vec::new();
                for piece in &pieces.0 {
                    let mut part = vec![0; piece.len as usize];
                    memory.read_slice(&mut part, piece.addr).expect("memory");
                    got.extend(part);
                }
                assert!(got == want, "{blocks:?}: {len} bytes at {offset} to {address} and on from {cut}");

                let value =
                    u8::try_from(round * 16 + 1).expect("small") ^ u8::try_from(cut & 0xf).expect("small");
                want.fill(value);
                memory.write_slice(&vec![value; len as usize + 16], GuestAddress(address)).expect("memory");
                write(&mut means, offset, &memory, &pieces).expect("write");
                assert!(
                    fs::read(file.path()).expect("file") == content,
                    "{blocks:?}: {len} bytes at {offset}"
                );
            }
        }
    }
}

/// The kernel can pin the memory of one region, and not that of the other.
#[test]
fn memory_that_cannot_be_pinned_is_bounced_from_the_first_error_on() {
    const MIDDLE: u64 = 1 << 20;
    let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(MIDDLE), 1 << 20)];
    let memory = || Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("memory"));
    let its = memory();
    let (good, bad, both) =
        (segments([(0, 4096)]), segments([(MIDDLE, 4096)]), segments([(0, 512), (MIDDLE, 512)]));
    let fault = |means: &Means, call| means.disk().faults.inject(call, Fault::Error(libc::EFAULT));
    let bounces = |means: &Means, memory: &Arc<GuestMemoryMmap>, pieces: &Segments| {
        means.cannot_pin(&Pieces::guest(memory, pieces, Permissions::Write).expect("memory"))
    };
    for call in [Call::Read, Call::Write] {
        let (file, mut means) = rig(&pattern(64 << 10), Some(512));
        let transfer = |means: &mut Means, pieces| match call {
            Call::Read => read(means, 0, &its, pieces),
            _ => write(means, 0, &its, pieces),
        };
        read(&mut means, 0, &its, &both).expect("read");
        // It may be either region's fault, so this one request goes through a buffer.
        fault(&means, call);
        transfer(&mut means, &both).expect("success");
        assert!(!bounces(&means, &its, &both));
        read(&mut means, 0, &its, &bad).expect("read");
        fault(&means, call);
        transfer(&mut means, &bad).expect("success");
        assert!(bounces(&means, &its, &bad) && bounces(&means, &its, &both) && !bounces(&means, &its, &good));
        // A transfer through a buffer that fails does fail.
        fault(&means, call);
        let error = transfer(&mut means, &bad).expect_err("error");
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{call:?}");
        assert_eq!(fs::read(file.path()).expect("file"), pattern(64 << 10));
        // The front-end has another memory now.
        assert!(!bounces(&means, &memory(), &bad));
    }
}

#[test]
fn without_direct_io_memory_that_is_gone_is_an_error() {
    let (_file, mut means) = rig(&pattern(4096), None);
    means.disk().faults.inject(Call::Read, Fault::Error(libc::EFAULT));
    read(&mut means, 0, &memory(4096), &segments([(0, 512)])).expect_err("error");
}

#[test]
fn an_interrupted_call_is_repeated_and_not_for_ever() {
    let (_file, mut means) = rig(&pattern(4096), Some(512));
    for (count, works) in [(FRUITLESS_MAX, true), (FRUITLESS_MAX + 1, false)] {
        for _ in 0..count {
            means.disk().faults.inject(Call::Read, Fault::Error(libc::EINTR));
        }
        assert_eq!(read(&mut means, 0, &memory(4096), &segments([(0, 512)])).is_ok(), works);
    }
}
