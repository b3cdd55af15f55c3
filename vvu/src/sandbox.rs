//! The sandbox of `vvu proxy`: once it serves peers that it does not trust, the process may use the files that
//! the set-up opened, and memory. An attacker who finds a bug in the proxy gains little by it.

#![expect(unsafe_code, reason = "no crate gives a signal handler the number of the refused system call")]

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::Context;
use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetStatus, Scope};
use libc::{c_int, c_long, c_uint, c_void};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Exit status after a refused system call: the one that shells show for a process killed by `SIGSYS`.
const REFUSED_STATUS: c_int = 128 + libc::SIGSYS;

/// Leaves the process no access to files by name, no network, and only the system calls of a running proxy.
/// Any other call ends the process with a message. The threads that there are must be past their start.
///
/// # Errors
/// When the kernel has no seccomp filters. A kernel without landlock is no error: seccomp alone lets
/// nothing be opened.
pub(crate) fn enter() -> anyhow::Result<()> {
    if restrict_files()? == RulesetStatus::NotEnforced {
        log::info!("this kernel has no landlock: the sandbox is seccomp alone");
    }
    explain_refusals().context("cannot handle SIGSYS")?;
    seccompiler::apply_filter_all_threads(&filter()?)
        .context("cannot install a seccomp filter: use a kernel with CONFIG_SECCOMP_FILTER, or --sandbox off")
}

/// Denies the calling thread all files and the network with landlock, should the seccomp filter have a gap.
fn restrict_files() -> anyhow::Result<RulesetStatus> {
    // Older kernels enforce what they know of it.
    let abi = ABI::V10;
    let rules = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?;
    Ok(rules.restrict_self()?.ruleset)
}

/// The seccomp filter. Nothing in it opens a file, makes a socket, or makes memory executable.
fn filter() -> anyhow::Result<BpfProgram> {
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
        ALLOWED.iter().chain(ALLOWED_BY_ARCH).map(|call| (*call, Vec::new())).collect();
    let argument = |index, operator, value: c_int| -> anyhow::Result<SeccompRule> {
        let value = u64::from(value.cast_unsigned());
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)?;
        Ok(SeccompRule::new(vec![condition])?)
    };
    let commands = FCNTL_ALLOWED.iter().map(|command| argument(1, SeccompCmpOp::Eq, *command));
    rules.insert(libc::SYS_fcntl, commands.collect::<Result<_, _>>()?);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let executable = SeccompCmpOp::MaskedEq(u64::from(libc::PROT_EXEC.cast_unsigned()));
        rules.insert(call, vec![argument(2, executable, 0)?]);
    }
    // abort(3) signals the process itself, in whichever thread.
    let own = argument(0, SeccompCmpOp::Eq, std::process::id().cast_signed())?;
    rules.insert(libc::SYS_tgkill, vec![own]);
    // It compares two descriptors of this process, and nothing else.
    let pid = std::process::id().cast_signed();
    let own = [(0, pid), (1, pid), (2, KCMP_FILE)].into_iter().map(|(index, value)| {
        let value = u64::from(value.cast_unsigned());
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
    });
    rules.insert(libc::SYS_kcmp, vec![SeccompRule::new(own.collect::<Result<_, _>>()?)?]);
    let arch = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, arch)?;
    Ok(filter.try_into()?)
}

