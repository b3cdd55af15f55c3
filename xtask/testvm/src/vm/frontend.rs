//! The device of a sibling VM whose back-end is behind a vhost-user socket, in virtio's words.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most virtqueues that one vvu device carries.
pub const MAX_QUEUES: u16 = 64;

/// A vhost-user front-end: a virtio device of the sibling VM whose requests a back-end elsewhere carries out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Frontend {
    /// A disk (virtio 1.2, 5.2).
    Block(BlockFrontend),
    /// A file system (virtio 1.2, 5.11).
    Fs(FsFrontend),
    /// An entropy source (virtio 1.2, 5.4).
    Rng(PlainFrontend),
    /// Sockets between host and guest (virtio 1.2, 5.10). The back-end gives the guest its CID.
    Vsock(PlainFrontend),
    /// A console (virtio 1.2, 5.3) with two ports.
    Console(PlainFrontend),
    /// A network card (virtio 1.2, 5.1).
    Net(NetFrontend),
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BlockFrontend {
    /// Request queues.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    #[schemars(range(min = 1, max = 64))]
    pub queues: u16,
    /// Descriptors of each queue, a power of two; the VMM's default unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
    /// Feature bits that the VMM must offer or withhold.
    #[serde(default, skip_serializing_if = "is_default")]
    pub features: Features,
    /// Further properties of the VMM's device, passed on as they are.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub vmm_properties: BTreeMap<String, String>,
}

/// A file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FsFrontend {
    /// Name by which the guest mounts it.
    pub tag: String,
    /// Request queues; one more is for requests of high priority.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    #[schemars(range(min = 1, max = 63))]
    pub request_queues: u16,
    /// Descriptors of each queue, a power of two; the VMM's default unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
    /// Feature bits that the VMM must offer or withhold.
    #[serde(default, skip_serializing_if = "is_default")]
    pub features: Features,
    /// Further properties of the VMM's device, passed on as they are.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub vmm_properties: BTreeMap<String, String>,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetFrontend {
    /// Pairs of a receive and a transmit queue.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    #[schemars(range(min = 1, max = 32))]
    pub queue_pairs: u16,
    /// Descriptors of each queue, a power of two; the VMM's default unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
    /// Feature bits that the VMM must offer or withhold.
    #[serde(default, skip_serializing_if = "is_default")]
    pub features: Features,
    /// Further properties of the VMM's device, passed on as they are.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub vmm_properties: BTreeMap<String, String>,
}

/// A device whose queues are given by its type.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PlainFrontend {
    /// Feature bits that the VMM must offer or withhold.
    #[serde(default, skip_serializing_if = "is_default")]
    pub features: Features,
    /// Further properties of the VMM's device, passed on as they are.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub vmm_properties: BTreeMap<String, String>,
}

/// Feature bits of a device (virtio 1.2, 6): `true` offers one to the guest, if the back-end has it as well; `false`
/// withholds it; without a value the VMM decides.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Features {
    /// `VIRTIO_F_INDIRECT_DESC`: a descriptor may point at a table of descriptors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub indirect_desc: Option<bool>,
    /// `VIRTIO_F_EVENT_IDX`: each side says from which index on it wants to be notified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_idx: Option<bool>,
    /// `VIRTIO_F_ACCESS_PLATFORM`: the device reaches memory through the guest's IOMMU, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_platform: Option<bool>,
    /// `VIRTIO_F_RING_PACKED`: packed rather than split virtqueues.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ring_packed: Option<bool>,
}

impl Default for Frontend {
    fn default() -> Self {
        Frontend::Block(BlockFrontend::default())
    }
}

impl Default for BlockFrontend {
    fn default() -> Self {
        Self { queues: 1, queue_size: None, features: Features::default(), vmm_properties: BTreeMap::new() }
    }
}

impl Default for NetFrontend {
    fn default() -> Self {
        Self {
            queue_pairs: 1,
            queue_size: None,
            features: Features::default(),
            vmm_properties: BTreeMap::new(),
        }
    }
}

