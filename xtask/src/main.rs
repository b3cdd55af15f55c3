//! `cargo xtask`: builds the guests, runs the VMs and proves VVU end to end.

mod cache;
mod children;
mod progress;

fn main() {}
