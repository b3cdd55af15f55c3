//! What is on the wire: addresses, PCI and virtio layouts, vhost-user messages.
//!
//! Nothing here does I/O, and nothing here is unsafe.

pub mod addr;
pub mod pci;
pub mod vhost_user;
pub mod virtio;
