//! Carries out the commands of a client.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use vm_memory::Permissions;

use super::dma::DmaError;
use super::host::VmmHost;
use crate::durable::Fd;
use crate::pci::{MappableBar, PciFunction};
use crate::spec::addr::Iova;
use crate::spec::pci::Region;
use crate::vfio_user::protocol::socket::Message;
use crate::vfio_user::protocol::{
    Capabilities, Command, DEVICE_PCI, DEVICE_RESET, DMA_READ, DMA_UNMAP_ALL, DMA_WRITE, DeviceInfo, DmaMap,
    DmaUnmap, IRQ_COUNT, IRQ_DATA_EVENTFD, IRQ_DATA_NONE, IRQ_ERR, IRQ_EVENTFD, IRQ_MSIX, IRQ_TRIGGER,
    IrqInfo, MessageError, REGION_CAPS, REGION_COUNT, REGION_MMAP, REGION_READ_WRITE, RegionAccess,
    RegionInfo, SetIrqs, SparseArea, TRANSFER_SIZE_MAX, VERSION, Version, region_at,
};

/// Payload and descriptors of a reply.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Answer {
    fn payload(payload: impl Into<Vec<u8>>) -> Self {
        Self { payload: payload.into(), fds: Vec::new() }
    }
}

/// A command is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("vfio-user command {0} is not supported")]
    Unsupported(u16),
    #[error("the first command must agree on the version, and no other may")]
    Order,
    #[error("vfio-user version {major}.{minor}: want major version {}", VERSION.0)]
    Version { major: u16, minor: u16 },
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("argsz {got}: want at least {want}")]
    Argsz { got: u32, want: usize },
    #[error("{fds} file descriptors attached: want at most 1")]
    Fds { fds: usize },
    #[error(transparent)]
    Dma(#[from] DmaError),
    #[error("region {0} is not among the {REGION_COUNT} of a PCI device")]
    Region(u32),
    #[error("access of {} bytes at {:#x} of region {}, which has {size:#x} bytes", .access.count, .access.offset, .access.region)]
    Access { access: RegionAccess, size: u64 },
    #[error("interrupt kind {0} is not among the {IRQ_COUNT} of a PCI device")]
    IrqIndex(u32),
    #[error("only a PCI Express device has an error interrupt")]
    ErrorIrq,
    #[error("{request:?} with {fds} file descriptors does not fit the device: {errno}")]
    Irqs { request: SetIrqs, fds: usize, errno: Errno },
    #[error("cannot share the memory file: {0}")]
    File(std::io::Error),
}

impl Refusal {
    /// Returns the errno value for the reply.
    pub(super) fn errno(&self) -> Errno {
        match self {
            Self::Unsupported(_) => Errno::OPNOTSUPP,
            Self::Dma(error) => error.errno(),
            Self::Irqs { errno, .. } => *errno,
            Self::File(error) => Errno::from_io_error(error).unwrap_or(Errno::IO),
            _ => Errno::INVAL,
        }
    }

    /// Returns whether a correct client gets this refusal, too.
    pub(super) fn is_expected(&self) -> bool {
        matches!(self, Self::ErrorIrq)
    }
}

/// Carries out the commands of one client.
#[derive(Debug, Default)]
pub(super) struct CommandHandler {
    pub(super) version_agreed: bool,
}

impl CommandHandler {
    /// Carries out the command in `message`.
    pub(super) fn answer<D: PciFunction>(
        &mut self,
        mut message: Message,
        host: &mut VmmHost,
        device: &mut D,
    ) -> Result<Answer, Refusal> {
        let header = message.header;
        let fds: Vec<Fd> = std::mem::take(&mut message.fds).into_iter().map(Fd::from).collect();
        let payload = message.payload();
        let command = Command::from_number(header.command).ok_or(Refusal::Unsupported(header.command))?;
        if self.version_agreed == (command == Command::Version) {
            return Err(Refusal::Order);
        }
        match command {
            Command::Version => {
                let answer = version(payload)?;
                self.version_agreed = true;
                Ok(answer)
            }
            Command::DmaMap => dma_map(payload, fds, host),
            Command::DmaUnmap => dma_unmap(payload, host),
            Command::DeviceGetInfo => device_info(payload),
            Command::DeviceGetRegionInfo => region_info(payload, device),
            Command::DeviceGetIrqInfo => irq_info(payload, device),
            Command::DeviceSetIrqs => set_irqs(payload, fds, host),
            Command::RegionRead => region_read(payload, device),
            Command::RegionWrite => region_write(payload, host, device),
            Command::DeviceReset => {
                device.reset();
                Ok(Answer::default())
            }
        }
    }
}

