//! Runs VMs and vvu proxies for tests.

pub mod console;
pub mod control;
pub mod facts;
pub mod leftover;
pub mod memory;
pub mod outer;
pub mod prepared;
pub mod rundir;
pub mod setup;
pub mod vm;
pub mod vmm;
