//! In-flight tracking (vhost-user, "Inflight I/O tracking"): the requests that were taken and not yet given back are
//! written down in memory that outlives the back-end, so that the next back-end can finish them.
//!
//! The layout is the one for split rings.

mod region;
mod tracker;

use vm_memory::GuestMemoryMmap;

pub(super) use region::{FileId, Limits, Region, RegionError, create, no_file};
pub(super) use tracker::TrackerError;

/// The record of one ring.
pub(super) type Tracker = tracker::Tracker<GuestMemoryMmap>;
