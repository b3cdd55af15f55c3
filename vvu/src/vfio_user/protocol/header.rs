//! The header of every message, and the commands it names.

use super::wire::{HEADER_SIZE, MESSAGE_SIZE_MAX, MessageError, wire_struct};

/// Command of a message or of a reply: those that a client sends and this crate serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Command {
    /// Agree on version and capabilities; the first message.
    Version = 1,
    /// Make memory reachable for the device.
    DmaMap = 2,
    /// Unmap memory from the device.
    DmaUnmap = 3,
    /// Ask for [`DeviceInfo`](super::DeviceInfo).
    DeviceGetInfo = 4,
    /// Ask for [`RegionInfo`](super::RegionInfo).
    DeviceGetRegionInfo = 5,
    /// Ask for [`IrqInfo`](super::IrqInfo).
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
    pub(super) const ALL: [Self; 10] = [
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

    /// Returns the command with this number, if this crate serves it.
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

    /// The header of a reply that refuses this command with an errno value. The reply has no payload.
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

    /// Returns whether the message is a reply.
    #[must_use]
    pub fn is_reply(&self) -> bool {
        self.flags & Self::TYPE_MASK == Self::REPLY
    }

    /// Returns whether the sender of this command waits for a reply.
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
