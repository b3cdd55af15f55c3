//! State that outlives the process that keeps it: the worker of `vvu proxy --supervised`.
//!
//! The worker shares its table of file descriptors with its supervisor, so descriptors stay open when it dies, under
//! their numbers. What else a successor has to know is in shared memory:
//!
//! - [`Store`] has the state as of the last *commit*. The worker commits after each step.
//! - [`Ledger`] has what the kernel did since: it notes there how many bytes of a socket it received or sent, in the
//!   system call itself. So a successor receives no byte twice, and sends none twice.
//! - [`Held`] keeps a value, such as a descriptor, until the next commit: the state of the last one may name it.

mod held;
mod ledger;
mod restore;
mod store;

/// Version of the saved state. A program takes over only a state of its own version.
pub const FORMAT: u32 = 1;

pub use held::{Fd, Held, hold, hold_until_commit, release};
pub use ledger::{Landed, Ledger};
pub use restore::{Adopted, RestoreError};
pub use store::{SavedState, Section, SocketSlot, Store};
