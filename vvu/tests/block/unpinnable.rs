//! Memory that the kernel cannot pin for direct I/O, as it cannot pin that of a PCI device.
#![expect(unsafe_code, reason = "no crate has memfd_secret(2)")]

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use crate::common::{Piece, Setup, SiblingMemory, pattern};
use crate::{DATA, start};

const SIZE: usize = 4 << 20;

/// Memory that only its owner may access; `None` where the kernel has none.
fn secret() -> Option<File> {
    // SAFETY: the call has no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    if fd < 0 {
        eprintln!("not tested, since there is no secret memory: {}", std::io::Error::last_os_error());
        return None;
    }
    // SAFETY: the kernel has just made it, and nobody else has it.
    let file = unsafe { File::from_raw_fd(i32::try_from(fd).expect("a descriptor")) };
    file.set_len(SIZE as u64).expect("size");
    Some(file)
}

#[test]
fn requests_in_memory_that_cannot_be_pinned_go_through_buffers() {
    let Some(file) = secret() else { return };
    let mut content = pattern(80, 1 << 20);
    for queues in [1, 4] {
        let backend = start(&content, |_| {});
        let file = file.try_clone().expect("descriptor");
        let memory = Arc::new(SiblingMemory::of(file, &[Piece { gpa: 0, size: SIZE, offset: 0 }]));
        let mut driver = backend.connect(&memory, Setup { queues, inflight: true, ..Setup::default() });
        for queue in 0..queues {
            assert_eq!(driver.read(queue, 0, DATA, 1 << 20), content);
            let data = pattern(81 + queue as u64, 600 << 10);
            driver.write(queue, 16, DATA, &data);
            content[8192..][..data.len()].copy_from_slice(&data);
            driver.flush(queue);
        }
        assert!(backend.content() == content);
        drop(driver);
        backend.end();
    }
}
