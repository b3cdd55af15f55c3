//! The block back-end, end to end over a plain vhost-user socket.
#![allow(unreachable_pub, reason = "its modules are one program")]

#[path = "../common/mod.rs"]
mod common;

mod connection;
mod hostile;
mod killed;
mod limits;
mod process;
mod requests;
mod rings;

use std::sync::Arc;

use common::{Completion, SiblingMemory};

const OK: Completion = Completion { status: 0, used: 1 };
const IO_ERROR: Completion = Completion { status: 1, used: 1 };
const UNSUPPORTED: Completion = Completion { status: 2, used: 1 };
/// Guest address of memory that no ring is in.
const DATA: u64 = 1 << 20;

fn memory() -> Arc<SiblingMemory> {
    Arc::new(SiblingMemory::flat(4 << 20))
}
