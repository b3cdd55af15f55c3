//! A connection to the block back-end leaves nothing behind. The test has a process of its own, because it counts the
//! descriptors and threads of the process.

mod common;

use std::sync::Arc;

use common::{Backend, Setup, SiblingMemory, open_files, pattern, threads, wait_until};

#[test]
fn front_ends_come_and_go_without_a_trace() {
    let content = pattern(15, 4096);
    let backend = Backend::start(&content, |_| {});
    let idle = threads();
    let serve = || {
        let memory = Arc::new(SiblingMemory::flat(4 << 20));
        let mut driver = backend.connect(&memory, Setup { queues: 4, ..Setup::default() });
        assert_eq!(driver.read(3, 0, 1 << 20, 4096), content);
        assert!(threads() >= idle + 4, "a thread for each queue");
    };
    let files = open_files();
    for _ in 0..10 {
        serve();
        wait_until("the threads of the connection are gone", || (threads() == idle).then_some(()));
    }
    // The server may open a few descriptors of its own after they were counted.
    let mostly_gone = || (open_files() < files + 4).then_some(());
    wait_until("the descriptors of all connections are gone", mostly_gone);
    backend.end();
}
