//! `vvu`: the proxy on the host, back-ends and tools in the guest.

use std::process::ExitCode;

use clap::{ArgAction, Parser, Subcommand};
use vvu::shortage::remedy_of_cause;

mod commands;
mod logger;
#[cfg(feature = "sandbox")]
mod sandbox;
#[cfg(not(feature = "sandbox"))]
mod sandbox {
    //! Stands for the sandbox in a build without it.

    /// Refuses to run as if there were a sandbox.
    pub(crate) fn enter() -> anyhow::Result<()> {
        anyhow::bail!("this vvu was built without its sandbox (feature `sandbox`): run with --sandbox off")
    }
}
mod service;
mod stop;

/// virtio-vhost-user: a vhost-user back-end in one VM serves a virtio device of another VM
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// Log more; twice to log every message
    #[arg(short, long, action = ArgAction::Count, global = true)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the vvu device of a device VM, and listen for the sibling's front-end
    Proxy(commands::proxy::Args),
    /// Run a back-end: in a device VM behind its vvu device, or on a vhost-user socket of any machine
    Device(commands::device::Args),
    /// Bind the vvu device of a device VM to vfio-pci, as back-ends need it
    Bind(commands::bind::Args),
    /// Print what a vvu device is and in which state it is
    Inspect(commands::inspect::Args),
    /// Print a trace of `vvu proxy --trace`
    Trace(commands::trace::Args),
    /// Run a back-end program for `vvu device bridge`, and end it with the bridge
    #[command(hide = true)]
    Supervise(commands::supervise::Args),
    /// Remove the names of a proxy when it ends; started by `vvu proxy`
    #[command(hide = true)]
    RemoveNames(commands::names::Args),
    /// Write the man pages and the completions of shells
    #[cfg(feature = "manual")]
    #[command(hide = true)]
    Manual(commands::manual::Args),
    /// Print the version of the state that supervised proxies save
    #[command(hide = true)]
    StateFormat,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // A supervisor must not have threads; its workers have logs of their own.
    let logs = !matches!(&cli.command, Command::Proxy(args) if args.is_supervised());
    if logs && let Err(error) = logger::init(cli.verbose) {
        eprintln!("vvu: {}", explain(&anyhow::Error::new(error).context("cannot start to log")));
        return ExitCode::FAILURE;
    }
    let result = match cli.command {
        Command::Proxy(args) => commands::proxy::run(args, cli.verbose),
        Command::Device(args) => commands::device::run(&args),
        Command::Bind(args) => commands::bind::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Trace(args) => commands::trace::run(&args),
        Command::Supervise(args) => commands::supervise::run(&args),
        Command::RemoveNames(args) => commands::names::run(&args),
        #[cfg(feature = "manual")]
        Command::Manual(args) => commands::manual::run(&args, <Cli as clap::CommandFactory>::command()),
        Command::StateFormat => commands::proxy::state_format(),
    };
    logger::finish(result.as_ref().err().map(explain).as_deref());
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Joins an error and its causes, and adds what helps if a resource is short.
fn explain(error: &anyhow::Error) -> String {
    let text = describe(error);
    match remedy_of_cause(error.as_ref()) {
        Some(remedy) => format!("{text}; {remedy}"),
        None => text,
    }
}

/// Joins an error and its causes, without causes that the text before them contains.
fn describe(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        before if before.contains(&cause) => text,
        before => format!("{before}: {cause}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once() {
        let error = anyhow::Error::msg("no such file").context("cannot open x: no such file; make one");
        assert_eq!(describe(&error), "cannot open x: no such file; make one");
        assert_eq!(
            describe(&error.context("cannot start")),
            "cannot start: cannot open x: no such file; make one"
        );
    }

    #[test]
    fn a_shortage_is_told_with_its_remedy() {
        let error =
            anyhow::Error::new(std::io::Error::from(rustix::io::Errno::MFILE)).context("cannot start");
        assert!(
            explain(&error).contains("(os error 24); raise the limit on open files"),
            "{}",
            explain(&error)
        );
        assert_eq!(explain(&anyhow::Error::msg("no")), "no");
    }
}
