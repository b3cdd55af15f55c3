//! Proof that a run has left nothing behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Environment variable of every process of a run; its value is the run's name.
pub(crate) const RUN_VARIABLE: &str = "VVU_RUN";
/// How long the kernel may take to remove killed processes.
const LIMIT: Duration = Duration::from_secs(5);
/// How often to look for them.
const PERIOD: Duration = Duration::from_millis(20);

/// Checks that no process of `run` is alive and that none of `paths`, its sockets and links, exists or is bound.
///
/// The shared memory of a run has no name and is gone with the last process that holds it.
///
/// # Errors
///
/// The message lists what is left.
pub(crate) fn check(run: &str, paths: &[PathBuf]) -> Result<String> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let mut left = processes(run);
        left.extend(
            paths
                .iter()
                .filter(|path| path.symlink_metadata().is_ok())
                .map(|path| path.display().to_string()),
        );
        left.extend(bound(paths).into_iter().map(|path| format!("a socket bound to {path}")));
        if left.is_empty() {
            return Ok(format!(
                "no process with {RUN_VARIABLE}={run}, none of {} sockets and memory links, no memory file",
                paths.len()
            ));
        }
        if Instant::now() > deadline {
            bail!("left behind: {}", left.join(", "));
        }
        // Processes that are not children of this one give no event to wait for.
        std::thread::sleep(PERIOD);
    }
}

/// The processes that are alive and whose environment names `run`.
fn processes(run: &str) -> Vec<String> {
    let mark = format!("{RUN_VARIABLE}={run}");
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        // A process whose environment cannot be read belongs to another user and so to no run of ours.
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes())
    })
    .map(|pid| {
        let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        format!("process {pid} ({})", command.trim())
    })
    .collect()
}

/// The paths to which a socket is bound, whether or not the file still exists.
fn bound(paths: &[PathBuf]) -> Vec<String> {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let bound = |path: &&PathBuf| {
        table.lines().any(|line| line.split_whitespace().nth(7).map(Path::new) == Some(path))
    };
    paths.iter().filter(bound).map(|path| path.display().to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::process::Command;

    #[test]
    fn what_lives_is_found_and_what_ended_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let run = format!("leftover-test-{}", std::process::id());
        let socket = dir.path().join("s");
        let paths = [socket.clone()];

        let mut command = Command::new("sleep");
        command.arg("1000").env(RUN_VARIABLE, &run);
        let mut child = vvu_process::children::spawn(command).expect("sleep starts");
        assert_eq!(processes(&run), [format!("process {} (sleep)", child.id())]);
        child.kill().expect("killed");

        let listener = UnixListener::bind(&socket).expect("bound");
        fs::remove_file(&socket).expect("removed");
        assert_eq!(bound(&paths), [socket.display().to_string()]);
        drop(listener);

        let evidence = check(&run, &paths).expect("nothing is left");
        assert!(evidence.contains(&run), "{evidence}");
    }
}
