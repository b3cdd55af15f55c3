//! vhost-user messages: header, payloads, feature bits, and the table of all requests.
//!
//! [`requests`] is the only place that says what a request consists of and whether a vvu device
//! carries it. Codes, feature bits and payload structures come from the `vhost` crate. All numbers
//! are little-endian, the byte order of the hosts that this project supports.

pub use features::{CARRIED_PROTOCOL_FEATURES, F_PROTOCOL_FEATURES, MASKED_FEATURES};
pub use header::{HEADER_SIZE, Header, MESSAGE_SIZE_MAX, MessageError, PAYLOAD_SIZE_MAX};
pub use memory::{
    InflightArea, MemoryRegion, REGIONS_MAX, memory_table_to_bytes, parse_memory_table, parse_single_region,
};
pub use payload::{Payload, VRING_INDEX_MASK, VRING_NO_FD, VringEventfd, decode, parse_u64};
pub use requests::{BACKEND_REQUESTS, Carried, FRONTEND_REQUESTS, Fds, Reply, Request};
pub use vhost::vhost_user::message::{BackendReq, FrontendReq};

mod features;
mod header;
mod memory;
mod payload;
pub mod requests;

const _: () = assert!(cfg!(target_endian = "little"), "payload structures are read in the host's byte order");
