//! `--print-capabilities`: what management programs such as libvirt ask a back-end program (vhost-user, "Backend program
//! conventions"; the names are those of QEMU's `docs/interop/vhost-user.json`).

use std::io::{self, Write};

use anyhow::Context;
use serde::Serialize;

/// `VHostUserBackendCapabilities`.
#[derive(Debug, Serialize)]
struct Capabilities {
    /// The type of device.
    r#type: &'static str,
    /// Options of the conventions for this type that the program has, without the hyphens.
    features: &'static [&'static str],
}

/// Prints those of the block back-end.
pub(super) fn print_block() -> anyhow::Result<()> {
    let capabilities = Capabilities { r#type: "block", features: &["read-only", "blk-file"] };
    let text = serde_json::to_string(&capabilities).context("cannot encode the capabilities")?;
    writeln!(io::stdout(), "{text}").context("cannot write to standard output")
}
