//! The parts of a device that its connections share.

use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{Shutdown, shutdown};

use super::closer::Closer;
use super::events::Events;
use super::sibling_memory::SiblingMemory;
use super::trace::Trace;
use crate::durable::Ledger;

#[derive(Debug)]
pub(super) struct Resources {
    pub(super) memory: SiblingMemory,
    /// Number of vhost queues.
    pub(super) queues: u16,
    pub(super) events: Events,
    pub(super) closer: Closer,
    pub(super) trace: Option<Trace>,
    /// Where the kernel notes what happens on the device's sockets, if the state is kept for a successor.
    pub(super) ledgers: Option<Ledgers>,
}

/// The ledgers of a device's sockets.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ledgers {
    pub(super) frontend: Ledger,
    pub(super) channel: Ledger,
    pub(super) express: Ledger,
}

impl Resources {
    /// Whether the state is kept for a successor: it is committed after each step of the device, so a step may do one thing
    /// that others see.
    pub(super) fn is_kept(&self) -> bool {
        self.ledgers.is_some()
    }

    /// Stops watching `socket` and closes it in the closer. The peer notices at once.
    pub(super) fn disconnect(&self, socket: impl AsFd + Send + 'static) {
        self.events.remove(&socket);
        hang_up(&self.closer, socket);
    }

    /// Closes descriptors of a peer in the closer.
    pub(super) fn close_all(&self, fds: &mut Vec<OwnedFd>) {
        if !fds.is_empty() {
            self.closer.close(std::mem::take(fds));
        }
    }
}

/// Disconnects `socket`, which is not watched, and closes it in the closer. The peer notices at once.
pub(super) fn hang_up(closer: &Closer, socket: impl AsFd + Send + 'static) {
    // It fails if the peer has left already.
    let _ = shutdown(&socket, Shutdown::Both);
    closer.close(socket);
}
