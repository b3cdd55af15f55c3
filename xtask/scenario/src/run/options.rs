//! Command-line options of a run, whatever chooses its scenarios.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;
use vvu_artifacts::image::{GuestPrograms, add_own_program};
use vvu_testvm::SetupOptions;

use crate::format::Scenario;

/// Options of a run.
#[derive(Debug, Default, clap::Args)]
pub struct RunOptions {
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment on flattened options would become a help text")]
    pub setup: SetupOptions,
    /// Directory whose tree is laid over the root of every VM
    #[arg(long, value_name = "DIR", help_heading = "VMs")]
    pub overlay: Vec<PathBuf>,
    /// A program that every VM gets as a command: an executable of the host, by a path with a `/`, with the libraries that
    /// it needs, or a name in guest-images/programs.json
    #[arg(long, value_name = "FILE|NAME", help_heading = "VMs")]
    pub program: Vec<PathBuf>,
    /// Give a variable of the scenario another text
    #[arg(long = "set", value_name = "NAME=TEXT", value_parser = variable)]
    pub variables: Vec<(String, String)>,
    /// Print the report as JSON, and nothing else, on stdout
    #[arg(long)]
    pub json: bool,
    /// Measure a bare boot of the same guest and compare with it
    #[arg(long)]
    pub measure: bool,
    /// Before the VMs are shut down, and when a check fails, run commands from standard input in them
    #[arg(long)]
    pub keep: bool,
    /// When a check fails, run commands from standard input in the VMs
    #[arg(long)]
    pub interactive: bool,
}

impl RunOptions {
    /// Checks what the command line names.
    ///
    /// # Errors
    ///
    /// Fails if an overlay is no directory.
    pub fn check(&self) -> Result<()> {
        for overlay in &self.overlay {
            if !overlay.is_dir() {
                bail!("--overlay {}: want a directory", overlay.display());
            }
        }
        Ok(())
    }

    /// Changes `scenario` as the command line asks for.
    ///
    /// # Errors
    ///
    /// Fails if the scenario has no such variable, or is not valid with its text, or there is no such program.
    pub fn apply(&self, scenario: &mut Scenario) -> Result<()> {
        for (name, text) in &self.variables {
            scenario.set_variable(name, text).with_context(|| format!("--set {name}"))?;
        }
        let listed = GuestPrograms::read()?;
        for name in self.program.iter().filter_map(|program| listed_name(program)) {
            listed.check(name).with_context(|| {
                format!("--program {name}: want a path with a `/` for an executable of the host")
            })?;
            for vm in scenario.vms.values_mut() {
                vm.programs.push(name.to_owned());
            }
        }
        Ok(())
    }
}

/// What the command line lays over the root of every VM.
pub(super) struct Overlay {
    /// The trees, of which a later one wins.
    pub(super) trees: Vec<PathBuf>,
    /// Holds the programs' tree.
    _programs: Option<TempDir>,
}

impl Overlay {
    /// # Errors
    ///
    /// Fails if one of the programs is none.
    pub(super) fn new(options: &RunOptions) -> Result<Self> {
        let mut own = options.program.iter().filter(|program| listed_name(program).is_none()).peekable();
        if own.peek().is_none() {
            return Ok(Self { trees: options.overlay.clone(), _programs: None });
        }
        let programs = tempfile::tempdir().context("cannot create a temporary directory")?;
        for file in own {
            add_own_program(file, programs.path())?;
        }
        let trees = [programs.path().to_owned()].into_iter().chain(options.overlay.iter().cloned());
        Ok(Self { trees: trees.collect(), _programs: Some(programs) })
    }
}

/// The name of a listed program, which is no path.
fn listed_name(program: &Path) -> Option<&str> {
    program.to_str().filter(|name| !name.contains('/'))
}

fn variable(text: &str) -> Result<(String, String)> {
    let (name, text) = text.split_once('=').context("want NAME=TEXT")?;
    Ok((name.to_owned(), text.to_owned()))
}
