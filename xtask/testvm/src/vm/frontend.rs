//! The device of a sibling VM whose back-end is behind vhost-user.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::Deserialize;

/// A front-end of the sibling VM's QEMU.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Frontend {
    /// What it is.
    #[serde(default)]
    pub kind: FrontendKind,
    /// Properties of QEMU's device, such as `tag`, `guest-cid` or `packed`.
    #[serde(default)]
    pub properties: BTreeMap<String, String>,
}

/// The devices that QEMU has a vhost-user front-end for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrontendKind {
    /// A disk.
    #[default]
    Blk,
    /// A file system.
    Fs,
    /// An entropy source.
    Rng,
    /// Sockets between host and guest.
    Vsock,
    /// A console.
    Console,
    /// A network card.
    Net,
}

impl FrontendKind {
    /// QEMU's name for the PCI device.
    pub fn device(self) -> &'static str {
        match self {
            FrontendKind::Blk => "vhost-user-blk-pci",
            FrontendKind::Fs => "vhost-user-fs-pci",
            FrontendKind::Rng => "vhost-user-rng-pci",
            FrontendKind::Vsock => "vhost-user-vsock-pci",
            // QEMU has no front-end for consoles, but one that is told what it is.
            FrontendKind::Console => "vhost-user-test-device-pci",
            FrontendKind::Net => "virtio-net-pci",
        }
    }
}

impl Frontend {
    /// vhost queues that a proxy has to carry when the device has `queues`.
    pub fn vhost_queues(&self, queues: u32) -> u32 {
        match self.kind {
            FrontendKind::Blk => queues,
            // One for requests of high priority.
            FrontendKind::Fs => queues + 1,
            FrontendKind::Rng => 1,
            // Receive, transmit, events.
            FrontendKind::Vsock => 3,
            // Two for each port, one of them for control.
            FrontendKind::Console => 4,
            FrontendKind::Net => 2 * queues,
        }
    }

    /// QEMU's words for the device: `number` tells the back-ends of a VM apart, `addr` is the slot.
    pub fn arguments(&self, number: usize, addr: &str, queues: u32) -> Vec<String> {
        let mut words = Vec::new();
        let mut device = format!("{},chardev=vhost{number},addr={addr}", self.kind.device());
        match self.kind {
            FrontendKind::Blk => device.push_str(&format!(",num-queues={queues}")),
            FrontendKind::Fs => device.push_str(&format!(",num-request-queues={queues}")),
            FrontendKind::Net => {
                let netdev = format!("vhost-user,id=net{number},chardev=vhost{number},queues={queues}");
                words.extend(["-netdev".to_owned(), netdev]);
                let multiqueue = if queues > 1 { ",mq=on" } else { "" };
                device =
                    format!("{},netdev=net{number},addr={addr},romfile={multiqueue}", self.kind.device());
            }
            // virtio 1.2, 5.3: device 3, two queues for each of two ports, 12 bytes of configuration.
            FrontendKind::Console => device.push_str(",virtio-id=3,num_vqs=4,config_size=12"),
            FrontendKind::Rng | FrontendKind::Vsock => {}
        }
        for (name, value) in &self.properties {
            device.push_str(&format!(",{name}={value}"));
        }
        words.extend(["-device".to_owned(), device]);
        words
    }

    /// Checks that the properties are plain words.
    ///
    /// # Errors
    ///
    /// Names the one that is not.
    pub fn check(&self) -> Result<()> {
        for text in self.properties.iter().flat_map(|(name, value)| [name, value]) {
            let plain = !text.is_empty() && !text.contains([',', '=', '\n', '\0']);
            ensure!(plain, "properties: {text:?}: want a name or value of QEMU's device, without commas");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str, queues: u32) -> String {
        let frontend: Frontend = serde_json::from_str(text).expect("valid");
        frontend.check().expect("plain");
        frontend.arguments(1, "11.0", queues).join(" ")
    }

    #[test]
    fn each_kind_becomes_a_device_of_qemu() {
        let fs = words(r#"{"kind": "fs", "properties": {"tag": "t", "queue-size": "64"}}"#, 2);
        assert_eq!(
            fs,
            "-device vhost-user-fs-pci,chardev=vhost1,addr=11.0,num-request-queues=2,queue-size=64,tag=t"
        );
        assert_eq!(words(r#"{"kind": "rng"}"#, 1), "-device vhost-user-rng-pci,chardev=vhost1,addr=11.0");
        assert_eq!(
            words(r#"{"kind": "net"}"#, 2),
            "-netdev vhost-user,id=net1,chardev=vhost1,queues=2 -device virtio-net-pci,netdev=net1,addr=11.0,romfile=,mq=on"
        );
    }
}
