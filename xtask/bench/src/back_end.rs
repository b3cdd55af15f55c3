//! Back-ends on the host, which VVU is compared with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use regex::Regex;
use serde_json::json;
use vvu_testvm::{Lab, Process, Ready};

/// QEMU's storage daemon, which is searched for in `PATH`.
pub(super) const STORAGE_DAEMON: &str = "qemu-storage-daemon";
/// Part of the line that `vvu device` prints once it listens.
const READY: &str = "ready";

/// A running back-end that listens. Dropping it kills it and removes its files.
pub(super) struct BackEnd {
    process: Process,
    files: Vec<PathBuf>,
}

impl BackEnd {
    /// Starts `vvu` with `words`, which leave out only the socket.
    pub(super) fn vvu(lab: &Lab<'_>, words: &[String], socket: &Path, log: &str) -> Result<Self> {
        let mut command = Command::new(&lab.setup().binaries.vvu);
        command.args(words).arg("--socket").arg(socket);
        let process = lab.process("the back-end", command, log, Ready::Line(Regex::new(READY)?))?;
        Ok(Self { process, files: vec![socket.to_owned()] })
    }

    /// Starts QEMU's storage daemon.
    pub(super) fn storage_daemon(
        lab: &Lab<'_>,
        program: &Path,
        disk: &Path,
        socket: &Path,
        log: &str,
    ) -> Result<Self> {
        let node =
            json!({"driver": "raw", "node-name": "disk", "file": {"driver": "file", "filename": disk}});
        let export = json!({
            "type": "vhost-user-blk", "id": "disk", "node-name": "disk", "writable": true,
            "addr": {"type": "unix", "path": socket},
        });
        let pid_file = socket.with_extension("pid");
        let mut command = Command::new(program);
        command.args(["--blockdev", &node.to_string(), "--export", &export.to_string(), "--pidfile"]);
        command.arg(&pid_file);
        // The daemon writes its pid file once its exports exist.
        let process = lab.process("the back-end", command, log, Ready::File(pid_file.clone()))?;
        Ok(Self { process, files: vec![socket.to_owned(), pid_file] })
    }

    /// The process id.
    pub(super) fn id(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        self.process.kill();
        for path in &self.files {
            // A back-end that ended by itself may have removed it.
            let _ = fs::remove_file(path);
        }
    }
}
