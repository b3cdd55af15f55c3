//! A block request as the driver put it into the queue (virtio 1.2, 5.2.6), taken apart. Only its shape is checked.

use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::backend::chain::{Chain, ChainError, Segments};

/// Bytes of `struct virtio_blk_req` in front of the data: type (4), reserved (4), sector (8).
const HEADER_SIZE: usize = 16;

/// Why a chain of descriptors is not a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// Fewer readable bytes than a header.
    #[error("no request header")]
    Header,
    /// No writable byte.
    #[error("no status byte")]
    Status,
}

/// A well-formed request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// One of `VIRTIO_BLK_T_*`, or an unknown type.
    pub(super) kind: u32,
    /// First sector, in units of 512 bytes.
    pub(super) sector: u64,
    /// What the device reads, behind the header.
    pub(super) input: Segments,
    /// What the device writes, in front of the status.
    pub(super) output: Segments,
    /// Address of the status byte.
    pub(super) status: GuestAddress,
}

/// A chain that is not a request, and where the driver may look for a status all the same.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rejected {
    pub(super) reason: Malformed,
    pub(super) status: Option<GuestAddress>,
}

impl Request {
    /// Takes `chain` apart. A driver may cut a request into descriptors as it likes (virtio 1.2, 2.7.4.3).
    ///
    /// # Errors
    /// [`Rejected`].
    pub(super) fn parse(memory: &GuestMemoryMmap, chain: Chain) -> Result<Self, Rejected> {
        let Chain { readable: mut input, writable: mut output, shape } = chain;
        let status = output.split_last();
        let reject = |reason| Rejected { reason, status };
        shape.map_err(|error| reject(error.into()))?;

        let header = input.split_front(HEADER_SIZE);
        if header.len() != HEADER_SIZE as u64 {
            return Err(reject(Malformed::Header));
        }
        let mut bytes = [0; HEADER_SIZE];
        header.read(memory, &mut bytes).map_err(|error| reject(error.into()))?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = bytes;
        let Some(status) = status else { return Err(reject(Malformed::Status)) };
        Ok(Self {
            kind: u32::from_le_bytes([a, b, c, d]),
            sector: u64::from_le_bytes(sector),
            input,
            output,
            status,
        })
    }
}

#[cfg(test)]
#[path = "request_test.rs"]
mod tests;
