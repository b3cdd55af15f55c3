//! The tests of `block`, through an io_uring without the page cache.
#![allow(unreachable_pub, reason = "its modules are one program")]

#[path = "common/mod.rs"]
mod common;

#[path = "block/connection.rs"]
mod connection;
#[path = "block/device.rs"]
mod device;
#[path = "block/hostile.rs"]
mod hostile;
#[path = "block/killed.rs"]
mod killed;
#[path = "block/limits.rs"]
mod limits;
#[path = "block/process.rs"]
mod process;
#[path = "block/requests.rs"]
mod requests;
#[path = "block/rings.rs"]
mod rings;
#[path = "block/unpinnable.rs"]
mod unpinnable;
#[path = "block/with.rs"]
mod with;

use vvu::backend::block::EngineKind;

use with::{DATA, IO_ERROR, OK, UNSUPPORTED, memory, start};

/// How the back-end carries out requests.
const ENGINE: EngineKind = EngineKind::IoUring;
const DIRECT: bool = true;
