use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::*;
use crate::device::{DeviceConfig, SiblingMemory, VvuDevice};
use crate::pci::Host;
use crate::vfio_user::protocol::Header;

const MEMORY: u64 = 3 << 20;
const PAGE: u64 = 4096;

/// A handler past the version exchange.
struct Rig {
    device: VvuDevice,
    host: VmmHost,
    commands: CommandHandler,
    _dir: TempDir,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let listener = UnixListener::bind(dir.path().join("s")).expect("bind");
        let memory = SiblingMemory::create(MEMORY).expect("memfd");
        let config = DeviceConfig { memory, listener, queues: 16, uuid: [7; 16] };
        let device = VvuDevice::new(config).expect("device");
        let host = VmmHost::new(device.vector_count());
        Self { device, host, commands: CommandHandler { version_agreed: true }, _dir: dir }
    }

    fn answer(&mut self, command: Command, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Answer, Errno> {
        let header = Header::command(1, command, payload.len());
        let mut message = Message::new(header, payload);
        message.fds = fds;
        self.commands.answer(message, &mut self.host, &mut self.device).map_err(|refusal| refusal.errno())
    }

    fn region_info(&mut self, argsz: u32, index: u32) -> Result<Answer, Errno> {
        let request = RegionInfo { argsz, index, ..RegionInfo::default() };
        self.answer(Command::DeviceGetRegionInfo, &request.to_bytes(), Vec::new())
    }

    fn set_irqs(&mut self, flags: u32, start: u32, count: u32, fds: &[&OwnedFd]) -> Result<(), Errno> {
        let request = SetIrqs { argsz: 20, flags, index: IRQ_MSIX, start, count };
        let fds = fds.iter().map(|fd| fd.try_clone().expect("dup")).collect();
        self.answer(Command::DeviceSetIrqs, &request.to_bytes(), fds).map(drop)
    }

    fn map(&mut self, flags: u32, iova: u64, size: u64, file: Option<(&OwnedFd, u64)>) -> Result<(), Errno> {
        let offset = file.map_or(0, |(_, offset)| offset);
        let fds = file.into_iter().map(|(fd, _)| fd.try_clone().expect("dup")).collect();
        let map = DmaMap { argsz: 32, flags, offset, iova, size };
        self.answer(Command::DmaMap, &map.to_bytes(), fds).map(drop)
    }

    fn unmap(&mut self, flags: u32, iova: u64, size: u64) -> Result<Answer, Errno> {
        let unmap = DmaUnmap { argsz: 24, flags, iova, size };
        self.answer(Command::DmaUnmap, &unmap.to_bytes(), Vec::new())
    }

    fn reaches(&self, iova: u64, size: usize) -> bool {
        self.host.memory().check_range(GuestAddress(iova), size, Permissions::ReadWrite)
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd")
}

/// Takes the signals of `event`.
fn signals(event: &OwnedFd) -> u64 {
    let mut value = [0; 8];
    rustix::io::read(event, &mut value).map_or(0, |_| u64::from_ne_bytes(value))
}

#[test]
fn the_device_is_pci_and_can_be_reset() {
    let mut rig = Rig::new();
    let request = DeviceInfo { argsz: 16, ..DeviceInfo::default() };
    let answer = rig.answer(Command::DeviceGetInfo, &request.to_bytes(), Vec::new()).expect("info");
    assert_eq!(answer.payload, [16, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 5, 0, 0, 0]);
}

#[test]
fn the_shared_memory_bar_is_described_in_two_steps() {
    let mut rig = Rig::new();
    let shared = rig.device.shared_memory().1;
    let first = rig.region_info(32, 4).expect("first");
    let (info, rest) = RegionInfo::parse(&first.payload).expect("info");
    assert_eq!(
        (info.argsz, info.flags, info.cap_offset, info.size),
        (64, 0xf, 32, shared.next_power_of_two())
    );
    assert_eq!((rest, first.fds.len()), (&[][..] as &[u8], 0));

    let full = rig.region_info(64, 4).expect("full");
    let (again, rest) = RegionInfo::parse(&full.payload).expect("info");
    assert_eq!((again, again.offset), (info, 0));
    let (area, rest) = SparseArea::parse(rest).expect("area");
    assert_eq!((area, rest.len()), (SparseArea::from_start(shared), 0));
    let [file] = &full.fds[..] else { panic!("one file: {:?}", full.fds) };
    let inode = |fd: std::os::fd::BorrowedFd<'_>| fstat(fd).expect("fstat").st_ino;
    assert_eq!(inode(file.as_fd()), inode(rig.device.shared_memory().0));
}

#[test]
fn the_other_regions_are_trapped_or_empty() {
    let mut rig = Rig::new();
    for (index, size, flags) in
        [(0, 0x8000, 3), (1, 0, 0), (2, 0x4000, 3), (3, 0, 0), (5, 0, 0), (6, 0, 0), (7, 256, 3), (8, 0, 0)]
    {
        let answer = rig.region_info(64, index).expect("info");
        let want = RegionInfo { argsz: 32, flags, index, cap_offset: 0, size, offset: 0 };
        assert_eq!((&answer.payload[..], answer.fds.len()), (&want.to_bytes()[..], 0));
    }
    assert_eq!(rig.region_info(64, 9).err(), Some(Errno::INVAL));
    assert_eq!(rig.region_info(31, 0).err(), Some(Errno::INVAL));
}

#[test]
fn only_msix_has_interrupts() {
    let mut rig = Rig::new();
    for (index, flags, count) in [(0, 0, 0), (1, 0, 0), (2, 1, 19), (4, 0, 0)] {
        let request = IrqInfo { argsz: 16, index, ..IrqInfo::default() };
        let answer = rig.answer(Command::DeviceGetIrqInfo, &request.to_bytes(), Vec::new()).expect("info");
        assert_eq!(answer.payload, IrqInfo { argsz: 16, flags, index, count }.to_bytes());
    }
    for index in [IRQ_ERR, IRQ_COUNT] {
        let request = IrqInfo { argsz: 16, index, ..IrqInfo::default() };
        let refused = rig.answer(Command::DeviceGetIrqInfo, &request.to_bytes(), Vec::new());
        assert_eq!(refused.err(), Some(Errno::INVAL));
    }
}

#[test]
fn interrupts_are_set_as_qemu_does() {
    let mut rig = Rig::new();
    // Turning MSI-X on: vector 0 without an eventfd, then each vector by itself.
    rig.set_irqs(0x24, 0, 1, &[]).expect("enable");
    let (a, b) = (event(), event());
    rig.set_irqs(0x24, 0, 1, &[&a]).expect("vector 0");
    rig.set_irqs(0x24, 18, 1, &[&b]).expect("vector 18");
    rig.host.signal(0);
    rig.host.signal(18);
    assert_eq!((signals(&a), signals(&b)), (1, 1));
    // Several at once, in place of what was there.
    rig.set_irqs(0x24, 0, 2, &[&b, &a]).expect("vectors 0 and 1");
    rig.host.signal(1);
    assert_eq!((signals(&a), signals(&b)), (1, 0));
    // Fired by the client.
    rig.set_irqs(0x21, 0, 1, &[]).expect("fire");
    assert_eq!(signals(&b), 1);
    // A reset keeps them, turning MSI-X off does not.
    rig.answer(Command::DeviceReset, &[], Vec::new()).expect("reset");
    rig.host.signal(0);
    assert_eq!(signals(&b), 1);
    rig.set_irqs(0x21, 0, 0, &[]).expect("disable");
    (0..19).for_each(|vector| rig.host.signal(vector));
    assert_eq!((signals(&a), signals(&b)), (0, 0));
}

#[test]
fn interrupts_that_cannot_be_are_refused() {
    let mut rig = Rig::new();
    let a = event();
    assert_eq!(rig.set_irqs(0x24, 19, 1, &[&a]), Err(Errno::INVAL));
    assert_eq!(rig.set_irqs(0x24, 0, 2, &[&a]), Err(Errno::INVAL));
    assert_eq!(rig.set_irqs(0x24, u32::MAX, u32::MAX, &[]), Err(Errno::INVAL));
    assert_eq!(rig.set_irqs(0x22, 0, 1, &[]), Err(Errno::INVAL));
    assert_eq!(rig.set_irqs(0x09, 0, 1, &[]), Err(Errno::INVAL));
    let kinds = |index, flags, count| SetIrqs { argsz: 20, flags, index, start: 0, count }.to_bytes();
    for (payload, allowed) in
        [(kinds(0, 0x21, 0), true), (kinds(0, 0x24, 1), false), (kinds(5, 0x21, 0), false)]
    {
        assert_eq!(rig.answer(Command::DeviceSetIrqs, &payload, Vec::new()).is_ok(), allowed);
    }
}

#[test]
fn memory_is_mapped_and_unmapped_as_qemu_does() {
    let mut rig = Rig::new();
    let ram = memfd_create("ram", MemfdFlags::CLOEXEC).expect("memfd");
    ftruncate(&ram, 4 * PAGE).expect("ftruncate");
    // Nothing was mapped yet.
    rig.unmap(0, 0, u64::MAX).expect("all of the address space");
    rig.unmap(DMA_UNMAP_ALL, 0, 0).expect("everything");
    // Pages in reverse order.
    for page in 0..4 {
        rig.map(3, page * PAGE, PAGE, Some((&ram, (3 - page) * PAGE))).expect("map");
    }
    assert!(rig.reaches(0, 4 * 4096));
    rig.host.memory().write_obj(0x0102_0304u32, GuestAddress(PAGE - 2)).expect("write");
    let mut bytes = [0; 2];
    rustix::io::pread(&ram, &mut bytes, 2 * PAGE).expect("pread");
    assert_eq!(bytes, [2, 1]);

    assert_eq!(rig.map(3, 3 * PAGE, PAGE, Some((&ram, 0))), Err(Errno::EXIST));
    assert_eq!(rig.map(3, 4 * PAGE, PAGE, Some((&ram, 4 * PAGE))), Err(Errno::INVAL));
    assert_eq!(rig.map(0, 4 * PAGE, PAGE, Some((&ram, 0))), Err(Errno::INVAL));
    rig.map(1, 4 * PAGE, PAGE, Some((&ram, 0))).expect("read only");
    assert!(!rig.reaches(4 * PAGE, 1));
    rig.map(3, 5 * PAGE, PAGE, None).expect("another device's BAR");
    assert!(!rig.reaches(5 * PAGE, 1));

    let answer = rig.unmap(0, PAGE, PAGE).expect("unmap");
    assert_eq!(answer.payload, DmaUnmap { argsz: 24, flags: 0, iova: PAGE, size: PAGE }.to_bytes());
    assert!(rig.reaches(0, 4096) && !rig.reaches(PAGE, 1) && rig.reaches(2 * PAGE, 2 * 4096));
    rig.answer(Command::DeviceReset, &[], Vec::new()).expect("reset");
    assert!(rig.reaches(0, 4096));
    rig.unmap(DMA_UNMAP_ALL, 0, 0).expect("everything");
    assert!(!rig.reaches(0, 1));
}

#[test]
fn a_map_has_one_file_at_most() {
    let mut rig = Rig::new();
    let map = DmaMap { argsz: 32, flags: 3, offset: 0, iova: 0, size: PAGE };
    let refused = rig.answer(Command::DmaMap, &map.to_bytes(), vec![event(), event()]);
    assert_eq!(refused.err(), Some(Errno::INVAL));
}

#[test]
fn a_reset_resets_the_device() {
    let mut rig = Rig::new();
    let access = RegionAccess { offset: 20, region: 0, count: 1 };
    let write = [&access.to_bytes()[..], &[1]].concat();
    rig.answer(Command::RegionWrite, &write, Vec::new()).expect("write");
    let status = |rig: &mut Rig| {
        let answer = rig.answer(Command::RegionRead, &access.to_bytes(), Vec::new()).expect("read");
        answer.payload[RegionAccess::SIZE]
    };
    assert_eq!(status(&mut rig), 1);
    rig.answer(Command::DeviceReset, &[], Vec::new()).expect("reset");
    assert_eq!(status(&mut rig), 0);
}
