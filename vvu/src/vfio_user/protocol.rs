//! vfio-user messages as stock QEMU speaks them (QEMU docs/interop/vfio-user.rst, protocol 0.0).
//!
//! Fields are in the byte order of the host, which is little-endian wherever this crate runs.
//! Constants that vfio-user shares with the kernel's VFIO come from the `vfio-bindings` crate.

use serde_json::{Value, json};
use vfio_bindings::bindings::vfio;

use crate::spec::pci::Region;

/// Bytes of a message header.
pub const HEADER_SIZE: usize = 16;
/// Most bytes of data in one region access.
pub const TRANSFER_SIZE_MAX: usize = 1 << 20;
/// Most bytes of a message, header included: a region access with all its data.
pub const MESSAGE_SIZE_MAX: usize = HEADER_SIZE + RegionAccess::SIZE + TRANSFER_SIZE_MAX;
/// Most file descriptors attached to one message; QEMU attaches no more either.
pub const FDS_MAX: usize = 16;
/// Most DMA maps at one time; what a client assumes when the server names no limit.
pub const DMA_MAPS_MAX: usize = 65535;

/// Protocol version: major, minor. QEMU 11.1 refuses any other.
pub const VERSION: (u16, u16) = (0, 0);
/// Regions of a PCI device: six BARs, ROM, configuration space, VGA.
pub const REGION_COUNT: u32 = vfio::VFIO_PCI_NUM_REGIONS;
/// Kinds of interrupt of a PCI device: `INTx`, MSI, MSI-X, error, request.
pub const IRQ_COUNT: u32 = vfio::VFIO_PCI_NUM_IRQS;

/// What a message asks for, or what a reply answers. Commands a client sends and this crate serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Command {
    /// Agree on version and capabilities; the first message.
    Version = 1,
    /// Make memory reachable for the device.
    DmaMap = 2,
    /// Take memory away from the device.
    DmaUnmap = 3,
    /// Ask for [`DeviceInfo`].
    DeviceGetInfo = 4,
    /// Ask for [`RegionInfo`].
    DeviceGetRegionInfo = 5,
    /// Ask for [`IrqInfo`].
    DeviceGetIrqInfo = 7,
    /// Set eventfds of interrupts, or fire interrupts.
    DeviceSetIrqs = 8,
    /// Read from a region.
    RegionRead = 9,
    /// Write to a region.
    RegionWrite = 10,
    /// Reset the device.
    DeviceReset = 13,
}

impl Command {
    const ALL: [Self; 10] = [
        Self::Version,
        Self::DmaMap,
        Self::DmaUnmap,
        Self::DeviceGetInfo,
        Self::DeviceGetRegionInfo,
        Self::DeviceGetIrqInfo,
        Self::DeviceSetIrqs,
        Self::RegionRead,
        Self::RegionWrite,
        Self::DeviceReset,
    ];

    /// The command with this number, if it is served here.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|command| command.number() == number)
    }

    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u16 {
        self as u16
    }
}

/// Why bytes are not a vfio-user message, or not one of the kind they claim to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// The size field cannot be true, or is more than anyone needs.
    #[error("vfio-user message of {got} bytes: want {HEADER_SIZE} to {MESSAGE_SIZE_MAX}")]
    Size {
        /// Bytes announced, header included.
        got: u32,
    },
    /// Neither a command nor a reply.
    #[error("vfio-user message of type {got}: want 0 (command) or 1 (reply)")]
    Type {
        /// Type there.
        got: u32,
    },
    /// The payload is shorter than its structure, or than the data it announces.
    #[error("vfio-user payload of {got} bytes: want at least {want}")]
    PayloadSize {
        /// Bytes there.
        got: usize,
        /// Bytes of the structure and its data.
        want: usize,
    },
    /// Version data that is not a JSON object ended by a zero byte.
    #[error("vfio-user version data is no JSON object ended by a zero byte")]
    VersionData,
}

/// Defines a structure of little-endian fields, in wire order.
macro_rules! wire_struct {
    ($(#[$doc:meta])* $name:ident, $size:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl $name {
            /// Bytes on the wire.
            pub const SIZE: usize = $size;

            /// Reads the structure at the start of `bytes`; what follows it comes back too.
            ///
            /// # Errors
            /// [`MessageError::PayloadSize`].
            pub fn parse(bytes: &[u8]) -> Result<(Self, &[u8]), MessageError> {
                let short = || MessageError::PayloadSize { got: bytes.len(), want: Self::SIZE };
                let rest = bytes;
                $(
                    let (field, rest) = rest.split_first_chunk().ok_or_else(short)?;
                    let $field = <$type>::from_le_bytes(*field);
                )*
                Ok((Self { $($field,)* }, rest))
            }

            /// The wire form.
            #[must_use]
            pub fn to_bytes(&self) -> [u8; Self::SIZE] {
                let mut bytes = [0; Self::SIZE];
                let fields = [$(self.$field.to_le_bytes().as_slice(),)*].concat();
                bytes.copy_from_slice(&fields);
                bytes
            }
        }
    };
}

