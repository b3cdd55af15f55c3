//! `e2e --keep` and `--interactive`: the VMs of a run stay, and a person runs commands in them.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vvu_init::protocol::End;

use super::steps::Running;
use vvu_process::interrupt;
use vvu_testvm::rundir::RunDir;
use vvu_testvm::vm::{Vm, ending};

/// How often to look for Ctrl-C while a person thinks.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// How long a command may take, at native speed.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);
/// Longest line in bytes.
const MAX_LINE: usize = 32 << 10;

/// Runs the commands that `input` gives, `VM COMMAND` on a line, until `exit` or its end.
///
/// # Errors
///
/// Ctrl-C, or `input` cannot be read; what goes wrong in a VM is printed.
pub(super) fn prompt(running: &mut Running<'_>, run: &RunDir, input: &mut impl AsFd) -> Result<()> {
    let names: Vec<String> = running.vms.keys().cloned().collect();
    eprintln!(
        "the VMs run: {}; their consoles are in {}\ntype `VM COMMAND`, for example `{} dmesg | tail`; `exit` goes on",
        names.join(", "),
        run.path().display(),
        names.first().map_or("device", String::as_str)
    );
    let limit = COMMAND_LIMIT * running.slowness;
    while let Some(line) = line(input)? {
        let (name, command) = line.split_once(' ').unwrap_or((&line, ""));
        match (name, running.vms.get_mut(name)) {
            ("", _) => {}
            ("exit", None) => return Ok(()),
            (_, Some(vm)) if !command.trim().is_empty() => {
                if let Err(error) = command_in(vm, command, limit) {
                    interrupt::check()?;
                    eprintln!("{error:#}");
                }
            }
            _ => eprintln!("want `VM COMMAND` with one of {}, or `exit`", names.join(", ")),
        }
    }
    Ok(())
}

fn command_in(vm: &mut Vm, command: &str, limit: Duration) -> Result<()> {
    let begun = Instant::now();
    let exit = vm.run(command, limit, &mut interrupt::check)?;
    // To stderr, as stdout may be the report's.
    let mut out = io::stderr().lock();
    out.write_all(exit.output.stdout.as_bytes())?;
    out.write_all(exit.output.stderr.as_bytes())?;
    if exit.end != End::Code(0) {
        writeln!(out, "[{} after {:.1} s]", ending(exit.end), begun.elapsed().as_secs_f64())?;
    }
    Ok(())
}

/// The next line, trimmed; none at the end.
fn line(input: &mut impl AsFd) -> Result<Option<String>> {
    let mut bytes = Vec::new();
    loop {
        interrupt::check()?;
        match poll(&mut [PollFd::new(&*input, PollFlags::IN)], Some(&LOOK)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            result => result.context("cannot wait for a command")?,
        };
        // Byte by byte: what is read too far would be lost to the next call.
        let mut byte = [0];
        let count = rustix::io::read(&*input, &mut byte).context("cannot read a command")?;
        if count == 0 && bytes.is_empty() {
            return Ok(None);
        }
        if count == 0 || byte == *b"\n" {
            return Ok(Some(String::from_utf8_lossy(&bytes).trim().to_owned()));
        }
        ensure!(bytes.len() < MAX_LINE, "a command longer than {MAX_LINE} bytes");
        bytes.push(byte[0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_one_by_one_and_end() {
        let (mut input, mut output) = io::pipe().expect("a pipe");
        output.write_all(b"device ls \n\nexit").expect("written");
        drop(output);
        let mut next = || line(&mut input).expect("readable");
        assert_eq!(next().as_deref(), Some("device ls"));
        assert_eq!(next().as_deref(), Some(""));
        assert_eq!(next().as_deref(), Some("exit"));
        assert_eq!(next(), None);
    }

    #[test]
    fn an_endless_line_is_refused() {
        let (mut input, mut output) = io::pipe().expect("a pipe");
        let writer = std::thread::spawn(move || output.write_all(&[b'x'; MAX_LINE + 1]));
        line(&mut input).expect_err("too long");
        writer.join().expect("no panic").expect("written");
    }
}
