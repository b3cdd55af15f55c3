//! `vvu device block --socket`.

use std::path::PathBuf;
use std::sync::Arc;

use crate::calls::KINDS;
use crate::common::{Setup, SiblingMemory, pattern};
use crate::frontend::{Outcome, attempt};
use crate::interceptor::{Filter, Interceptor};
use crate::process::Process;
use crate::walk;

const ARGUMENTS: &[&str] = &["-v", "device", "block", "--socket", "s", "--file", "disk.img"];

struct Block {
    process: Process,
    directory: tempfile::TempDir,
    memory: Arc<SiblingMemory>,
    content: Vec<u8>,
}

impl Block {
    fn start(filter: Filter, prepare: impl FnOnce(&Interceptor) + Send + 'static) -> Self {
        let content = pattern(40, 64 << 10);
        let directory = tempfile::tempdir().expect("directory");
        std::fs::write(directory.path().join("disk.img"), &content).expect("disk");
        let process = Process::start(filter, directory.path(), ARGUMENTS, prepare);
        Self { process, directory, memory: Arc::new(SiblingMemory::flat(4 << 20)), content }
    }

    fn ready(filter: Filter) -> Self {
        let mut block = Self::start(filter, |_| {});
        assert!(block.process.wait_ready(), "{}", block.process.errors());
        block
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    fn attempt(&self) -> Outcome {
        attempt(&self.socket(), &self.memory, Setup { inflight: true, ..Setup::default() }, &self.content)
    }
}

#[test]
fn every_call_of_a_serving_back_end_is_of_a_known_kind() {
    let block = Block::ready(Filter::All);
    block.process.calls.reset();
    assert_eq!(block.attempt(), Outcome::Served);
    walk::assert_known(&block.process.calls.seen());
    block.process.stop();
}

#[test]
fn the_next_front_end_of_a_back_end_is_served_whatever_failed_before() {
    walk::each_kind(KINDS, |kind| {
        let mut block = Block::ready(Filter::One(kind.1));
        walk::each(kind, |nth, errno, what| {
            block.process.calls.fail(kind.1, nth, errno);
            // The call may also be one that is made as the second front-end comes.
            for _ in 0..2 {
                let outcome = block.attempt();
                assert_ne!(outcome, Outcome::Hung, "{what}: {}", block.process.errors());
                if block.process.calls.has_failed() {
                    break;
                }
                assert_eq!(outcome, Outcome::Served, "{what}: {}", block.process.errors());
            }
            if !block.process.calls.relent() {
                return false;
            }
            if !block.process.survives(what) {
                block = Block::ready(Filter::One(kind.1));
                return true;
            }
            let outcome = block.attempt();
            if kind.0 == "fdatasync" {
                // From then on every flush fails.
                assert_eq!(outcome, Outcome::Failed, "{what}: {}", block.process.errors());
                block = Block::ready(Filter::One(kind.1));
            } else {
                assert_eq!(outcome, Outcome::Served, "{what}: {}", block.process.errors());
            }
            true
        });
        block.process.stop();
    });
}

#[test]
fn a_back_end_that_cannot_start_says_what_helps() {
    walk::each_kind(KINDS, |kind| {
        walk::each(kind, |nth, errno, what| {
            let number = kind.1;
            let prepare = move |calls: &Interceptor| calls.fail(number, nth, errno);
            let mut block = Block::start(Filter::OneOnceThreaded(number), prepare);
            if !block.process.wait_ready() {
                block.process.assert_gave_up(errno, what);
                return true;
            }
            let failed = block.process.calls.relent();
            assert_eq!(block.attempt(), Outcome::Served, "{what}: {}", block.process.errors());
            block.process.stop();
            failed
        });
    });
}
