//! The protocol between the host and PID 1 of the guests. PID 1 itself is the binary of this crate.

pub mod protocol;