impl Frontend {
    /// The modules of Linux that drive it.
    pub(crate) fn kernel_modules(&self) -> &'static [&'static str] {
        match self {
            Frontend::Block(_) => &["virtio_blk"],
            Frontend::Fs(_) => &["virtiofs"],
            Frontend::Rng(_) => &["virtio-rng"],
            Frontend::Vsock(_) => &["vmw_vsock_virtio_transport"],
            Frontend::Console(_) => &["virtio_console"],
            Frontend::Net(_) => &["virtio_net"],
        }
    }

    /// The number of virtqueues, each of which the vvu device has to carry.
    #[must_use]
    pub fn virtqueues(&self) -> u16 {
        match self {
            Frontend::Block(block) => block.queues,
            // The queue for requests of high priority comes first.
            Frontend::Fs(fs) => fs.request_queues.saturating_add(1),
            Frontend::Rng(_) => 1,
            // Receive, transmit, event.
            Frontend::Vsock(_) => 3,
            // Receive and transmit of port 0, the same of the control port.
            Frontend::Console(_) => 4,
            Frontend::Net(net) => net.queue_pairs.saturating_mul(2),
        }
    }

    /// The feature bits that the scenario sets.
    #[must_use]
    pub fn features(&self) -> Features {
        match self {
            Frontend::Block(block) => block.features,
            Frontend::Fs(fs) => fs.features,
            Frontend::Rng(plain) | Frontend::Vsock(plain) | Frontend::Console(plain) => plain.features,
            Frontend::Net(net) => net.features,
        }
    }

    /// The descriptors of each queue, if the scenario sets them.
    #[must_use]
    pub fn queue_size(&self) -> Option<u16> {
        match self {
            Frontend::Block(block) => block.queue_size,
            Frontend::Fs(fs) => fs.queue_size,
            Frontend::Rng(_) | Frontend::Vsock(_) | Frontend::Console(_) => None,
            Frontend::Net(net) => net.queue_size,
        }
    }

    /// The properties that are passed to the VMM as they are.
    #[must_use]
    pub fn vmm_properties(&self) -> &BTreeMap<String, String> {
        match self {
            Frontend::Block(block) => &block.vmm_properties,
            Frontend::Fs(fs) => &fs.vmm_properties,
            Frontend::Rng(plain) | Frontend::Vsock(plain) | Frontend::Console(plain) => &plain.vmm_properties,
            Frontend::Net(net) => &net.vmm_properties,
        }
    }

    /// Checks the numbers and texts.
    ///
    /// # Errors
    ///
    /// Names the value that no VMM takes, and what it may be.
    pub fn check(&self) -> Result<()> {
        let queues = self.virtqueues();
        ensure!(
            (1..=MAX_QUEUES).contains(&queues),
            "{queues} virtqueues: want 1 to {MAX_QUEUES}, the most that a vvu device carries"
        );
        if let Some(size) = self.queue_size() {
            ensure!(
                (2..=32768).contains(&size) && size.is_power_of_two(),
                "queue_size: {size}: want a power of two from 2 to 32768"
            );
        }
        if let Frontend::Fs(fs) = self {
            ensure!(
                plain(&fs.tag) && fs.tag.len() <= 36,
                "tag: {:?}: want 1 to 36 bytes without commas",
                fs.tag
            );
        }
        for text in self.vmm_properties().iter().flat_map(|(name, value)| [name, value]) {
            ensure!(
                plain(text),
                "vmm_properties: {text:?}: want a name or value of the VMM's device, without commas"
            );
        }
        Ok(())
    }
}

/// Returns true if `text` can be a name or a value in a list of the form `name=value,...`.
fn plain(text: &str) -> bool {
    !text.is_empty() && !text.contains([',', '=', '\n', '\0'])
}

fn one() -> u16 {
    1
}

fn is_one(number: &u16) -> bool {
    *number == 1
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frontend(text: &str) -> Frontend {
        serde_json::from_str(text).expect("a front-end")
    }

    fn refused(text: &str, want: &str) {
        let error = frontend(text).check().expect_err(text).to_string();
        assert!(error.contains(want), "{text}: {error}");
    }

    #[test]
    fn a_vvu_device_carries_every_queue_of_its_front_end() {
        for (text, queues) in [
            (r#"{"block": {}}"#, 1),
            (r#"{"block": {"queues": 8}}"#, 8),
            (r#"{"fs": {"tag": "t", "request_queues": 2}}"#, 3),
            (r#"{"rng": {}}"#, 1),
            (r#"{"vsock": {}}"#, 3),
            (r#"{"console": {}}"#, 4),
            (r#"{"net": {"queue_pairs": 2}}"#, 4),
        ] {
            let frontend = frontend(text);
            frontend.check().expect(text);
            assert_eq!(frontend.virtqueues(), queues, "{text}");
            assert_eq!(
                serde_json::to_string(&frontend).expect("JSON").replace([' ', '\n'], ""),
                text.replace(' ', "")
            );
        }
    }

    #[test]
    fn what_no_vmm_takes_is_refused() {
        refused(r#"{"block": {"queues": 0}}"#, "0 virtqueues");
        refused(r#"{"net": {"queue_pairs": 33}}"#, "66 virtqueues");
        refused(r#"{"block": {"queue_size": 100}}"#, "queue_size: 100");
        refused(r#"{"fs": {"tag": "a,b"}}"#, "tag: \"a,b\"");
        refused(r#"{"rng": {"vmm_properties": {"a": "b,c"}}}"#, "vmm_properties: \"b,c\"");
    }
}
