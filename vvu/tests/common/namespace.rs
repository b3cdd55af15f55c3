//! Runs `vvu` in a PID namespace of its own, as a container without a `/proc` of its own does.

use std::process::Command;

/// A command to which the arguments of `vvu` can be added; `None`, and a note, where this machine allows no PID
/// namespaces.
pub(crate) fn vvu_in_pid_namespace() -> Option<Command> {
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--"]);
        command
    };
    if !unshare().arg("true").status().is_ok_and(|status| status.success()) {
        eprintln!("skipped: this machine allows no PID namespaces");
        return None;
    }
    let mut command = unshare();
    command.arg(env!("CARGO_BIN_EXE_vvu"));
    Some(command)
}
