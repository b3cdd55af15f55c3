//! Command-line options of a run, whatever chooses its scenarios.

use std::path::PathBuf;

use anyhow::{Result, bail};
use vvu_testvm::SetupOptions;

/// Options of a run.
#[derive(Debug, Default, clap::Args)]
pub struct RunOptions {
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment on flattened options would become a help text")]
    pub setup: SetupOptions,
    /// Directory whose tree is laid over the root of every VM
    #[arg(long, value_name = "DIR", help_heading = "VMs")]
    pub overlay: Vec<PathBuf>,
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
}
