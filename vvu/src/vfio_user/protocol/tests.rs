use proptest::prelude::*;

use super::*;
use crate::pci::vfio_region_index;
use crate::spec::pci::Region;

#[test]
fn header_on_the_wire() {
    let header = Header::command(0x0102, Command::RegionWrite, 20);
    assert_eq!(header.to_bytes(), [2, 1, 10, 0, 36, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(header.reply(16).to_bytes(), [2, 1, 10, 0, 32, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(header.error_reply(22).to_bytes(), [2, 1, 10, 0, 16, 0, 0, 0, 0x21, 0, 0, 0, 22, 0, 0, 0]);
}

#[test]
fn header_flags() {
    let command = Header::command(1, Command::DmaMap, 0);
    assert!(command.wants_reply() && !command.is_reply());
    assert!(!Header { flags: 0x10, ..command }.wants_reply());
    assert_eq!(command.reply(0).refusal(), None);
    assert_eq!(command.error_reply(17).refusal(), Some(17));
    assert!(command.error_reply(17).is_reply());
}

#[test]
fn header_bounds() {
    let header = |size: usize, flags| Header {
        size: u32::try_from(size).expect("test size"),
        flags,
        ..Header::default()
    };
    assert_eq!(header(16, 0).check(), Ok(()));
    assert_eq!(header(MESSAGE_SIZE_MAX, 1).check(), Ok(()));
    assert_eq!(header(15, 0).check(), Err(MessageError::Size { got: 15 }));
    assert_eq!(header(0, 0).check(), Err(MessageError::Size { got: 0 }));
    let over = header(MESSAGE_SIZE_MAX + 1, 0);
    assert_eq!(over.check(), Err(MessageError::Size { got: over.size }));
    assert_eq!(header(16, 2).check(), Err(MessageError::Type { got: 2 }));
    assert_eq!(header(16, 0xf).check(), Err(MessageError::Type { got: 15 }));
}

#[test]
fn payloads_on_the_wire() {
    let map = DmaMap { argsz: 32, flags: 3, offset: 0x1000, iova: 0x8_0000_0000, size: 0x2000 };
    assert_eq!(
        map.to_bytes(),
        [
            32, 0, 0, 0, 3, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0x20, 0, 0, 0, 0,
            0, 0
        ]
    );
    let unmap = DmaUnmap { argsz: 24, flags: DMA_UNMAP_ALL, iova: 0, size: 0 };
    assert_eq!(unmap.to_bytes()[..8], [24, 0, 0, 0, 2, 0, 0, 0]);
    let info = DeviceInfo { argsz: 16, flags: DEVICE_RESET | DEVICE_PCI, num_regions: 9, num_irqs: 5 };
    assert_eq!(info.to_bytes(), [16, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 5, 0, 0, 0]);
    let irq = IrqInfo { argsz: 16, flags: IRQ_EVENTFD, index: IRQ_MSIX, count: 5 };
    assert_eq!(irq.to_bytes(), [16, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 5, 0, 0, 0]);
    let set = SetIrqs { argsz: 20, flags: IRQ_DATA_EVENTFD | IRQ_TRIGGER, index: 2, start: 1, count: 3 };
    assert_eq!(set.to_bytes(), [20, 0, 0, 0, 0x24, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(IRQ_DATA_NONE | IRQ_TRIGGER, 0x21);
    let access = RegionAccess { offset: 0x2004, region: 2, count: 2 };
    assert_eq!(access.to_bytes(), [4, 0x20, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0]);
}

#[test]
fn mappable_region_on_the_wire() {
    let info = RegionInfo {
        argsz: 64,
        flags: REGION_READ_WRITE | REGION_MMAP | REGION_CAPS,
        index: 4,
        cap_offset: 32,
        size: 0x4000_0000,
        offset: 0,
    };
    assert_eq!(
        info.to_bytes(),
        [
            64, 0, 0, 0, 0xf, 0, 0, 0, 4, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            0, 0
        ]
    );
    assert_eq!(
        SparseArea::from_start(0x2000_0000).to_bytes(),
        [1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0]
    );
}

#[test]
fn capabilities_of_qemu() {
    let data =
        b"{\"capabilities\": {\"max_msg_fds\": 16, \"max_data_xfer_size\": 1048576, \"pgsizes\": 4096, \
                 \"max_dma_maps\": 65535, \"migration\": {}, \"write_multiple\": true}}\0";
    assert_eq!(Capabilities::parse(data), Ok(Capabilities::OURS));
    assert_eq!(Capabilities::parse(&Capabilities::OURS.to_bytes()), Ok(Capabilities::OURS));
}

#[test]
fn capabilities_have_defaults() {
    for data in [&b""[..], b"{}\0", b"{\"capabilities\":{}}\0", b"{\"capabilities\":{\"max_msg_fds\":-1}}\0"]
    {
        let capabilities = Capabilities::parse(data).expect("well-formed");
        assert_eq!(capabilities, Capabilities { max_msg_fds: 1, max_data_xfer_size: 1 << 20 });
    }
}

#[test]
fn version_data_is_an_object_ended_by_zero() {
    for data in [&b"\0"[..], b"{}", b"[]\0", b"{\0", b"\xff\0", b"{}\0\0"] {
        assert_eq!(Capabilities::parse(data), Err(MessageError::VersionData), "{data:?}");
    }
}

#[test]
fn regions_have_indices() {
    for index in 0..6 {
        let region = region_at(index).expect("a BAR");
        assert_eq!(vfio_region_index(region), index);
    }
    assert_eq!(region_at(7), Some(Region::Config));
    assert_eq!(vfio_region_index(Region::Config), 7);
    assert!([6, 8, 9, 256, u32::MAX].into_iter().all(|index| region_at(index).is_none()));
}

#[test]
fn commands_have_numbers() {
    for command in Command::ALL {
        assert_eq!(Command::from_number(command.number()), Some(command));
    }
    assert!([0, 6, 11, 12, 14, 15, 16, u16::MAX].into_iter().all(|n| Command::from_number(n).is_none()));
}

proptest! {
    #[test]
    fn structures_survive_the_wire(bytes in prop::array::uniform32(any::<u8>()), tail in any::<Vec<u8>>()) {
        let bytes = [&bytes[..], &tail].concat();
        macro_rules! round_trip {
            ($($name:ident)*) => {$(
                let (value, rest) = $name::parse(&bytes).expect("long enough");
                prop_assert_eq!(&value.to_bytes()[..], &bytes[..$name::SIZE]);
                prop_assert_eq!(rest, &bytes[$name::SIZE..]);
            )*};
        }
        round_trip!(Header Version DmaMap DmaUnmap DeviceInfo RegionInfo SparseArea IrqInfo SetIrqs RegionAccess);
    }

    #[test]
    fn short_payloads_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..DmaMap::SIZE)) {
        let want = DmaMap::SIZE;
        prop_assert_eq!(DmaMap::parse(&bytes), Err(MessageError::PayloadSize { got: bytes.len(), want }));
    }

    #[test]
    fn version_data_never_panics(data in any::<Vec<u8>>()) {
        let _ = Capabilities::parse(&data);
    }
}
