//! The first message: version and capabilities of both sides.

use serde_json::{Value, json};

use super::wire::{FDS_MAX, MessageError, TRANSFER_SIZE_MAX, wire_struct};

/// Protocol version: major, minor. QEMU 11.1 refuses any other.
pub const VERSION: (u16, u16) = (0, 0);

wire_struct! {
    /// Start of [`Command::Version`](super::Command::Version) and its reply; [`Capabilities`] follow.
    Version, 4 {
        /// Equal on both sides.
        major: u16,
        /// At most the client's.
        minor: u16,
    }
}

/// Limits of what a side can receive. Absent values have the defaults of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// File descriptors in one message.
    pub max_msg_fds: usize,
    /// Bytes of data in one region access.
    pub max_data_xfer_size: usize,
}

impl Capabilities {
    /// Limits of this crate.
    pub const OURS: Self = Self { max_msg_fds: FDS_MAX, max_data_xfer_size: TRANSFER_SIZE_MAX };
    const DEFAULT: Self = Self { max_msg_fds: 1, max_data_xfer_size: 1 << 20 };

    /// Reads the version data that follows [`Version`]; none at all means the defaults.
    ///
    /// # Errors
    /// [`MessageError::VersionData`].
    pub fn parse(data: &[u8]) -> Result<Self, MessageError> {
        if data.is_empty() {
            return Ok(Self::DEFAULT);
        }
        let text = data.strip_suffix(&[0]).ok_or(MessageError::VersionData)?;
        let json: Value = serde_json::from_slice(text).map_err(|_| MessageError::VersionData)?;
        if !json.is_object() {
            return Err(MessageError::VersionData);
        }
        let number = |name: &str| json["capabilities"][name].as_u64().and_then(|n| usize::try_from(n).ok());
        Ok(Self {
            max_msg_fds: number("max_msg_fds").unwrap_or(Self::DEFAULT.max_msg_fds),
            max_data_xfer_size: number("max_data_xfer_size").unwrap_or(Self::DEFAULT.max_data_xfer_size),
        })
    }

    /// The wire form.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let json = json!({ "capabilities": {
            "max_msg_fds": self.max_msg_fds,
            "max_data_xfer_size": self.max_data_xfer_size,
            "write_multiple": false,
        }});
        let mut bytes = json.to_string().into_bytes();
        bytes.push(0);
        bytes
    }
}
