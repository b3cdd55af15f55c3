//! `cargo xtask test`: runs all tests of the workspace with nextest.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use vvu_artifacts::workspace;
use vvu_process::progress::Progress;
use vvu_testvm::outer::NestedSetup;
use vvu_testvm::{Setup, SetupOptions};

use crate::format::{self, Matrix};
use crate::matrix::Coverage;

/// Names the xtask program to the scenario tests.
const XTASK: &str = "VVU_XTASK";

/// Options of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Arguments for `cargo nextest run`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "NEXTEST ARGS")]
    nextest: Vec<OsString>,
}

/// Makes the set-up of all scenarios, then becomes `cargo nextest run --workspace`.
///
/// # Errors
///
/// Fails if nextest is missing or the set-up cannot be made.
pub fn main(options: &Options) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut version = Command::new(&cargo);
    version.args(["nextest", "--version"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if !version.status().is_ok_and(|status| status.success()) {
        bail!("cargo-nextest is missing: install it with `cargo install cargo-nextest --locked`");
    }
    {
        // Otherwise the set-up would count against the time of the first test that needs it.
        let progress = Progress::new(false);
        let options = SetupOptions::default();
        let dir = workspace().join("scenarios");
        let scenarios = format::list(&dir)?;
        let (_, cells) = Matrix::load(&dir, "block", Coverage::Pairs, |_| Ok(()))?;
        let all = scenarios.values().chain(cells.iter().map(|cell| &cell.scenario));
        Setup::obtain(&options, &format::needs(all), &progress)?;
        NestedSetup::obtain(&options, &progress)?;
    }
    let mut nextest = Command::new(&cargo);
    nextest.current_dir(workspace()).args(["nextest", "run", "--workspace"]).args(&options.nextest);
    nextest.env(XTASK, std::env::current_exe().context("cannot find this program")?);
    // nextest replaces this process, so that it gets the signals and can end its tests.
    Err(nextest.exec()).context("cannot run cargo nextest")
}
