//! `cargo xtask`: builds the guests, runs the VMs and proves VVU end to end.

mod cache;
mod children;
mod console;
mod interrupt;
mod progress;
mod scenario;

fn main() {}
