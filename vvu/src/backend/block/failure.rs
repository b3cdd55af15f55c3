//! Why a block request fails.

use std::io;

use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP};

use super::request::Malformed;
use crate::backend::chain::ChainError;

/// Why a request fails.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("{0}")]
    Malformed(#[from] Malformed),
    #[error("disk: {0}")]
    Disk(#[from] io::Error),
    #[error("{len} bytes at sector {sector} of a disk of {sectors} sectors")]
    Range { sector: u64, len: u64, sectors: u64 },
    #[error("{0} bytes of data")]
    Size(u64),
    #[error("change of a read-only disk")]
    ReadOnly,
    #[error("unknown request or flag")]
    Unsupported,
}

impl Failure {
    /// The status that the driver gets.
    pub(super) fn status(&self) -> u32 {
        if matches!(self, Self::Unsupported) { VIRTIO_BLK_S_UNSUPP } else { VIRTIO_BLK_S_IOERR }
    }
}

impl From<ChainError> for Failure {
    fn from(error: ChainError) -> Self {
        Self::Malformed(error.into())
    }
}
