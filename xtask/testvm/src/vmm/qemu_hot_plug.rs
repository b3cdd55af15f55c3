//! QEMU: ports for devices that come later, and the exchanges that attach and detach these.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::qemu::{Place, address, device};
use super::words::Words;
use crate::qmp::Exchange;
use crate::vm::config::{Config, Device};
use crate::vm::frontend::Frontend;

/// Adds a PCI Express port for each device that can be attached. The root bus itself takes none at run time.
pub(super) fn ports(words: &mut Words, config: &Config) {
    for (index, device) in config.attachable.iter().enumerate() {
        let addr = address(device.slot());
        let number = index + 1;
        words.pair(
            "-device",
            format!("pcie-root-port,id=port{index},chassis={number},slot={number},addr={addr}"),
        );
    }
}

/// The exchanges that attach `config.attachable[index]`: the words of the command line, one command for each option.
pub(super) fn attach(config: &Config, index: usize) -> Result<Vec<Exchange>> {
    let (number, attached) = attachable(config, index)?;
    let mut words = Words::default();
    device(&mut words, number, Place::Port(index), attached);
    let words = words.done();
    words.chunks_exact(2).map(|pair| exchange(&pair[0], &pair[1])).collect()
}

/// The exchanges that detach it: the guest gives the device back, and then what it was made of is removed.
pub(super) fn detach(config: &Config, index: usize) -> Result<Vec<Exchange>> {
    let (number, attached) = attachable(config, index)?;
    let id = Place::id(index);
    let mut exchanges = vec![
        Exchange::Command { execute: "device_del", arguments: json!({ "id": id }) },
        Exchange::Event { name: "DEVICE_DELETED", data: json!({ "device": id }) },
    ];
    let mut remove = |execute, key: &str, name: String| {
        exchanges.push(Exchange::Command { execute, arguments: json!({ key: name }) });
    };
    match attached {
        Device::VhostUser { frontend, .. } => {
            if matches!(frontend, Frontend::Net(_)) {
                remove("netdev_del", "id", format!("net{number}"));
            }
            remove("chardev-remove", "id", format!("vhost{number}"));
        }
        _ => remove("blockdev-del", "node-name", format!("disk{number}")),
    }
    Ok(exchanges)
}

/// The device and its number among all of the VM.
fn attachable(config: &Config, index: usize) -> Result<(usize, &Device)> {
    let vm = &config.name;
    let device = config.attachable.get(index).with_context(|| format!("{vm} has no port {index}"))?;
    let attachable = matches!(device, Device::VhostUser { .. } | Device::VirtioBlk { .. });
    ensure!(
        attachable,
        "{vm}: a vvu device cannot be attached while the VM runs: it must be there at launch"
    );
    Ok((config.devices.len() + index, device))
}

/// The exchange that does what an option of the command line does.
fn exchange(option: &str, value: &str) -> Result<Exchange> {
    let command = match option {
        "-chardev" => "chardev-add",
        "-netdev" => "netdev_add",
        "-device" => "device_add",
        "-blockdev" => {
            let arguments: Value = serde_json::from_str(value).context("no description of a disk")?;
            return Ok(Exchange::Command { execute: "blockdev-add", arguments });
        }
        other => bail!("{other} has no counterpart for a VM that runs"),
    };
    let quoted = value.replace('\\', r"\\").replace('"', "\\\"");
    Ok(Exchange::Words(format!("{command} \"{quoted}\"")))
}
