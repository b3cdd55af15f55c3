//! Lets system calls of a thread, and of all threads and processes that it starts, fail by number.
//!
//! The thread installs a seccomp filter that asks a supervisor about each call of some kinds (seccomp_unotify(2)). The
//! supervisor is a thread of the test. It counts the calls, and answers the chosen one with an error in place of the
//! kernel.
#![expect(unsafe_code, reason = "no crate has a safe interface to seccomp's notifications")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use libc::{c_long, seccomp_notif, seccomp_notif_resp, sock_filter, sock_fprog};
use rustix::event::{PollFd, PollFlags};
use vvu::event::wait_any;

/// Numbers of system calls are below this.
const NUMBERS: usize = 512;

/// `SECCOMP_USER_NOTIF_FLAG_CONTINUE` in the width of the field: the kernel makes the call.
const CONTINUE: u32 = 1;

/// `F_DUPFD_CLOEXEC` as the kernel shows it.
const DUPLICATE: u64 = libc::F_DUPFD_CLOEXEC.cast_unsigned() as u64;

/// What a filter asks about.
#[derive(Clone, Copy, Debug)]
pub enum Filter {
    /// Every system call.
    All,
    /// This one.
    One(c_long),
    /// This one, once a thread has named itself: what comes before that belongs to the dynamic loader.
    OneOnceThreaded(c_long),
}

/// Counts system calls, and lets one fail.
pub struct Interceptor(Arc<Mutex<State>>);

struct State {
    /// Calls so far, by number.
    counts: [u32; NUMBERS],
    /// Whether calls do not count yet.
    dormant: bool,
    plan: Option<Plan>,
}

/// The call that is to fail.
#[derive(Clone, Copy)]
struct Plan {
    number: c_long,
    /// Calls of this kind that are still to succeed.
    before: u32,
    errno: i32,
    fired: bool,
    /// No other call fails.
    once: bool,
}

impl Interceptor {
    /// Runs `work` in a thread with `filter`.
    ///
    /// # Panics
    /// When the kernel has no such filters.
    pub fn run<T: Send + 'static>(
        filter: Filter,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> (Self, JoinHandle<T>) {
        let dormant = matches!(filter, Filter::OneOnceThreaded(_));
        let state = Arc::new(Mutex::new(State { counts: [0; NUMBERS], dormant, plan: None }));
        // The thread may make no call between the installation and the start of the supervisor, so the descriptor does
        // not go through a channel.
        let listener = Arc::new(AtomicI32::new(-1));
        let thread = std::thread::spawn({
            let (listener, program) = (Arc::clone(&listener), program(filter));
            move || {
                listener.store(install(&program), Ordering::SeqCst);
                work()
            }
        });
        std::thread::spawn({
            let state = Arc::clone(&state);
            move || {
                let listener = loop {
                    match listener.load(Ordering::SeqCst) {
                        -1 => std::thread::yield_now(),
                        // SAFETY: the kernel has just made this descriptor, and nobody else has it.
                        fd => break unsafe { OwnedFd::from_raw_fd(fd) },
                    }
                };
                supervise(&listener, &state);
            }
        });
        (Self(state), thread)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    /// Lets the call `nth` of this kind from now on fail; 1 is the next one.
    pub fn fail(&self, number: c_long, nth: u32, errno: i32) {
        self.state().plan = Some(Plan { number, before: nth - 1, errno, fired: false, once: true });
    }

    /// Lets all calls of this kind fail from now on.
    pub fn fail_always(&self, number: c_long, errno: i32) {
        self.state().plan = Some(Plan { number, before: 0, errno, fired: false, once: false });
    }

    /// Lets no call fail from now on. Returns whether one did.
    pub fn relent(&self) -> bool {
        self.state().plan.take().is_some_and(|plan| plan.fired)
    }

    /// Whether the chosen call has failed.
    pub fn has_failed(&self) -> bool {
        self.state().plan.is_some_and(|plan| plan.fired)
    }

    /// Forgets the calls so far.
    pub fn reset(&self) {
        self.state().counts = [0; NUMBERS];
    }

    /// The numbers of the calls so far.
    pub fn seen(&self) -> Vec<c_long> {
        let state = self.state();
        (0..).zip(state.counts).filter(|(_, count)| *count > 0).map(|(number, _)| number).collect()
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// The error that a call is answered with, if it is not to reach the kernel.
    fn answer(&mut self, number: c_long) -> Option<i32> {
        if self.dormant {
            self.dormant = number != libc::SYS_prctl;
            return None;
        }
        if let Some(count) = usize::try_from(number).ok().and_then(|number| self.counts.get_mut(number)) {
            *count += 1;
        }
        let plan = self.plan.as_mut().filter(|plan| plan.number == number && !(plan.fired && plan.once))?;
        if plan.before > 0 {
            plan.before -= 1;
            return None;
        }
        plan.fired = true;
        Some(plan.errno)
    }
}

fn statement(code: u32, value: u32) -> sock_filter {
    sock_filter { code: u16::try_from(code).expect("a code"), jt: 0, jf: 0, k: value }
}

/// The filter as a program for the kernel.
fn program(filter: Filter) -> Vec<sock_filter> {
    let numbers = match filter {
        Filter::All => return vec![statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF)],
        Filter::One(number) => vec![number],
        Filter::OneOnceThreaded(number) => vec![number, libc::SYS_prctl],
    };
    // The number of the call is the first word of what the kernel shows to the program.
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for number in numbers {
        let number = u32::try_from(number).expect("a number");
        let skip_if_other =
            sock_filter { jf: 1, ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number) };
        program.push(skip_if_other);
        program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF));
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    program
}

/// Installs a filter for this thread and what it starts. Returns the descriptor at which the kernel asks.
fn install(program: &[sock_filter]) -> RawFd {
    let program = sock_fprog {
        len: u16::try_from(program.len()).expect("a short program"),
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the call has no pointers.
    let done = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    // SAFETY: the kernel copies the program, which is borrowed and of the length that is given.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    // With a filter that asks about everything, not even a panic is possible without a supervisor.
    RawFd::try_from(listener).unwrap_or(RawFd::MAX)
}

/// Answers until no thread is left that has the filter. Allocates no memory, since a thread that is asked about may have
/// locked the allocator.
fn supervise(listener: &OwnedFd, state: &Mutex<State>) {
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN)];
        wait_any(&mut fds, None).expect("wait for system calls");
        if !fds[0].revents().contains(PollFlags::IN) {
            return;
        }
        // SAFETY: all fields are integers, for which 0 is a value; the kernel wants zeroes.
        let mut call: seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes to the structure that it expects.
        let got = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) };
        if got != 0 {
            // The thread was killed, or got a signal and asks anew.
            continue;
        }
        let mut answer = seccomp_notif_resp { id: call.id, val: 0, error: 0, flags: 0 };
        let number = call.data.nr.into();
        // Of the commands of fcntl, only this one needs a resource.
        let counts = number != libc::SYS_fcntl || call.data.args[1] == DUPLICATE;
        match counts.then(|| lock(state).answer(number)).flatten() {
            // It fails by an address below the one that was asked for.
            Some(_) if number == libc::SYS_brk => answer.val = 0,
            Some(errno) => answer.error = -errno,
            None => answer.flags = CONTINUE,
        }
        // SAFETY: the kernel reads from the structure that it expects. It fails if the thread is gone.
        unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
    }
}
