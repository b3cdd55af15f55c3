//! PID 1 of the guests.

fn main() {}