fn version(payload: &[u8]) -> Result<Answer, Refusal> {
    let (Version { major, minor }, data) = Version::parse(payload)?;
    if major != VERSION.0 {
        return Err(Refusal::Version { major, minor });
    }
    let theirs = Capabilities::parse(data)?;
    log::debug!("the client speaks vfio-user {major}.{minor} with {theirs:?}");
    let version = Version { major: VERSION.0, minor: VERSION.1 };
    Ok(Answer::payload([&version.to_bytes()[..], &Capabilities::OURS.to_bytes()].concat()))
}

fn dma_map(payload: &[u8], fds: Vec<Fd>, host: &mut VmmHost) -> Result<Answer, Refusal> {
    let (map, _) = DmaMap::parse(payload)?;
    if fds.len() > 1 {
        return Err(Refusal::Fds { fds: fds.len() });
    }
    let access = match (map.flags & DMA_READ != 0, map.flags & DMA_WRITE != 0) {
        (true, true) => Permissions::ReadWrite,
        (true, false) => Permissions::Read,
        (false, true) => Permissions::Write,
        (false, false) => Permissions::No,
    };
    let file = fds.into_iter().next().map(|fd| (fd, map.offset));
    host.dma.map_held(Iova(map.iova), map.size, access, file)?;
    Ok(Answer::default())
}

fn dma_unmap(payload: &[u8], host: &mut VmmHost) -> Result<Answer, Refusal> {
    let (unmap, _) = DmaUnmap::parse(payload)?;
    if unmap.flags & DMA_UNMAP_ALL != 0 {
        host.dma.clear();
    } else {
        host.dma.unmap(Iova(unmap.iova), unmap.size)?;
    }
    Ok(Answer::payload(unmap.to_bytes()))
}

/// Checks that a reply of `want` bytes fits into what the client takes.
fn check_argsz(got: u32, want: usize) -> Result<(), Refusal> {
    if usize::try_from(got).is_ok_and(|got| got >= want) { Ok(()) } else { Err(Refusal::Argsz { got, want }) }
}

/// Converts the size of a structure for its field `argsz`.
#[expect(clippy::cast_possible_truncation, reason = "structures are small")]
const fn argsz(size: usize) -> u32 {
    size as u32
}

fn device_info(payload: &[u8]) -> Result<Answer, Refusal> {
    let (request, _) = DeviceInfo::parse(payload)?;
    check_argsz(request.argsz, DeviceInfo::SIZE)?;
    let info = DeviceInfo {
        argsz: argsz(DeviceInfo::SIZE),
        flags: DEVICE_RESET | DEVICE_PCI,
        num_regions: REGION_COUNT,
        num_irqs: IRQ_COUNT,
    };
    Ok(Answer::payload(info.to_bytes()))
}

fn region_info(payload: &[u8], device: &impl PciFunction) -> Result<Answer, Refusal> {
    let (request, _) = RegionInfo::parse(payload)?;
    check_argsz(request.argsz, RegionInfo::SIZE)?;
    if request.index >= REGION_COUNT {
        return Err(Refusal::Region(request.index));
    }
    let region = region_at(request.index);
    let size = region.map_or(0, |region| device.region_size(region));
    let mut info = RegionInfo {
        argsz: argsz(RegionInfo::SIZE),
        index: request.index,
        flags: if size == 0 { 0 } else { REGION_READ_WRITE },
        size,
        ..RegionInfo::default()
    };
    let mappable = device.mappable_bar().filter(|mappable| region == Some(Region::Bar(mappable.bar)));
    let Some(MappableBar { file, size: mappable, .. }) = mappable.filter(|_| size > 0) else {
        return Ok(Answer::payload(info.to_bytes()));
    };
    info.flags |= REGION_MMAP | REGION_CAPS;
    info.argsz = argsz(RegionInfo::SIZE + SparseArea::SIZE);
    // QEMU checks this even in a reply that is too small to hold the capability.
    info.cap_offset = argsz(RegionInfo::SIZE);
    if request.argsz < info.argsz {
        return Ok(Answer::payload(info.to_bytes()));
    }
    let area = SparseArea::from_start(mappable);
    let file = file.try_clone_to_owned().map_err(Refusal::File)?;
    Ok(Answer { payload: [&info.to_bytes()[..], &area.to_bytes()].concat(), fds: vec![file] })
}