/// System calls that are allowed whatever their arguments are.
const ALLOWED: &[c_long] = &[
    // Waiting.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_restart_syscall,
    // Open sockets, eventfds, log lines.
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendmmsg,
    libc::SYS_getsockname,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_getsockopt,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_settime,
    libc::SYS_shutdown,
    libc::SYS_io_submit,
    libc::SYS_io_getevents,
    libc::SYS_io_destroy,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    // File descriptors of peers: their kind and their contents.
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_readlinkat,
    libc::SYS_fallocate,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    // Memory. Each VMM that connects to the express device gets a page of its own.
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // Time, locks, random numbers. A channel of the standard library yields when two threads use it at once.
    libc::SYS_clock_gettime,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_getrandom,
    // Signals, and the end.
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// System calls that only older architectures have.
#[cfg(target_arch = "x86_64")]
const ALLOWED_BY_ARCH: &[c_long] = &[libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_readlink];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_BY_ARCH: &[c_long] = &[];

/// Commands of `fcntl`. The standard library's debug builds use `F_GETFD` before each `close`.
const FCNTL_ALLOWED: &[c_int] = &[
    libc::F_GETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_DUPFD_CLOEXEC,
    libc::F_GET_SEALS,
    libc::F_ADD_SEALS,
    libc::F_OFD_GETLK,
];

/// What `kcmp` may compare: whether two descriptors are one open file.
const KCMP_FILE: c_int = 0;

/// Makes a refused system call end the process with a message.
fn explain_refusals() -> std::io::Result<()> {
    // SAFETY: all zeroes are a valid sigaction: no flags, nothing masked.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = refused;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `action` outlives the call, and `refused` does only what a signal handler may.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Description of a refused system call by the kernel (`siginfo_t`, the `_sigsys` member of its union).
#[repr(C)]
struct Refused {
    signal: c_int,
    errno: c_int,
    code: c_int,
    instruction: *mut c_void,
    number: c_int,
    arch: c_uint,
}

const _: () = assert!(size_of::<Refused>() <= size_of::<libc::siginfo_t>());

extern "C" fn refused(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a siginfo_t with the layout of `Refused` to a handler of SIGSYS.
    let number = unsafe { (*info.cast::<Refused>()).number };
    let mut text = [0; 160];
    let mut rest = &mut text[..];
    // Formatting an integer into an array allocates nothing and takes no lock.
    let _ = writeln!(
        rest,
        "vvu: error: the sandbox refused system call {number} ({}), a bug or an attack: \
         run with --sandbox off to debug",
        std::env::consts::ARCH
    );
    let left = rest.len();
    let length = text.len() - left;
    let mut stderr = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: poll, write and _exit may be called in signal handlers; `text` has `length` bytes.
    unsafe {
        // If nobody reads the text, the process ends without it.
        if libc::poll(&raw mut stderr, 1, 0) == 1 {
            libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), length);
        }
        libc::_exit(REFUSED_STATUS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;

    #[cfg(target_arch = "x86_64")]
    const UNLINK: c_long = libc::SYS_unlink;
    #[cfg(not(target_arch = "x86_64"))]
    const UNLINK: c_long = libc::SYS_unlinkat;

    const CHILD: &str = "VVU_TEST_SANDBOX_CALL";

    /// Runs in a process of its own, since what it does ends that.
    fn call_what_is_forbidden(what: &str) {
        enter().expect("sandbox");
        match what {
            "socket" => drop(std::net::TcpListener::bind("127.0.0.1:0")),
            "open" => drop(fs::File::open("/proc/self/status")),
            "abort" => std::process::abort(),
            "yield" => std::thread::yield_now(),
            "unlink" => drop(fs::remove_file("/nonexistent")),
            "signal" => {
                // SAFETY: signal 0 is none.
                unsafe { libc::syscall(libc::SYS_tgkill, 1, 1, 0) };
            }
            "fork" => drop(Command::new("true").spawn()),
            "fcntl" => drop(
                rustix::io::fcntl_dupfd_cloexec(std::io::stderr(), 0)
                    .and_then(|fd| rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())),
            ),
            // SAFETY: a new mapping replaces nothing.
            "mmap" => drop(unsafe {
                use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
                let protection = ProtFlags::READ | ProtFlags::EXEC;
                mmap_anonymous(std::ptr::null_mut(), 4096, protection, MapFlags::PRIVATE)
            }),
            _ => {}
        }
        // Past the destructors of the test harness.
        std::process::exit(0);
    }

    #[test]
    fn a_forbidden_call_ends_the_process_with_a_message() {
        if let Ok(what) = std::env::var(CHILD) {
            call_what_is_forbidden(&what);
        }
        let child = |what| {
            Command::new(std::env::current_exe().expect("own path"))
                .args(["--exact", "--nocapture", "--test-threads=1"])
                .arg("sandbox::tests::a_forbidden_call_ends_the_process_with_a_message")
                .env(CHILD, what)
                .output()
                .expect("child")
        };
        for what in ["nothing", "yield"] {
            assert_eq!(child(what).status.code(), Some(0), "{what}");
        }
        let calls = [
            ("socket", libc::SYS_socket),
            ("open", libc::SYS_openat),
            ("fcntl", libc::SYS_fcntl),
            ("mmap", libc::SYS_mmap),
            ("unlink", UNLINK),
            ("signal", libc::SYS_tgkill),
        ];
        for (what, number) in calls {
            let output = child(what);
            assert_eq!(output.status.code(), Some(REFUSED_STATUS), "{what}: {output:?}");
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(text.contains(&format!("refused system call {number} ")), "{what}: {text}");
            assert!(text.ends_with("run with --sandbox off to debug\n"), "{what}: {text}");
        }
        let signal = |what| std::os::unix::process::ExitStatusExt::signal(&child(what).status);
        // The C library blocks all signals meanwhile: the kernel ends the process itself.
        assert_eq!(signal("fork"), Some(libc::SIGSYS));
        // A panic must still be able to end the process in its own way.
        assert_eq!(signal("abort"), Some(libc::SIGABRT));
    }

    #[test]
    fn with_landlock_nothing_can_be_opened_or_removed() {
        let directory = tempfile::tempdir().expect("directory");
        let name = directory.path().join("name");
        fs::write(&name, "").expect("file");
        // Landlock holds for a thread: that of the test harness stays free.
        let restricted = std::thread::spawn(move || {
            let status = restrict_files().expect("landlock");
            (status, fs::File::open("/proc/self/status").is_ok(), fs::remove_file(name).is_ok())
        });
        let (status, opened, removed) = restricted.join().expect("thread");
        let free = status == RulesetStatus::NotEnforced;
        assert_eq!((opened, removed), (free, free));
    }
}
