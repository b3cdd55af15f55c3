//! A process of `vvu` whose system calls can fail.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use vvu::event::wait_readable;

use crate::common::{DEADLINE, wait_until};
use crate::interceptor::{Filter, Interceptor};

/// What the standard library says when it aborts a process because a new thread gets no stack for its signal handler.
/// Nothing can be done about that in a Rust program.
const ABORTED: &str = "alternative stack";

/// A running `vvu`, killed when it is dropped.
pub struct Process {
    pub calls: Interceptor,
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
    errors: PathBuf,
}

impl Process {
    /// Starts `vvu` with `arguments` in `directory`. `prepare` is called before the process is.
    pub fn start(
        filter: Filter,
        directory: &Path,
        arguments: &[&str],
        prepare: impl FnOnce(&Interceptor) + Send + 'static,
    ) -> Self {
        let errors = directory.join("stderr");
        let mut command = Command::new(env!("CARGO_BIN_EXE_vvu"));
        command
            .args(arguments)
            .current_dir(directory)
            .stdout(Stdio::piped())
            .stderr(File::create(&errors).expect("file"));
        let (go, start) = std::sync::mpsc::channel();
        let (calls, spawner) = Interceptor::run(filter, move || {
            start.recv().expect("the word");
            command.spawn()
        });
        prepare(&calls);
        go.send(()).expect("a thread that waits");
        let mut child = spawner.join().expect("no panic").expect("vvu");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Self { calls, child, stdout, errors }
    }

    /// Waits until it is ready; false if it ends before.
    pub fn wait_ready(&mut self) -> bool {
        let deadline = Some(Instant::now() + DEADLINE);
        let ready = wait_readable(&[self.stdout.get_ref().as_fd()], deadline).expect("wait");
        assert!(ready.is_some(), "neither ready nor ended after {DEADLINE:?}: {}", self.errors());
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("standard output");
        line.contains("ready")
    }

    /// The last lines of its standard error.
    pub fn errors(&self) -> String {
        let text = std::fs::read(&self.errors).expect("standard error");
        let text = &text[text.len().saturating_sub(4096)..];
        String::from_utf8_lossy(text).into_owned()
    }

    /// Fails the test if the process has ended or panicked. Returns false if the standard library ended it.
    pub fn survives(&mut self, what: &str) -> bool {
        if self.errors().contains(ABORTED) {
            self.wait();
            return false;
        }
        let ended = self.child.try_wait().expect("wait");
        let errors = self.errors();
        assert!(ended.is_none() && !errors.contains("panicked"), "{what}: {ended:?}: {errors}");
        true
    }

    /// Waits for the end of a process that could not start because of `errno`. Fails the test if it does not say so, or
    /// does not say what helps.
    pub fn assert_gave_up(&mut self, errno: i32, what: &str) {
        let status = self.wait();
        let errors = self.errors();
        if errors.contains(ABORTED) {
            return;
        }
        assert_eq!(status.code(), Some(1), "{what}: {status}: {errors}");
        let last = errors.lines().last().unwrap_or_default();
        assert!(last.starts_with("vvu: ") && !errors.contains("panicked"), "{what}: {errors}");
        let remedy = match errno {
            // The process that removes names failed, for a reason that only it knows.
            _ if last.contains("cannot start the process") => return,
            libc::EMFILE => "ulimit -n",
            libc::ENFILE => "fs.file-max",
            libc::ENOMEM | libc::ENOBUFS => "memory",
            _ => return,
        };
        assert!(last.contains(remedy), "{what}: want {remedy:?} in {last:?}");
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self) -> ExitStatus {
        wait_until("the process ends", || self.child.try_wait().expect("wait"))
    }

    /// Asks the process to end, and waits until it has.
    pub fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("signal");
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "{}", self.errors());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Neither works on one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
