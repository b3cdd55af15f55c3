//! What the host and PID 1 of the guests agree on: the protocol between them, and where a guest's kernel modules are. PID 1
//! itself is the binary of this crate.

pub mod modules;
pub mod protocol;
