//! Wire formats: addresses, PCI and virtio layouts, vhost-user messages.
//!
//! This module does no I/O and has no unsafe code.

pub mod addr;
pub mod express;
pub mod pci;
pub mod vhost_user;
pub mod virtio;

/// Bytes of a page: the smallest unit in which hosts and guests of this project map memory.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes of the huge pages that a sibling memory file can be made of.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;
