//! What all tests here use.

use std::sync::Arc;

use vvu::backend::block::{BlockOptions, EngineKind};

use crate::common::{Backend, Completion, SiblingMemory};
use crate::{DIRECT, ENGINE};

pub const OK: Completion = Completion { status: 0, used: 1 };
pub const IO_ERROR: Completion = Completion { status: 1, used: 1 };
pub const UNSUPPORTED: Completion = Completion { status: 2, used: 1 };
/// Guest address of memory that no ring is in.
pub const DATA: u64 = 1 << 20;

pub fn memory() -> Arc<SiblingMemory> {
    Arc::new(SiblingMemory::flat(4 << 20))
}

/// A back-end that carries out requests as this test target says.
pub fn start(content: &[u8], adjust: impl FnOnce(&mut BlockOptions)) -> Backend {
    Backend::start(content, |options| {
        (options.engine, options.direct) = (Some(ENGINE), DIRECT);
        adjust(options);
    })
}

/// The arguments that make a process do so.
pub fn arguments() -> Vec<&'static str> {
    let engine = match ENGINE {
        EngineKind::Sync => "sync",
        EngineKind::IoUring => "io-uring",
    };
    let direct: &[_] = if DIRECT { &["--direct"] } else { &[] };
    [&["--engine", engine], direct].concat()
}
