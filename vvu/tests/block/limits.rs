//! `vvu device block` as a process at the limits of its resources.

use rustix::process::Resource;
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_T_OUT;

use crate::common::{Driver, Setup, pattern, wait_until};
use crate::process::Process;
use crate::{DATA, IO_ERROR, OK, memory};

#[test]
fn a_shortage_of_descriptors_passes() {
    let content = pattern(30, 4096);
    let mut process = Process::start(&content);
    let memory = memory();
    let serve = |process: &Process| {
        let mut driver =
            Driver::connect(&process.socket, &memory, Setup { inflight: true, ..Setup::default() })?;
        assert_eq!(driver.read(0, 0, DATA, 4096), content);
        Ok::<_, vhost::Error>(())
    };
    // The server opens one descriptor of its own after it has said that it is ready, and one with its first signal.
    let idle = process.open_files() + 2;
    serve(&process).expect("no shortage");
    wait_until("the connection is gone", || (process.open_files() <= idle).then_some(()));
    let mut refused = 0;
    let mut spare = 0;
    // Each further descriptor lets the front-end get a little further, until it is served.
    loop {
        process.limit(Resource::Nofile, idle + spare);
        let served = serve(&process);
        assert!(
            process.child.try_wait().expect("wait").is_none(),
            "the back-end ended with {spare} to spare"
        );
        if served.is_ok() {
            break;
        }
        (refused, spare) = (refused + 1, spare + 1);
        assert!(spare < 64, "a front-end needs more than 64 descriptors");
    }
    assert!(refused > 5, "{refused} refusals");
    process.limit(Resource::Nofile, 512);
    serve(&process).expect("the shortage is over");
}

#[test]
fn a_limit_on_the_size_of_files_gives_io_errors() {
    let mut process = Process::start(&pattern(31, 64 << 10));
    process.limit(Resource::Fsize, 8192);
    let memory = memory();
    let mut driver = Driver::connect(&process.socket, &memory, Setup::default()).expect("connection");
    assert_eq!(driver.request(0, VIRTIO_BLK_T_OUT, 100, &[(DATA, 4096)]), IO_ERROR);
    assert!(process.child.try_wait().expect("wait").is_none(), "the back-end ended");
    assert_eq!(driver.request(0, VIRTIO_BLK_T_OUT, 0, &[(DATA, 4096)]), OK);
    assert_eq!(std::fs::read(&process.disk).expect("disk")[..4096], memory.read(DATA, 4096));
}
