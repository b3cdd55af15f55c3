//! Measures the chain in one process: builds and runs `vvu/benches/chain` and counts its system calls with strace.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vvu_artifacts::workspace;
use vvu_process::logged;
use vvu_process::progress::Progress;
use vvu_testvm::RunDir;

use super::results::{Better, Key, Results};

const GROUP: &str = "chain";
const VARIANTS: [&str; 2] = ["vvu", "plain"];
/// Operations of a short and a long run: the difference of their system calls leaves out those of the start and the
/// end.
const COUNTED: (u32, u32) = (200, 1200);
/// Tests whose system calls are counted: they do one operation at a time, so that each costs the same.
const COUNTED_TESTS: [&str; 3] = ["notify", "message", "read-depth1"];

/// Measures the chain against the plain socket.
pub(super) fn measure(
    rounds: u32,
    seconds: u64,
    run: &RunDir,
    progress: &Progress,
    results: &mut Results,
) -> Result<()> {
    let program = build(run, progress)?;
    let stage = progress.stage("chain");
    for round in 1..=rounds {
        stage.update(format!("round {round} of {rounds}"));
        let mut command = Command::new(&program);
        // The order of the variants alternates between rounds.
        command.args(["--rounds", "1", "--seconds", &seconds.to_string()]);
        if round % 2 == 0 {
            command.arg("--vvu-first");
        }
        let printed = json(command, &run.file("chain.log"))?;
        for (test, variants) in printed.as_object().context("the chain bench prints an object")? {
            for variant in VARIANTS {
                let values = &variants[variant][0];
                note(round, test, variant, values, results);
            }
        }
    }
    stage.done(format!("{rounds} rounds"));
    count_system_calls(&program, run, progress, results)
}

/// Adds every figure of a test.
fn note(round: u32, test: &str, variant: &str, values: &Value, results: &mut Results) {
    let key = |metric: &str| Key { group: GROUP.into(), test: test.into(), metric: metric.into() };
    for (metric, value) in values.as_object().into_iter().flatten() {
        let better = if metric == "per_second" { Better::Higher } else { Better::Lower };
        match value {
            Value::Number(number) if metric != "operations" => {
                results.add(round, key(metric), better, variant, number.as_f64().unwrap_or(f64::NAN));
            }
            Value::Object(threads) => {
                let sum: f64 = threads.values().filter_map(Value::as_f64).sum();
                results.add(round, key(metric), better, variant, sum);
            }
            _ => {}
        }
    }
}

/// Builds the bench and returns its program.
fn build(run: &RunDir, progress: &Progress) -> Result<PathBuf> {
    let stage = progress.stage("bench build");
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(workspace())
        .args(["bench", "--package", "vvu", "--bench", "chain", "--no-run", "--message-format"])
        .args(["json-render-diagnostics"])
        .env("CARGO_TERM_COLOR", "never");
    let mut program = None;
    logged::run(command, &run.file("chain-build.log"), |line| match serde_json::from_str::<Value>(line) {
        Ok(message) if message["target"]["name"] == "chain" && message["executable"].is_string() => {
            program = message["executable"].as_str().map(PathBuf::from);
        }
        Ok(_) => {}
        Err(_) => stage.update(line.trim()),
    })?;
    let program = program.context("cargo did not say where the chain bench is")?;
    stage.done("vvu/benches/chain");
    Ok(program)
}

/// Runs a command whose output has one line of JSON.
fn json(command: Command, log: &Path) -> Result<Value> {
    let mut json = None;
    logged::run(command, log, |line| {
        if line.starts_with('{') {
            json = Some(serde_json::from_str(line));
        }
    })?;
    json.with_context(|| format!("no JSON in {}", log.display()))?.context("the chain bench prints JSON")
}

/// Counts the system calls of all threads for each operation.
fn count_system_calls(
    program: &Path,
    run: &RunDir,
    progress: &Progress,
    results: &mut Results,
) -> Result<()> {
    let stage = progress.stage("system calls");
    let found = Command::new("strace").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !found.is_ok_and(|status| status.success()) {
        results.skip("system calls", "there is no strace; install it to have them counted");
        stage.done("no strace");
        return Ok(());
    }
    for test in COUNTED_TESTS {
        for variant in VARIANTS {
            stage.update(format!("{test} over {variant}"));
            let count = |operations: u32| traced(program, test, variant, operations, run);
            let (few, many) = (count(COUNTED.0)?, count(COUNTED.1)?);
            let mut sum = 0.0;
            for (call, count) in many {
                let more = count.saturating_sub(few.get(&call).copied().unwrap_or(0));
                let each = f64::from(more) / f64::from(COUNTED.1 - COUNTED.0);
                sum += each;
                // A call that fewer than one in twenty operations makes is not part of the path.
                if each >= 0.05 {
                    let key = Key { group: GROUP.into(), test: test.into(), metric: format!("{call}_calls") };
                    results.add(1, key, Better::Lower, variant, each);
                }
            }
            let key = Key { group: GROUP.into(), test: test.into(), metric: "system_calls".into() };
            results.add(1, key, Better::Lower, variant, sum);
        }
    }
    stage.done("counted with strace");
    Ok(())
}

/// Counts each system call of a run of so many operations.
fn traced(
    program: &Path,
    test: &str,
    variant: &str,
    operations: u32,
    run: &RunDir,
) -> Result<BTreeMap<String, u32>> {
    let summary = run.file(&format!("strace-{test}-{variant}-{operations}.txt"));
    let mut command = Command::new("strace");
    command.args(["-f", "-c", "-o"]).arg(&summary).arg(program);
    command.args(["--test", test, "--via", variant, "--operations", &operations.to_string()]);
    json(command, &run.file("strace.log"))?;
    let text =
        std::fs::read_to_string(&summary).with_context(|| format!("cannot read {}", summary.display()))?;
    let counts = parse(&text);
    ensure!(!counts.is_empty(), "no counts in {}", summary.display());
    Ok(counts)
}

/// Reads the table of `strace -c`: `% time, seconds, usecs/call, calls, [errors,] syscall`.
fn parse(table: &str) -> BTreeMap<String, u32> {
    let row = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let call = words.last().filter(|call| **call != "total" && words.len() >= 5)?;
        Some(((*call).to_owned(), words[3].parse().ok()?))
    };
    table.lines().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_strace_is_read() {
        let table = "% time     seconds  usecs/call     calls    errors syscall\n\
                     ------ ----------- ----------- --------- --------- ----------------\n \
                     60.00    0.000600           3       200        12 recvmsg\n \
                     40.00    0.000400           2       150           write\n\
                     ------ ----------- ----------- --------- --------- ----------------\n\
                     100.00    0.001000           2       350        12 total\n";
        assert_eq!(parse(table), BTreeMap::from([("recvmsg".into(), 200), ("write".into(), 150)]));
    }
}
