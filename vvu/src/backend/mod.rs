//! Back-ends: programs that serve a virtio device over a vhost-user unix socket.
//!
//! Nothing here depends on VVU. A back-end serves a front-end on the same host as well as one that the bridge of a
//! device VM connects to it.
//!
//! A front-end's message goes from `server` to `handler`, which changes a queue; each queue has a thread (`worker`)
//! that serves it (`serve`): takes requests from the queue (`queue`, over `ring` and `chain`), has an engine of the
//! device (`device`, `engine`) carry them out, and gives them back.

pub mod block;

mod chain;
mod device;
mod engine;
mod handler;
mod inflight;
mod memory;
mod notify;
mod poll;
mod queue;
mod ring;
mod serve;
mod server;
mod worker;

pub use server::ServeError;
