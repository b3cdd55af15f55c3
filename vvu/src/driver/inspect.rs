//! What a vvu device says about itself, in words.

use uuid::Uuid;

use super::layout::{self, Capability, Layout, LayoutError, MsixCap, VirtioCap, get16, get32};
use super::pci_device::{DeviceError, PciDevice, Regions};
use super::registers::Registers;
use crate::spec::pci::{CONFIG_SPACE_SIZE, cap_id, cfg_type, config, msix, virtio_cap};
use crate::spec::virtio::{DEVICE_ID, QUEUE_COUNT, common, device_config, feature, status};

/// Tells what is in the configuration space of a vvu device, a line for each fact.
///
/// # Errors
/// [`LayoutError`]: another device, or capabilities that are broken.
pub fn config_space(space: &[u8; CONFIG_SPACE_SIZE]) -> Result<String, LayoutError> {
    layout::check_identity(space)?;
    let (vendor, id) = (get16(space, config::VENDOR_ID), get16(space, config::DEVICE_ID));
    let command = get16(space, config::COMMAND);
    let on = |bit| if command & bit == 0 { "off" } else { "on" };
    let mut text = format!(
        "identity: {vendor:04x}:{id:04x} revision {:02x}, virtio device {DEVICE_ID}, virtio-vhost-user\n\
         memory access: {}\nbus master: {}\n",
        space[config::REVISION],
        on(config::COMMAND_MEMORY),
        on(config::COMMAND_BUS_MASTER),
    );
    for capability in layout::capabilities(space)? {
        let line = match capability {
            Capability::Virtio(cap, bytes) => structure(&cap, bytes),
            Capability::Msix(cap) => interrupts(cap),
            Capability::Other(cap_id::AF) => "advanced features: function level reset".to_owned(),
            Capability::Other(id) => format!("capability {id:#04x}"),
        };
        text += &line;
        text.push('\n');
    }
    Ok(text)
}

fn interrupts(cap: MsixCap) -> String {
    let state = match cap.control {
        control if control & msix::CONTROL_ENABLE == 0 => "off",
        control if control & msix::CONTROL_MASK_ALL != 0 => "on, all masked",
        _ => "on",
    };
    format!("MSI-X: {} vectors, {state}", cap.vectors())
}

fn structure(cap: &VirtioCap, bytes: &[u8]) -> String {
    let VirtioCap { cfg_type, bar, offset, length, extension } = *cap;
    let at = |offset: u64, length: u64| format!("BAR {bar} at {offset:#x}, {length:#x} bytes");
    let plain = at(offset, length);
    match cfg_type {
        cfg_type::COMMON => format!("common configuration: {plain}"),
        cfg_type::NOTIFY => format!("notifications: {plain}, one each {extension} bytes"),
        cfg_type::ISR => format!("interrupt status: {plain}"),
        cfg_type::DEVICE => format!("device configuration: {plain}"),
        cfg_type::PCI => "access to BARs through the configuration space".to_owned(),
        cfg_type::DOORBELL => format!("doorbells: {plain}, one each {extension} bytes"),
        cfg_type::VECTOR_SELECT => format!("vector select: {plain}"),
        cfg_type::SHARED_MEMORY => {
            let high = |field: usize| {
                let end = field + 4;
                let there = usize::from(bytes[virtio_cap::LENGTH]) >= end && bytes.len() >= end;
                if there { u64::from(get32(bytes, field)) << 32 } else { 0 }
            };
            let offset = offset | high(virtio_cap::OFFSET_HI);
            format!("shared memory: {}", at(offset, length | high(virtio_cap::STRUCTURE_LENGTH_HI)))
        }
        other => format!("virtio structure of type {other}: {plain}"),
    }
}

/// Why the registers of a device cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// Its capabilities do not lead to them.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// They cannot be read.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Tells what is in the registers of a vvu device, a line for each fact. Selects features and queues on the way,
/// so nobody else may drive the device meanwhile.
///
/// # Errors
/// [`InspectError`].
pub fn registers<D: PciDevice>(device: &D) -> Result<String, InspectError> {
    let layout = Layout::probe(device)?;
    let common = Registers { device, at: layout.common };
    let status = common.read8(common::DEVICE_STATUS)?;
    let mut text = format!("device status: {}\n", device_status(status));
    common.write32(common::DEVICE_FEATURE_SELECT, 0)?;
    let low = common.read32(common::DEVICE_FEATURE)?;
    common.write32(common::DEVICE_FEATURE_SELECT, 1)?;
    let high = common.read32(common::DEVICE_FEATURE)?;
    text += &format!("features offered: {}\n", features(u64::from(high) << 32 | u64::from(low)));
    for queue in 0..QUEUE_COUNT {
        common.write16(common::QUEUE_SELECT, queue)?;
        let enabled = if common.read16(common::QUEUE_ENABLE)? == 0 { "off" } else { "on" };
        let size = common.read16(common::QUEUE_SIZE)?;
        text += &format!("virtqueue {queue}: {size} descriptors, {enabled}\n");
    }
    Ok(text + &configuration(device, &layout)?)
}

