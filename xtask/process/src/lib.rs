//! Child processes, interruption and progress of the harness.

pub mod children;
pub mod interrupt;
pub mod logged;
pub mod progress;
pub mod text;
