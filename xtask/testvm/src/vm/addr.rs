//! Where on its PCI bus a VM's device is.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserialize, Deserializer, Error};
use serde::ser::{Serialize, Serializer};

/// A slot of a VM's PCI root bus, `0000:00:DEVICE.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(u8);

impl Slot {
    /// The slot in the manual steps this project follows.
    pub const DEFAULT: Slot = Slot(0x10);
    /// The last one that a device can have.
    pub(crate) const LAST: Slot = Slot(*Self::FREE.end());
    /// Slots that a device can have. 0 is the host bridge, and a PC has its ISA bridge at 1f.
    const FREE: std::ops::RangeInclusive<u8> = 1..=0x1e;

    /// Slot number `device`; [`Slot::from_str`] is for outside input.
    pub const fn new(device: u8) -> Self {
        Slot(device)
    }

    /// The first slot for which `taken` says no, beginning after the emulated devices.
    pub fn first_free(taken: impl Fn(Slot) -> bool) -> Option<Self> {
        (Self::DEFAULT.0..=*Self::FREE.end())
            .chain(*Self::FREE.start()..Self::DEFAULT.0)
            .map(Slot)
            .find(|slot| !taken(*slot))
    }

    /// The last slot for which `taken` says no: for a device that nobody looks for.
    pub fn last_free(taken: impl Fn(Slot) -> bool) -> Option<Self> {
        Self::FREE.rev().map(Slot).find(|slot| !taken(*slot))
    }

    /// The device number on the bus, 1 to 30.
    #[must_use]
    pub const fn device(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0000:00:{:02x}.0", self.0)
    }
}

/// A text that is no slot.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is not a free PCI address of a VM's root bus: want [0000:]00:DEVICE.0 with DEVICE from 01 to 1e, for example 00:10.0"
)]
pub struct SlotError(String);

impl FromStr for Slot {
    type Err = SlotError;

    fn from_str(text: &str) -> Result<Self, SlotError> {
        let device = || {
            let device =
                text.strip_prefix("0000:").unwrap_or(text).strip_prefix("00:")?.strip_suffix(".0")?;
            let digits =
                (1..=2).contains(&device.len()) && device.bytes().all(|byte| byte.is_ascii_hexdigit());
            let device = digits.then(|| u8::from_str_radix(device, 16).ok())??;
            Self::FREE.contains(&device).then_some(device)
        };
        device().map(Slot).ok_or_else(|| SlotError(text.to_owned()))
    }
}

/// A slot, or `"auto"`: the first free one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addr {
    /// The first free slot.
    Auto,
    /// This one.
    Fixed(Slot),
}

impl Default for Addr {
    fn default() -> Self {
        Addr::Fixed(Slot::DEFAULT)
    }
}

impl FromStr for Addr {
    type Err = SlotError;

    fn from_str(text: &str) -> Result<Self, SlotError> {
        if text == "auto" { Ok(Addr::Auto) } else { text.parse().map(Addr::Fixed) }
    }
}

impl<'de> Deserialize<'de> for Addr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(Error::custom)
    }
}

impl Serialize for Addr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Addr::Auto => serializer.serialize_str("auto"),
            // A scenario's bus is the only one there is.
            Addr::Fixed(slot) => serializer.serialize_str(slot.to_string().trim_start_matches("0000:")),
        }
    }
}

impl JsonSchema for Addr {
    fn schema_name() -> Cow<'static, str> {
        "Addr".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A PCI address on the root bus, or `auto`: the first free one.",
            "type": "string",
            "pattern": "^(auto|(0000:)?00:(0?[1-9a-fA-F]|1[0-9a-eA-E])\\.0)$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_an_address_are_read() {
        for text in ["00:10.0", "0000:00:10.0"] {
            let slot: Slot = text.parse().expect(text);
            assert_eq!((slot.to_string().as_str(), slot.device()), ("0000:00:10.0", 0x10));
        }
        for text in
            ["", "10.0", "00:1f.0", "00:00.0", "01:10.0", "00:10.1", "00:+1.0", "00:010.0", "0001:00:10.0"]
        {
            assert!(text.parse::<Slot>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_first_free_slot_is_sought_on_the_whole_bus() {
        assert_eq!(Slot::first_free(|_| false), Some(Slot::DEFAULT));
        assert_eq!(Slot::first_free(|slot| slot.0 != 3), Some(Slot(3)));
        assert_eq!(Slot::first_free(|_| true), None);
    }
}
