//! Describes a vvu device in words.

use std::fmt::Write;

use uuid::Uuid;

use super::bar_view::BarView;
use super::layout::{self, Capability, Layout, LayoutError, MsixCap, VirtioCap, get16, get32};
use super::registers::{self, Registers};
use crate::pci::{DeviceError, PciDevice};
use crate::spec::pci::{CONFIG_SPACE_SIZE, cap_id, cfg_type, config, msix, virtio_cap};
use crate::spec::virtio::{DEVICE_ID, QUEUE_COUNT, common, device_config, feature, status};

/// Describes the configuration space of a vvu device, one fact a line.
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

/// The registers of a device cannot be described.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The capabilities of the device do not lead to the registers.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The registers cannot be read.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Describes the registers of a vvu device, one fact a line. Selects features and queues to read them, so nothing else
/// may drive the device meanwhile.
///
/// # Errors
/// [`InspectError`].
pub fn registers<D: PciDevice>(device: &D) -> Result<String, InspectError> {
    let layout = Layout::probe(device)?;
    let common = Registers { device, at: layout.common };
    let config = Registers { device, at: layout.device };
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name}: {value}");
    };

    line("device status", &device_status(common.read8(common::DEVICE_STATUS)?));
    common.write32(common::DEVICE_FEATURE_SELECT, 0)?;
    let low = common.read32(common::DEVICE_FEATURE)?;
    common.write32(common::DEVICE_FEATURE_SELECT, 1)?;
    let high = common.read32(common::DEVICE_FEATURE)?;
    line("features offered", &features(u64::from(high) << 32 | u64::from(low)));
    for queue in 0..QUEUE_COUNT {
        common.write16(common::QUEUE_SELECT, queue)?;
        let enabled = if common.read16(common::QUEUE_ENABLE)? == 0 { "off" } else { "on" };
        let size = common.read16(common::QUEUE_SIZE)?;
        line(&format!("virtqueue {queue}"), &format!("{size} descriptors, {enabled}"));
    }
    text += &device_configuration(|offset| config.read32(offset))?;
    text += &format!("shared memory BAR: {:#x} bytes\n", layout.shared_memory);
    Ok(text)
}

/// Describes the registers of a vvu device in use, one fact a line: only the registers that can be read without writing
/// to another one and without an effect. `space` is the configuration space, `registers` the BAR of the registers.
///
/// # Errors
/// [`InspectError`].
pub fn registers_in_use(
    space: &[u8; CONFIG_SPACE_SIZE],
    registers: &BarView,
) -> Result<String, InspectError> {
    layout::check_identity(space)?;
    if get16(space, config::COMMAND) & config::COMMAND_MEMORY == 0 {
        return Ok("memory access is off, so no register answers\n".to_owned());
    }
    let (common, config) = layout::configuration(space, |bar| registers.size(bar))?;
    let status = device_status(registers.read::<u8>(common, common::DEVICE_STATUS)?);
    let read = |offset| registers.read::<u32>(config, offset).map(u32::from_le);
    Ok(format!("device status: {status}\n{}", device_configuration(read)?))
}

/// Reads the UUID of a vvu device.
///
/// # Errors
/// [`InspectError`].
pub fn uuid<D: PciDevice>(device: &D) -> Result<[u8; 16], InspectError> {
    let layout = Layout::probe(device)?;
    let config = Registers { device, at: layout.device };
    Ok(registers::uuid(|at| config.read32(at))?)
}

