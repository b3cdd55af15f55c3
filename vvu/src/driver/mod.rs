//! The guest driver: brings the vvu device up and moves vhost-user messages through its queues.

pub mod pci_device;
pub mod vfio_user;

mod doorbells;
mod event_fd;
