//! The block back-end, end to end over a plain vhost-user socket, with the synchronous engine. `block_io_uring` and
//! `block_direct` run the same tests with the other one.
#![allow(unreachable_pub, reason = "its modules are one program")]

#[path = "../common/mod.rs"]
mod common;

mod connection;
mod conventions;
mod device;
mod hostile;
mod killed;
mod limits;
mod process;
mod requests;
mod rings;

mod with;

use vvu::backend::block::EngineKind;

use with::{DATA, IO_ERROR, OK, UNSUPPORTED, memory, start};

/// How the back-end carries out requests.
const ENGINE: EngineKind = EngineKind::Sync;
const DIRECT: bool = false;
