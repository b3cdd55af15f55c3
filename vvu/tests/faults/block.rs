//! `vvu device block --socket`.

use std::path::PathBuf;
use std::sync::Arc;

use crate::calls::KINDS;
use crate::common::{Setup, SiblingMemory, pattern};
use crate::frontend::{Outcome, attempt};
use crate::interceptor::{Filter, Interceptor};
use crate::process::Process;
use crate::walk;

/// Options for each engine.
const ENGINES: [&[&str]; 2] = [&["--engine", "sync"], &["--engine", "io-uring", "--direct"]];

fn arguments<'a>(options: &[&'a str]) -> Vec<&'a str> {
    [&["-v", "device", "block", "--socket", "s", "--file", "disk.img"], options].concat()
}

struct Block {
    process: Process,
    directory: tempfile::TempDir,
    memory: Arc<SiblingMemory>,
    content: Vec<u8>,
}

impl Block {
    fn start(options: &[&str], filter: Filter, prepare: impl FnOnce(&Interceptor) + Send + 'static) -> Self {
        let content = pattern(40, 64 << 10);
        let directory = tempfile::tempdir().expect("directory");
        std::fs::write(directory.path().join("disk.img"), &content).expect("disk");
        let process = Process::start(filter, directory.path(), &arguments(options), prepare);
        Self { process, directory, memory: Arc::new(SiblingMemory::flat(4 << 20)), content }
    }

    fn ready(options: &[&str], filter: Filter) -> Self {
        let mut block = Self::start(options, filter, |_| {});
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
    for options in ENGINES {
        let block = Block::ready(options, Filter::All);
        block.process.calls.reset();
        assert_eq!(block.attempt(), Outcome::Served);
        walk::assert_known(&block.process.calls.seen());
        block.process.stop();
    }
}

fn the_next_front_end_is_served(options: &[&str]) {
    walk::each_kind(KINDS, |kind| {
        let mut block = Block::ready(options, Filter::One(kind.1));
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
                block = Block::ready(options, Filter::One(kind.1));
                return true;
            }
            let outcome = block.attempt();
            if kind.0 == "fdatasync" {
                // From then on every flush fails.
                assert_eq!(outcome, Outcome::Failed, "{what}: {}", block.process.errors());
                block = Block::ready(options, Filter::One(kind.1));
            } else {
                assert_eq!(outcome, Outcome::Served, "{what}: {}", block.process.errors());
            }
            true
        });
        block.process.stop();
    });
}

#[test]
fn the_next_front_end_of_a_back_end_is_served_whatever_failed_before() {
    the_next_front_end_is_served(ENGINES[0]);
}

#[test]
fn the_next_front_end_of_an_io_uring_is_served_whatever_failed_before() {
    the_next_front_end_is_served(ENGINES[1]);
}

fn says_what_helps(options: &[&str]) {
    walk::each_kind(KINDS, |kind| {
        walk::each(kind, |nth, errno, what| {
            let number = kind.1;
            let prepare = move |calls: &Interceptor| calls.fail(number, nth, errno);
            let mut block = Block::start(options, Filter::OneOnceThreaded(number), prepare);
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

#[test]
fn a_back_end_that_cannot_start_says_what_helps() {
    says_what_helps(ENGINES[0]);
}

#[test]
fn a_back_end_that_cannot_start_with_an_io_uring_says_what_helps() {
    says_what_helps(ENGINES[1]);
}

/// A kernel without io_uring, a sysctl or a sandbox that forbids it, and one that knows less of it.
#[test]
fn without_an_io_uring_requests_are_carried_out_one_at_a_time_if_that_was_left_open() {
    for (call, errno) in [
        (libc::SYS_io_uring_setup, libc::ENOSYS),
        (libc::SYS_io_uring_setup, libc::EPERM),
        (libc::SYS_io_uring_register, libc::EINVAL),
    ] {
        let start = |options: &[&str]| {
            Block::start(options, Filter::OneOnceThreaded(call), move |calls| calls.fail(call, 1, errno))
        };
        let mut block = start(&["--direct"]);
        assert!(block.process.wait_ready(), "{}", block.process.errors());
        assert_eq!(block.attempt(), Outcome::Served);
        let errors = block.process.errors();
        assert_eq!(errors.matches("no io_uring").count(), 1, "one line: {errors}");
        block.process.stop();

        let mut block = start(&["--engine", "io-uring"]);
        assert!(!block.process.wait_ready(), "there is no io_uring");
        block.process.assert_gave_up(errno, "io_uring");
        let errors = block.process.errors();
        assert!(errors.contains("no io_uring") && errors.contains("--engine sync"), "{errors}");
    }
}

/// The kernel refuses to take requests, however often it is asked.
#[test]
fn an_io_uring_that_takes_nothing_more_is_given_up() {
    let call = libc::SYS_io_uring_enter;
    let mut block = Block::ready(ENGINES[1], Filter::One(call));
    assert_eq!(block.attempt(), Outcome::Served);
    block.process.calls.fail_always(call, libc::ENOMEM);
    assert_eq!(block.attempt(), Outcome::Served, "{}", block.process.errors());
    assert!(block.process.errors().contains("one by one"), "{}", block.process.errors());
    assert!(block.process.survives("a broken ring"));
    block.process.stop();
}
