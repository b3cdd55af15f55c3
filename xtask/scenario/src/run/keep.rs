//! `e2e --keep` and `--interactive`: keeps the VMs of a run and runs a person's commands in them.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vvu_init::protocol::End;
use vvu_process::interrupt;
use vvu_testvm::{Lab, Vm, ending};

use super::steps::Running;

/// How often to check for Ctrl-C while nothing is typed.
const PERIOD: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// How long a command may take, at native speed.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);
/// Longest line in bytes.
const MAX_LINE: usize = 32 << 10;

/// Runs the commands in `input`, one `VM COMMAND` on a line, until `exit` or the end of `input`.
///
/// # Errors
///
/// Fails on Ctrl-C and if `input` cannot be read. Errors of a VM are printed.
pub(super) fn prompt(running: &mut Running<'_>, lab: &Lab<'_>, input: &mut impl AsFd) -> Result<()> {
    // A VM that has failed must not keep a person from looking at the others.
    lab.set_tolerant(true);
    let result = commands(running, lab, input);
    lab.set_tolerant(false);
    result
}

fn commands(running: &mut Running<'_>, lab: &Lab<'_>, input: &mut impl AsFd) -> Result<()> {
    let names: Vec<String> = running.vms.keys().cloned().collect();
    eprintln!(
        "the VMs run: {}; their consoles are in {}\ntype `VM COMMAND`, for example `{} dmesg | tail`; `exit` goes on",
        names.join(", "),
        lab.run().path().display(),
        names.first().map_or("device", String::as_str)
    );
    while let Some(line) = line(input)? {
        let (name, command) = line.split_once(' ').unwrap_or((&line, ""));
        match (name, running.vms.get(name)) {
            ("", _) => {}
            ("exit", None) => return Ok(()),
            (_, Some(vm)) if !command.trim().is_empty() => {
                if let Err(error) = run(vm, command, lab.deadline(COMMAND_LIMIT)) {
                    interrupt::check()?;
                    eprintln!("{error:#}");
                }
            }
            _ => eprintln!("want `VM COMMAND` with one of {}, or `exit`", names.join(", ")),
        }
    }
    Ok(())
}

fn run(vm: &Vm, command: &str, deadline: Instant) -> Result<()> {
    let begun = Instant::now();
    let exit = vm.exec(command, deadline)?;
    // stdout may be for the report alone.
    let mut out = io::stderr().lock();
    out.write_all(exit.output.stdout.as_bytes())?;
    out.write_all(exit.output.stderr.as_bytes())?;
    if exit.end != End::Code(0) {
        writeln!(out, "[{} after {:.1} s]", ending(exit.end), begun.elapsed().as_secs_f64())?;
    }
    Ok(())
}

/// The next line, trimmed; `None` at the end.
fn line(input: &mut impl AsFd) -> Result<Option<String>> {
    let mut bytes = Vec::new();
    loop {
        interrupt::check()?;
        match poll(&mut [PollFd::new(&*input, PollFlags::IN)], Some(&PERIOD)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            result => result.context("cannot wait for a command")?,
        };
        // Byte by byte, since the next call would miss what this one reads too far.
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
