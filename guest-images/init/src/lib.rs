//! What the guests' PID 1 and the host have to agree on. PID 1 itself is the binary of this crate.

pub mod protocol;
