//! `cargo xtask`: builds the guests, runs the VMs and proves VVU end to end.

fn main() {}
