//! The whole chain in one process and without a VM: front-end ⇄ proxy ⇄ vfio-user client ⇄ guest
//! driver and bridge ⇄ block back-end.
#![allow(unreachable_pub, reason = "its modules are one program")]

#[path = "../common/mod.rs"]
mod common;

mod chain;
mod direct;
mod express;
mod inflight;
mod inspect;
mod library;
mod lifecycle;
mod logs;
mod negotiation;
mod program;
mod reconfiguration;
mod requests;
