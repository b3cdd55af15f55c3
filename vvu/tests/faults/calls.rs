//! The system calls that can fail, and with which errors.

use libc::{
    EAGAIN, EBUSY, EFBIG, EINTR, EIO, EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOSPC, SYS_accept4, SYS_bind,
    SYS_brk, SYS_clone, SYS_clone3, SYS_connect, SYS_dup, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait,
    SYS_eventfd2, SYS_fallocate, SYS_fcntl, SYS_fdatasync, SYS_flock, SYS_fstat, SYS_fstatfs, SYS_ftruncate,
    SYS_getrandom, SYS_getsockopt, SYS_io_getevents, SYS_io_setup, SYS_io_submit, SYS_io_uring_enter,
    SYS_io_uring_register, SYS_io_uring_setup, SYS_ioctl, SYS_listen, SYS_lseek, SYS_madvise,
    SYS_memfd_create, SYS_mmap, SYS_mprotect, SYS_openat, SYS_ppoll, SYS_preadv, SYS_preadv2, SYS_pwritev,
    SYS_read, SYS_readlinkat, SYS_recvfrom, SYS_recvmsg, SYS_sendmsg, SYS_sendto, SYS_shutdown, SYS_socket,
    SYS_socketpair, SYS_statx, SYS_timerfd_create, SYS_write, SYS_writev, c_long,
};

/// A kind of system call: its name, its number, and how it can fail.
pub type Kind = (&'static str, c_long, &'static [i32]);

const FILES: &[i32] = &[EMFILE, ENFILE, ENOMEM];
const SOCKET: &[i32] = &[EINTR, ENOMEM, ENOBUFS];
const MEMORY: &[i32] = &[ENOMEM];
const DISK: &[i32] = &[EIO, ENOSPC, EFBIG, EINTR, ENOMEM];

/// Calls that fail for want of a resource, or because of a signal or a disk.
pub const KINDS: &[Kind] = &[
    ("accept4", SYS_accept4, &[EMFILE, ENFILE, ENOMEM, ENOBUFS, EINTR, EAGAIN]),
    ("bind", SYS_bind, &[ENOMEM, ENOSPC, EIO]),
    ("brk", SYS_brk, MEMORY),
    ("clone", SYS_clone, &[EAGAIN, ENOMEM]),
    ("clone3", SYS_clone3, &[EAGAIN, ENOMEM]),
    ("connect", SYS_connect, &[EAGAIN, EINTR, ENOMEM]),
    ("dup", SYS_dup, &[EMFILE]),
    ("epoll_create1", SYS_epoll_create1, FILES),
    ("epoll_ctl", SYS_epoll_ctl, &[ENOMEM, ENOSPC]),
    ("epoll_pwait", SYS_epoll_pwait, &[EINTR]),
    ("eventfd2", SYS_eventfd2, FILES),
    ("fallocate", SYS_fallocate, DISK),
    ("fcntl", SYS_fcntl, &[EMFILE, ENOMEM]),
    ("fdatasync", SYS_fdatasync, &[EIO, ENOSPC]),
    ("flock", SYS_flock, &[EINTR, ENOMEM]),
    ("fstat", SYS_fstat, MEMORY),
    ("fstatfs", SYS_fstatfs, &[EINTR, ENOMEM]),
    ("ftruncate", SYS_ftruncate, &[EINTR, EIO, ENOMEM]),
    ("getrandom", SYS_getrandom, &[EINTR, EAGAIN]),
    ("getsockopt", SYS_getsockopt, MEMORY),
    ("io_getevents", SYS_io_getevents, &[EINTR]),
    ("io_setup", SYS_io_setup, &[EAGAIN, ENOMEM]),
    ("io_submit", SYS_io_submit, &[EAGAIN]),
    ("io_uring_enter", SYS_io_uring_enter, &[EINTR, EAGAIN, EBUSY, ENOMEM]),
    ("io_uring_register", SYS_io_uring_register, &[ENOMEM]),
    ("io_uring_setup", SYS_io_uring_setup, FILES),
    ("ioctl", SYS_ioctl, MEMORY),
    ("listen", SYS_listen, MEMORY),
    ("lseek", SYS_lseek, &[EIO]),
    ("madvise", SYS_madvise, &[EAGAIN, ENOMEM, EIO]),
    ("memfd_create", SYS_memfd_create, FILES),
    ("mmap", SYS_mmap, &[ENOMEM, EAGAIN, ENFILE]),
    ("mprotect", SYS_mprotect, MEMORY),
    ("openat", SYS_openat, &[EMFILE, ENFILE, ENOMEM, EINTR, EIO]),
    ("ppoll", SYS_ppoll, &[EINTR]),
    ("preadv", SYS_preadv, DISK),
    ("preadv2", SYS_preadv2, &[EAGAIN, EINTR]),
    ("pwritev", SYS_pwritev, DISK),
    ("read", SYS_read, &[EINTR, EAGAIN, EIO]),
    ("readlinkat", SYS_readlinkat, &[EIO, ENOMEM]),
    ("recvfrom", SYS_recvfrom, SOCKET),
    ("recvmsg", SYS_recvmsg, SOCKET),
    ("sendmsg", SYS_sendmsg, SOCKET),
    ("sendto", SYS_sendto, SOCKET),
    ("shutdown", SYS_shutdown, MEMORY),
    ("socket", SYS_socket, FILES),
    ("socketpair", SYS_socketpair, FILES),
    ("statx", SYS_statx, &[EINTR, EIO, ENOMEM]),
    ("timerfd_create", SYS_timerfd_create, FILES),
    ("write", SYS_write, &[EINTR]),
    ("writev", SYS_writev, &[EINTR]),
];

/// Calls that cannot fail, or whose failure is that of the process.
pub const HARMLESS: &[c_long] = &[
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_gettid,
    libc::SYS_munmap,
    libc::SYS_readlinkat,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_prctl,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
];
