//! `vvu`: the proxy on the host, back-ends and tools in the guest.

fn main() {}