fn irq_info(payload: &[u8], device: &impl PciFunction) -> Result<Answer, Refusal> {
    let (request, _) = IrqInfo::parse(payload)?;
    check_argsz(request.argsz, IrqInfo::SIZE)?;
    if request.index >= IRQ_COUNT {
        return Err(Refusal::IrqIndex(request.index));
    }
    // The kernel's VFIO refuses this for conventional PCI; a count of 0 makes QEMU warn.
    if request.index == IRQ_ERR {
        return Err(Refusal::ErrorIrq);
    }
    let (flags, count) =
        if request.index == IRQ_MSIX { (IRQ_EVENTFD, device.vector_count().into()) } else { (0, 0) };
    let info = IrqInfo { argsz: argsz(IrqInfo::SIZE), flags, index: request.index, count };
    Ok(Answer::payload(info.to_bytes()))
}

fn set_irqs(payload: &[u8], eventfds: Vec<Fd>, host: &mut VmmHost) -> Result<Answer, Refusal> {
    const DISABLE: u32 = IRQ_DATA_NONE | IRQ_TRIGGER;
    const SET: u32 = IRQ_DATA_EVENTFD | IRQ_TRIGGER;
    let (request, _) = SetIrqs::parse(payload)?;
    if request.index >= IRQ_COUNT {
        return Err(Refusal::IrqIndex(request.index));
    }
    let fds = eventfds.len();
    match (request.index, request.flags, request.count) {
        (IRQ_MSIX, DISABLE, 0) => {
            host.clear_vectors();
            Ok(())
        }
        (IRQ_MSIX, DISABLE, count) => host.fire_vectors(request.start, count),
        (IRQ_MSIX, SET, count) => host.set_vectors(request.start, count, eventfds),
        (_, DISABLE, 0) => Ok(()),
        _ => Err(Errno::INVAL),
    }
    .map_err(|errno| Refusal::Irqs { request, fds, errno })?;
    Ok(Answer::default())
}

/// Checks that an access lies inside its region, and returns region and length.
fn checked_access(access: RegionAccess, device: &impl PciFunction) -> Result<(Region, usize), Refusal> {
    let region = region_at(access.region);
    let size = region.map_or(0, |region| device.region_size(region));
    let inside = access.offset.checked_add(access.count.into()).is_some_and(|end| end <= size);
    let count = usize::try_from(access.count).ok().filter(|count| inside && *count <= TRANSFER_SIZE_MAX);
    region.zip(count).ok_or(Refusal::Access { access, size })
}

fn region_read(payload: &[u8], device: &mut impl PciFunction) -> Result<Answer, Refusal> {
    let (access, _) = RegionAccess::parse(payload)?;
    let (region, count) = checked_access(access, device)?;
    let mut reply = access.to_bytes().to_vec();
    reply.resize(RegionAccess::SIZE + count, 0);
    device.read(region, access.offset, &mut reply[RegionAccess::SIZE..]);
    Ok(Answer::payload(reply))
}

fn region_write(payload: &[u8], host: &VmmHost, device: &mut impl PciFunction) -> Result<Answer, Refusal> {
    let (access, data) = RegionAccess::parse(payload)?;
    let (region, count) = checked_access(access, device)?;
    let short = MessageError::PayloadSize { got: payload.len(), want: RegionAccess::SIZE + count };
    let data = data.get(..count).ok_or(short)?;
    device.write(host, region, access.offset, data);
    Ok(Answer::payload(access.to_bytes()))
}

#[cfg(test)]
mod tests;
