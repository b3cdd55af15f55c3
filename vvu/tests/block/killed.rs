//! The back-end is killed again and again while it writes, and its disk fails meanwhile.

use std::collections::BTreeMap;

use rustix::process::Resource;
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_OUT};

use crate::common::{Driver, Setup, pattern};
use crate::process::Process;
use crate::{DATA, memory};

const ROUNDS: usize = 40;
/// Writes of one round, each to a block that no other one writes.
const WRITES: usize = 8;
const BLOCK: usize = 4096;
const BLOCKS: usize = 32;
/// Blocks that can still be written while files may not become large.
const WITHIN_LIMIT: usize = BLOCKS / 2;

/// Each request comes back once. What it says is what is on the disk: a write that succeeded is there, whole, and one that
/// failed has changed nothing.
#[test]
fn what_was_acknowledged_is_on_the_disk_whenever_the_back_end_is_killed() {
    let mut model = pattern(50, BLOCKS * BLOCK);
    let mut process = Process::start(&model);
    let memory = memory();
    let setup = Setup { inflight: true, ..Setup::default() };
    let mut driver = Driver::connect(&process.socket, &memory, setup).expect("connection");
    let mut random = pattern(51, ROUNDS * 16).into_iter();
    let mut random = |below: usize| usize::from(random.next().expect("enough")) % below;
    let mut failed = 0;
    for round in 0..ROUNDS {
        if random(2) == 0 {
            process.limit(Resource::Fsize, (WITHIN_LIMIT * BLOCK) as u64);
        }
        let free = driver.rings[0].snapshot();
        let mut writes = BTreeMap::new();
        let first = random(BLOCKS);
        for write in 0..WRITES {
            let block = (first + write * 5) % BLOCKS;
            let data = pattern((round * WRITES + write + 100) as u64, BLOCK);
            let address = DATA + (write * BLOCK) as u64;
            memory.write(address, &data);
            let sector = (block * BLOCK / 512) as u64;
            let head = driver.submit(
                0,
                VIRTIO_BLK_T_OUT,
                sector,
                &[(address, u32::try_from(BLOCK).expect("small"))],
            );
            writes.insert(head, (block, data));
        }
        let flush = driver.submit(0, VIRTIO_BLK_T_FLUSH, 0, &[]);
        let before = random(WRITES + 1);
        for done in 0..=WRITES {
            if done == before {
                process.replace();
                driver = driver.reconnect(&process.socket).expect("connection");
            }
            let (head, completion) = driver.wait(0).expect("a completion");
            if head == flush {
                assert_eq!(completion.status, 0, "flush in round {round}");
                continue;
            }
            let (block, data) = writes.remove(&head).expect("each request comes back once");
            if completion.status == 0 {
                model[block * BLOCK..][..BLOCK].copy_from_slice(&data);
            } else {
                assert!(block >= WITHIN_LIMIT, "block {block} in round {round}: {completion:?}");
                failed += 1;
            }
        }
        driver.rings[0].restore(free);
        let content = std::fs::read(&process.disk).expect("disk");
        let wrong =
            (0..BLOCKS).find(|block| content[block * BLOCK..][..BLOCK] != model[block * BLOCK..][..BLOCK]);
        assert_eq!(wrong, None, "the first block that is wrong after round {round}");
    }
    assert!(failed > 0, "no write was too far up");
}
