//! `vvu manual`: writes the man pages and the completions of shells, for packages.

use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use clap::ValueEnum;
use clap_complete::Shell;

/// Arguments of `vvu manual`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory that gets `man1` and `completions`
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Writes what `command` says of itself.
///
/// # Errors
/// The directory cannot be written.
pub(crate) fn run(args: &Args, command: clap::Command) -> anyhow::Result<()> {
    // Each would have pages of its own.
    let mut command = command
        .disable_help_subcommand(true)
        .mut_subcommands(|subcommand| subcommand.disable_help_subcommand(true));
    let [pages, completions] = ["man1", "completions"].map(|name| args.directory.join(name));
    for directory in [&pages, &completions] {
        fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    }
    for shell in Shell::value_variants() {
        clap_complete::generate_to(*shell, &mut command, "vvu", &completions)
            .with_context(|| format!("cannot write to {}", completions.display()))?;
    }
    clap_mangen::generate_to(command, &pages).with_context(|| format!("cannot write to {}", pages.display()))
}