/// Describes the device configuration; `read` returns the le32 at an offset.
fn device_configuration(read: impl Fn(u64) -> Result<u32, DeviceError>) -> Result<String, DeviceError> {
    let uuid = registers::uuid(&read)?;
    Ok(format!(
        "link: {}\nvhost queues: at most {}\nuuid: {}\n",
        link(read(device_config::STATUS)?),
        read(device_config::MAX_VHOST_QUEUES)?,
        Uuid::from_bytes(uuid)
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
    let words = named_bits(bits.into(), names.map(|(bit, name)| (bit.into(), name)), "reset");
    format!("{bits:#04x}, {words}")
}

fn features(bits: u64) -> String {
    let names = [
        (feature::EVENT_IDX, "event index"),
        (feature::VERSION_1, "version 1"),
        (feature::ACCESS_PLATFORM, "access through the IOMMU"),
    ];
    format!("{bits:#x}, {}", named_bits(bits, names, "none known"))
}

/// Lists the names of the bits that are set, or returns `none`.
fn named_bits<const N: usize>(bits: u64, names: [(u64, &'static str); N], none: &str) -> String {
    let words: Vec<_> = names.into_iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| name).collect();
    if words.is_empty() { none.to_owned() } else { words.join(", ") }
}

fn link(bits: u32) -> String {
    let backend = if bits & device_config::BACKEND_UP == 0 { "no back-end" } else { "back-end up" };
    let frontend =
        if bits & device_config::FRONTEND_UP == 0 { "no front-end" } else { "front-end connected" };
    format!("{bits:#x}, {backend}, {frontend}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rig::LocalDevice;
    use crate::spec::pci::{self, ConfigSpace, Structure};

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

    /// A BAR with these registers, as sysfs shows it.
    fn view(status: u8, link: u32) -> (tempfile::NamedTempFile, BarView) {
        let mut bar = vec![0; usize::try_from(pci::REGISTER_BAR_SIZE).expect("small")];
        let at = |place: Structure, offset: u64| usize::try_from(place.offset + offset).expect("small");
        bar[at(pci::COMMON_CFG, common::DEVICE_STATUS)] = status;
        let config = at(pci::DEVICE_CFG, 0);
        bar[config..][..4].copy_from_slice(&link.to_le_bytes());
        bar[config + 4] = 16;
        bar[config + 8..][..16].fill(7);
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), &bar).expect("written");
        let view = BarView::open(file.path(), pci::REGISTER_BAR).expect("mapped");
        (file, view)
    }

    /// A configuration space with memory access on.
    fn space_in_use() -> [u8; CONFIG_SPACE_SIZE] {
        let mut space = ConfigSpace::new(19, 1 << 20).bytes;
        space[config::COMMAND] = 2;
        space
    }

    #[test]
    fn registers_of_a_device_in_use_are_told_as_they_are() {
        let space = space_in_use();
        let (_file, view) = view(0x0f, 3);
        let want = "\
device status: 0x0f, acknowledged, driver, features agreed, driver ready
link: 0x3, back-end up, front-end connected
vhost queues: at most 16
uuid: 07070707-0707-0707-0707-070707070707
";
        assert_eq!(registers_in_use(&space, &view).expect("told"), want);
        let off = ConfigSpace::new(19, 1 << 20).bytes;
        let told = registers_in_use(&off, &view).expect("told");
        assert_eq!(told, "memory access is off, so no register answers\n");
    }

    #[test]
    fn registers_elsewhere_are_not_looked_for() {
        const FIRST_VIRTIO: usize = 0x54;
        let (_file, view) = view(0x0f, 3);
        for (field, value) in [(virtio_cap::BAR, 2), (virtio_cap::OFFSET + 3, 1)] {
            let mut space = space_in_use();
            space[FIRST_VIRTIO + field] = value;
            let refused = registers_in_use(&space, &view);
            assert!(matches!(refused, Err(InspectError::Layout(LayoutError::Outside { .. }))), "{refused:?}");
        }
    }

    #[test]
    fn registers_are_told() {
        let liar = LocalDevice::liar(16);
        liar.lie(|liar| {
            liar.stick_status(0x0f);
            liar.link = 3;
        });
        let told = registers(&liar).expect("told");
        for want in [
            "device status: 0x0f, acknowledged, driver, features agreed, driver ready\n",
            "features offered: 0x320000000, event index, version 1, access through the IOMMU\n",
            "virtqueue 1: 256 descriptors, off\n",
            "link: 0x3, back-end up, front-end connected\n",
            "vhost queues: at most 16\n",
            "shared memory BAR: 0x4000000 bytes\n",
        ] {
            assert!(told.contains(want), "{told}");
        }
        liar.lie(|liar| liar.stick_status(0));
        assert!(registers(&liar).expect("told").contains("device status: 0x00, reset\n"));
    }
}
