//! Shortages pass: the nth system call of each kind fails, for every n, and the next front-end is served.
//!
//! With `VVU_FAULTS=all` in the environment every n is tried, else a part of them. `VVU_FAULTS_KIND=NAME` tries one kind.
#![allow(unreachable_pub, reason = "its modules are one program")]

#[path = "../common/mod.rs"]
mod common;

mod block;
mod calls;
mod frontend;
mod guest;
mod interceptor;
mod process;
mod proxy;
mod stalls;
mod walk;
