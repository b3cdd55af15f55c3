//! Makes each scenario file beside this one a test, which runs `cargo xtask e2e SCENARIO`.

use std::env;
use std::path::Path;
use std::process::{Command, ExitCode};

use libtest_mimic::{Arguments, Failed, Trial};

/// Environment variable with the path of the xtask program, which `cargo xtask test` sets. Without it cargo builds and
/// runs xtask.
const XTASK: &str = "VVU_XTASK";
/// Lines shown from the end of a failed run's output; enough for the table of checks and their evidence.
const TAIL_LINES: usize = 120;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let trials = match trials(Path::new(env!("CARGO_MANIFEST_DIR"))) {
        Ok(trials) => trials,
        Err(error) => {
            eprintln!("cannot list the scenarios: {error}");
            return ExitCode::FAILURE;
        }
    };
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trials(dir: &Path) -> std::io::Result<Vec<Trial>> {
    let mut trials = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json")
            && let Some(name) = path.file_stem()
        {
            let name = name.to_string_lossy().into_owned();
            trials.push(Trial::test(name.clone(), move || run(&[&name])));
        }
    }
    // Tests the KVM path even on machines without KVM.
    trials.push(Trial::test("nested", || run(&["block", "--nested"])));
    // Varies IOMMUs, kernels, VMMs and sizes.
    trials.push(Trial::test("matrix", || run(&["block", "--matrix"])));
    Ok(trials)
}

fn run(arguments: &[&str]) -> Result<(), Failed> {
    let mut command = match env::var_os(XTASK) {
        Some(xtask) => Command::new(xtask),
        None => {
            let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            cargo.args(["run", "--quiet", "--package", "xtask", "--"]);
            cargo
        }
    };
    let output = command.arg("e2e").args(arguments).output()?;
    if output.status.success() {
        return Ok(());
    }
    let mut text = String::from_utf8_lossy(&output.stderr).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stdout));
    let lines: Vec<&str> = text.lines().collect();
    let tail = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    let arguments = arguments.join(" ");
    Err(format!("xtask e2e {arguments}: {}\n{}", output.status, tail.join("\n")).into())
}
