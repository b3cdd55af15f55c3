//! One file for each subcommand.

pub(crate) mod bind;
pub(crate) mod device;
pub(crate) mod inspect;
#[cfg(feature = "manual")]
pub(crate) mod manual;
pub(crate) mod names;
pub(crate) mod proxy;
pub(crate) mod supervise;
pub(crate) mod trace;
