//! Addresses and indices. Each address space has a type of its own, so that the compiler keeps them
//! apart.

use std::fmt;
use std::str::FromStr;

/// Defines a transparent newtype over an unsigned integer with hexadecimal display.
macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// I/O virtual address: the vvu device reaches memory of the device VM by these, through the vIOMMU.
    Iova
}
address! {
    /// Guest physical address in the sibling VM; descriptors in the sibling's rings hold these.
    SiblingGpa
}
address! {
    /// Virtual address in the sibling's VMM; `SET_VRING_ADDR` and memory tables hold these.
    SiblingVa
}
address! {
    /// Offset in bytes from the start of the shared memory BAR, which is also the offset in the
    /// sibling memory file.
    BarOffset
}

/// Index of a vhost queue, counted from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueIndex(pub u16);

impl fmt::Display for QueueIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// PCI address `domain:bus:device.function`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    /// PCI segment, 16 bits.
    pub domain: u16,
    /// Bus, 8 bits.
    pub bus: u8,
    /// Device, 5 bits.
    pub device: u8,
    /// Function, 3 bits.
    pub function: u8,
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

/// The error for a text that is not a PCI address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{got:?} is not a PCI address: want [DOMAIN:]BUS:DEVICE.FUNCTION in hexadecimal, for example 0000:00:10.0"
)]
pub struct BdfError {
    got: String,
}

impl FromStr for Bdf {
    type Err = BdfError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (bus_device, function) = text.split_once('.')?;
            let mut parts = bus_device.rsplit(':');
            let device = hex(parts.next()?, 2)?;
            let bus = hex(parts.next()?, 2)?;
            let domain = parts.next().map_or(Some(0), |domain| hex(domain, 4))?;
            let function = hex(function, 1)?;
            let complete = parts.next().is_none() && device < 32 && function < 8;
            complete.then_some(Bdf {
                domain,
                bus: u8::try_from(bus).ok()?,
                device: u8::try_from(device).ok()?,
                function: u8::try_from(function).ok()?,
            })
        };
        parse().ok_or_else(|| BdfError { got: text.to_owned() })
    }
}

/// Parses one to `width` hexadecimal digits without a sign.
fn hex(text: &str, width: usize) -> Option<u16> {
    let well_formed = (1..=width).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    well_formed.then(|| u16::from_str_radix(text, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bdf_reads_both_forms_and_prints_the_long_one() {
        let bdf: Bdf = "00:10.0".parse().expect("short form");
        assert_eq!(bdf.to_string(), "0000:00:10.0");
        assert_eq!("0000:00:10.0".parse(), Ok(bdf));
        assert_eq!("abcd:ff:1f.7".parse::<Bdf>().expect("long form").to_string(), "abcd:ff:1f.7");
    }

    #[test]
    fn bdf_refuses_what_no_device_can_have() {
        for text in [
            "",
            "10.0",
            "00:20.0",
            "00:10.8",
            "00:10",
            "0:0:0:1.0",
            "00:+1.0",
            "00:10.00",
            "100:00.0",
            "x:y.z",
        ] {
            assert!(text.parse::<Bdf>().is_err(), "{text}");
        }
    }
}
