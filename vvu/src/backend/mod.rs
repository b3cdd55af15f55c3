//! Back-ends: programs that serve a virtio device over a vhost-user unix socket.
//!
//! Nothing here knows of VVU. A back-end serves a front-end on the same host as well as one that
//! the guest's bridge connects it to.

pub mod block;

mod connection;
mod inflight;
mod poll;
mod server;
mod vring;

pub use server::{ServeError, Stop};