/// Tells as much of the registers as can be read without writing any and without a read that changes one, so that
/// somebody else may drive the device meanwhile.
///
/// # Errors
/// [`InspectError`].
pub fn registers_in_use<D: Regions>(device: &D) -> Result<String, InspectError> {
    let layout = Layout::probe(device)?;
    let common = Registers { device, at: layout.common };
    let status = device_status(common.read8(common::DEVICE_STATUS)?);
    let generation = common.read8(common::CONFIG_GENERATION)?;
    let queues = common.read16(common::NUM_QUEUES)?;
    let text = format!(
        "device status: {status}\n\
         configuration generation: {generation}\n\
         virtqueues: {queues}\n\
         features, state of each virtqueue: not told, they show after a write to a register that the driver uses\n\
         interrupt status: not told, reading it would take an interrupt away\n"
    );
    Ok(text + &configuration(device, &layout)?)
}

/// Tells what is in the device configuration, and the size of the shared memory.
fn configuration<D: Regions>(device: &D, layout: &Layout) -> Result<String, InspectError> {
    let config = Registers { device, at: layout.device };
    let link = link(config.read32(device_config::STATUS)?);
    let queues = config.read32(device_config::MAX_VHOST_QUEUES)?;
    let mut uuid = [0; 16];
    for (at, word) in (device_config::UUID..).step_by(4).zip(uuid.chunks_exact_mut(4)) {
        word.copy_from_slice(&config.read32(at)?.to_le_bytes());
    }
    Ok(format!(
        "link: {link}\n\
         vhost queues: at most {queues}\n\
         uuid: {}\n\
         shared memory BAR: {:#x} bytes\n",
        Uuid::from_bytes(uuid),
        layout.shared_memory
    ))
}

fn device_status(bits: u8) -> String {
    let names = [
        (status::ACKNOWLEDGE, "acknowledged"),
        (status::DRIVER, "driver"),
        (status::FEATURES_OK, "features agreed"),
        (status::DRIVER_OK, "driver ready"),
        (status::NEEDS_RESET, "needs reset"),
        (status::FAILED, "failed"),
    ];
    let words = names.into_iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| name);
    format!("{bits:#04x}, {}", words_or(words, "reset"))
}

fn features(bits: u64) -> String {
    let names = [
        (feature::EVENT_IDX, "event index"),
        (feature::VERSION_1, "version 1"),
        (feature::ACCESS_PLATFORM, "access through the IOMMU"),
    ];
    let words = names.into_iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| name);
    format!("{bits:#x}, {}", words_or(words, "none known"))
}

fn link(bits: u32) -> String {
    let backend = if bits & device_config::BACKEND_UP == 0 { "no back-end" } else { "back-end up" };
    let frontend =
        if bits & device_config::FRONTEND_UP == 0 { "no front-end" } else { "front-end connected" };
    format!("{bits:#x}, {backend}, {frontend}")
}

fn words_or(words: impl Iterator<Item = &'static str>, none: &str) -> String {
    let words: Vec<_> = words.collect();
    if words.is_empty() { none.to_owned() } else { words.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::fake::FakeDevice;
    use crate::spec::pci::ConfigSpace;

    #[test]
    fn the_golden_configuration_space_is_told() {
        let space = ConfigSpace::new(19, 0x1_4000_0000).bytes;
        let want = "\
identity: 1af4:107d revision 01, virtio device 61, virtio-vhost-user
memory access: off
bus master: off
MSI-X: 19 vectors, off
advanced features: function level reset
common configuration: BAR 0 at 0x0, 0x38 bytes
interrupt status: BAR 0 at 0x1000, 0x1 bytes
device configuration: BAR 0 at 0x2000, 0x1000 bytes
notifications: BAR 0 at 0x3000, 0x1000 bytes, one each 4 bytes
access to BARs through the configuration space
doorbells: BAR 2 at 0x0, 0x2000 bytes, one each 4 bytes
vector select: BAR 2 at 0x2000, 0x1000 bytes
shared memory: BAR 4 at 0x0, 0x140000000 bytes
";
        assert_eq!(config_space(&space).expect("decoded"), want);
    }

    #[test]
    fn another_device_and_broken_capabilities_are_refused() {
        let mut space = ConfigSpace::new(19, 1 << 20).bytes;
        space[config::HEADER_END + 1] = 0x40;
        assert!(matches!(config_space(&space), Err(LayoutError::Chain { .. })));
        space[config::DEVICE_ID] = 0x41;
        assert!(matches!(config_space(&space), Err(LayoutError::Identity { .. })));
    }

    #[test]
    fn registers_are_told() {
        let fake = FakeDevice::new(16);
        fake.state().status = 0x0f;
        fake.state().link = 3;
        let told = registers(&fake).expect("told");
        for want in [
            "device status: 0x0f, acknowledged, driver, features agreed, driver ready\n",
            "features offered: 0x320000000, event index, version 1, access through the IOMMU\n",
            "virtqueue 1: 256 descriptors, off\n",
            "link: 0x3, back-end up, front-end connected\n",
            "vhost queues: at most 16\n",
            "shared memory BAR: 0x100000 bytes\n",
        ] {
            assert!(told.contains(want), "{told}");
        }
        fake.state().status = 0;
        assert!(registers(&fake).expect("told").contains("device status: 0x00, reset\n"));
    }
}