pub use payloads::*;
pub mod socket;

mod payloads;

wire_struct! {
    /// Header of every message.
    Header, 16 {
        /// Chosen by the sender of the command, repeated in the reply.
        id: u16,
        /// A [`Command`], perhaps one not served here.
        command: u16,
        /// Bytes of the message, this header included.
        size: u32,
        /// Type in bits 3:0, bit 4: wants no reply, bit 5: error.
        flags: u32,
        /// The errno value of a reply with the error flag.
        error: u32,
    }
}

impl Header {
    const TYPE_MASK: u32 = 0xf;
    const REPLY: u32 = 1;
    const NO_REPLY: u32 = 1 << 4;
    const ERROR: u32 = 1 << 5;

    /// The header of a command with `payload` bytes of payload.
    #[must_use]
    pub fn command(id: u16, command: Command, payload: usize) -> Self {
        Self { id, command: command.number(), size: message_size(payload), flags: 0, error: 0 }
    }

    /// The header of the reply to this command with `payload` bytes of payload.
    #[must_use]
    pub fn reply(&self, payload: usize) -> Self {
        Self { size: message_size(payload), flags: Self::REPLY, error: 0, ..*self }
    }

    /// The header, and all there is, of a reply that refuses this command with an errno value.
    #[must_use]
    pub fn error_reply(&self, errno: u32) -> Self {
        Self { size: message_size(0), flags: Self::REPLY | Self::ERROR, error: errno, ..*self }
    }

    /// Checks type and size.
    ///
    /// # Errors
    /// [`MessageError::Size`], [`MessageError::Type`].
    pub fn check(&self) -> Result<(), MessageError> {
        let size = usize::try_from(self.size).unwrap_or(usize::MAX);
        if !(HEADER_SIZE..=MESSAGE_SIZE_MAX).contains(&size) {
            return Err(MessageError::Size { got: self.size });
        }
        match self.flags & Self::TYPE_MASK {
            0 | Self::REPLY => Ok(()),
            got => Err(MessageError::Type { got }),
        }
    }

    /// Bytes that follow the header.
    #[must_use]
    pub fn payload_size(&self) -> usize {
        usize::try_from(self.size).unwrap_or(usize::MAX).saturating_sub(HEADER_SIZE)
    }

    /// Whether this is a reply.
    #[must_use]
    pub fn is_reply(&self) -> bool {
        self.flags & Self::TYPE_MASK == Self::REPLY
    }

    /// Whether the sender of this command waits for a reply.
    #[must_use]
    pub fn wants_reply(&self) -> bool {
        self.flags & Self::NO_REPLY == 0
    }

    /// The errno value of a reply that refuses.
    #[must_use]
    pub fn refusal(&self) -> Option<u32> {
        (self.flags & Self::ERROR != 0).then_some(self.error)
    }
}

fn message_size(payload: usize) -> u32 {
    u32::try_from(HEADER_SIZE + payload).unwrap_or(u32::MAX)
}

wire_struct! {
    /// Start of [`Command::Version`] and its reply; [`Capabilities`] follow.
    Version, 4 {
        /// Equal on both sides.
        major: u16,
        /// At most the client's.
        minor: u16,
    }
}

/// What a side can receive. Absent values have the defaults of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// File descriptors in one message.
    pub max_msg_fds: usize,
    /// Bytes of data in one region access.
    pub max_data_xfer_size: usize,
}

impl Capabilities {
    /// What this crate can receive.
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

/// The region at an index of the PCI layout; the ROM and VGA regions are never there.
#[must_use]
pub fn region_at(index: u32) -> Option<Region> {
    match index {
        vfio::VFIO_PCI_CONFIG_REGION_INDEX => Some(Region::Config),
        0..=vfio::VFIO_PCI_BAR5_REGION_INDEX => u8::try_from(index).ok().map(Region::Bar),
        _ => None,
    }
}

/// The index of a region in the PCI layout.
#[must_use]
pub fn region_index(region: Region) -> u32 {
    match region {
        Region::Bar(bar) => bar.into(),
        Region::Config => vfio::VFIO_PCI_CONFIG_REGION_INDEX,
    }
}

#[cfg(test)]
mod tests;
