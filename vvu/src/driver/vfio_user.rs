//! A PCI device behind a vfio-user server: the driver's way to the proxy without a VM.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use super::doorbells::Doorbells;
use super::eventfd;
use super::pci_device::{DeviceError, DmaBuffer, PciDevice};
use crate::spec::addr::Iova;
use crate::spec::pci::{Region, cap_id, config, msix};
use crate::spec::vfio_user::{
    Capabilities, Command, DMA_READ, DMA_WRITE, DeviceInfo, DmaMap, FDS_MAX, Header, IRQ_DATA_EVENTFD,
    IRQ_DATA_NONE, IRQ_MSIX, IRQ_TRIGGER, IrqInfo, REGION_COUNT, REGION_MMAP, RegionAccess, RegionInfo,
    SetIrqs, SparseArea, VERSION, Version, region_index,
};
use crate::vfio_user::{Message, MessageSocket, SocketError};

/// How long a server may take to answer.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// First I/O virtual address given out.
const FIRST_IOVA: u64 = 1 << 32;
const PAGE_SIZE: u64 = 4096;

/// A device that a vfio-user server hosts. Dropping it disconnects, which takes all DMA maps and
/// interrupts away.
#[derive(Debug)]
pub struct VfioUserDevice {
    connection: Arc<Connection>,
    regions: Vec<RegionView>,
    vectors: u32,
    next_iova: Mutex<u64>,
    doorbells: Doorbells,
}

/// A region as the server described it.
#[derive(Debug)]
struct RegionView {
    size: u64,
    file: Option<(File, u64)>,
}

impl VfioUserDevice {
    /// Connects to the server that listens at `path`.
    ///
    /// # Errors
    /// [`DeviceError`] when there is none, or when it does not speak vfio-user for a PCI device.
    pub fn connect(path: &Path) -> Result<Self, DeviceError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| DeviceError::Io { what: format!("connect to {}", path.display()), source })?;
        Self::from_stream(stream)
    }

    /// Uses a stream that is connected to a server.
    ///
    /// # Errors
    /// [`DeviceError`] when the server does not speak vfio-user for a PCI device.
    pub fn from_stream(stream: UnixStream) -> Result<Self, DeviceError> {
        let connection = Arc::new(Connection::new(stream)?);
        connection.device_info()?;
        let regions = (0..REGION_COUNT).map(|index| connection.region(index)).collect::<Result<_, _>>()?;
        let vectors = connection.vector_count()?;
        let doorbells = Doorbells::new({
            let connection = Arc::clone(&connection);
            move |bar, offset, value: u16| connection.write(bar, offset, &value.to_le_bytes())
        })?;
        Ok(Self { connection, regions, vectors, next_iova: Mutex::new(FIRST_IOVA), doorbells })
    }

    fn region(&self, region: Region) -> Option<&RegionView> {
        self.regions.get(usize::try_from(region_index(region)).ok()?)
    }

    /// Checks that an access lies inside its region.
    fn check(&self, region: Region, offset: u64, len: usize) -> Result<(), DeviceError> {
        let size = self.region_size(region);
        let end = u64::try_from(len).ok().and_then(|len| offset.checked_add(len));
        if end.is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(DeviceError::OutOfRange { region, offset, len, size })
    }

    /// Turns the device's MSI-X capability on, as the kernel does for VFIO.
    fn set_msix_enable(&self) -> Result<(), DeviceError> {
        let read_byte = |at: u8| {
            let mut byte = [0];
            self.read(Region::Config, at.into(), &mut byte).map(|()| byte[0])
        };
        let [pointer, ..] = config::CAPABILITIES.to_le_bytes();
        let mut at = read_byte(pointer)?;
        // Each capability takes four bytes at least, so there are no more than this.
        for _ in 0..48 {
            if at < 0x40 {
                break;
            }
            if read_byte(at)? == cap_id::MSIX {
                let control_at = u64::from(at) + msix::CONTROL as u64;
                let mut control = [0; 2];
                self.read(Region::Config, control_at, &mut control)?;
                let enabled = (u16::from_le_bytes(control) | msix::CONTROL_ENABLE) & !msix::CONTROL_MASK_ALL;
                return self.write(Region::Config, control_at, &enabled.to_le_bytes());
            }
            at = read_byte(at.saturating_add(1))?;
        }
        Err(io_error("enable MSI-X", "the device has no MSI-X capability"))
    }
}

impl PciDevice for VfioUserDevice {
    fn region_size(&self, region: Region) -> u64 {
        self.region(region).map_or(0, |view| view.size)
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        self.check(region, offset, data.len())?;
        self.connection.read(region, offset, data)
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.check(region, offset, data.len())?;
        self.connection.write(region, offset, data)
    }

    fn bar_file(&self, bar: u8) -> Result<File, DeviceError> {
        let what = || format!("map BAR {bar}");
        match self.region(Region::Bar(bar)).and_then(|view| view.file.as_ref()) {
            Some((file, 0)) => file.try_clone().map_err(|source| DeviceError::Io { what: what(), source }),
            Some((_, offset)) => {
                Err(io_error(what(), format!("it starts at {offset:#x} of its file: want 0")))
            }
            None => Err(io_error(what(), "the server gives no file for it")),
        }
    }

    fn allocate_dma(&self, len: usize) -> Result<DmaBuffer, DeviceError> {
        let what = || format!("allocate {len} bytes for DMA");
        let size = u64::try_from(len).ok().and_then(|len| len.max(1).checked_next_multiple_of(PAGE_SIZE));
        let size = size.ok_or_else(|| io_error(what(), Errno::NOMEM))?;
        let file = memfd_create("dma", MemfdFlags::CLOEXEC).map_err(|error| io_error(what(), error))?;
        ftruncate(&file, size).map_err(|error| io_error(what(), error))?;
        let for_server = file.try_clone().map_err(|error| io_error(what(), error))?;
        let length = usize::try_from(size).map_err(|error| io_error(what(), error))?;
        let memory = MmapRegion::from_file(FileOffset::new(File::from(file), 0), length)
            .map_err(|error| io_error(what(), error))?;
        let iova = {
            let mut next = lock(&self.next_iova);
            let iova = *next;
            // A page that is never mapped keeps overruns from reaching the next buffer.
            *next = size
                .checked_add(PAGE_SIZE)
                .and_then(|size| iova.checked_add(size))
                .ok_or_else(|| io_error(what(), Errno::NOMEM))?;
            iova
        };
        self.connection.map_dma(iova, size, for_server)?;
        Ok(DmaBuffer { memory, iova: Iova(iova) })
    }

    fn enable_msix(&self, vectors: &[&EventFd]) -> Result<(), DeviceError> {
        let count = u32::try_from(vectors.len()).ok().filter(|count| *count <= self.vectors);
        let count = count.ok_or_else(|| {
            let what = format!("enable {} MSI-X vectors", vectors.len());
            io_error(what, format!("the device has {}", self.vectors))
        })?;
        self.connection.set_vectors(vectors)?;
        if count < self.vectors {
            self.connection.set_irqs(IRQ_DATA_EVENTFD, count, self.vectors - count, Vec::new())?;
        }
        self.set_msix_enable()
    }

    fn bind_doorbell(&self, bar: u8, offset: u64, value: u16, event: &EventFd) -> Result<(), DeviceError> {
        self.check(Region::Bar(bar), offset, size_of_val(&value))?;
        self.doorbells.bind(Region::Bar(bar), offset, value, event)
    }
}

fn io_error(
    what: impl Into<String>,
    cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> DeviceError {
    DeviceError::Io { what: what.into(), source: io::Error::other(cause) }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection to a server: one command at a time.
#[derive(Debug)]
struct Connection {
    channel: Mutex<Channel>,
    server: Capabilities,
}

#[derive(Debug)]
struct Channel {
    socket: MessageSocket,
    next_id: u16,
    /// Set by the first failure of the transport: what would be read next is unknown.
    broken: bool,
}

impl Connection {
    /// Agrees on the version.
    fn new(stream: UnixStream) -> Result<Self, DeviceError> {
        let channel = Channel { socket: MessageSocket::new(stream), next_id: 0, broken: false };
        let mut connection = Self { channel: Mutex::new(channel), server: Capabilities::OURS };
        let ours = Version { major: VERSION.0, minor: VERSION.1 };
        let payload = [&ours.to_bytes()[..], &Capabilities::OURS.to_bytes()].concat();
        let what = "agree on the vfio-user version";
        let reply = connection.request(what, Command::Version, &payload, Vec::new())?;
        let (theirs, data) = Version::parse(&reply.payload).map_err(|error| io_error(what, error))?;
        if theirs != ours {
            let (major, minor) = (theirs.major, theirs.minor);
            return Err(io_error(
                what,
                format!("the server speaks {major}.{minor}: want {}.{}", VERSION.0, VERSION.1),
            ));
        }
        connection.server = Capabilities::parse(data).map_err(|error| io_error(what, error))?;
        Ok(connection)
    }

    /// Sends a command and waits for its reply.
    fn request(
        &self,
        what: impl Into<String>,
        command: Command,
        payload: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<Message, DeviceError> {
        let mut channel = lock(&self.channel);
        channel
            .exchange(command, payload, fds)
            .map_err(|source| DeviceError::Io { what: what.into(), source })
    }

    fn device_info(&self) -> Result<(), DeviceError> {
        let what = "ask for the device";
        let request = DeviceInfo { argsz: argsz(DeviceInfo::SIZE), ..DeviceInfo::default() };
        let reply = self.request(what, Command::DeviceGetInfo, &request.to_bytes(), Vec::new())?;
        let (info, _) = DeviceInfo::parse(&reply.payload).map_err(|error| io_error(what, error))?;
        if info.num_regions < REGION_COUNT || info.num_irqs <= IRQ_MSIX {
            return Err(io_error(what, format!("it is no PCI device: {info:?}")));
        }
        Ok(())
    }

    fn region(&self, index: u32) -> Result<RegionView, DeviceError> {
        let what = || format!("ask for region {index}");
        let argsz = argsz(RegionInfo::SIZE + SparseArea::SIZE);
        let request = RegionInfo { argsz, index, ..RegionInfo::default() };
        let reply = self.request(what(), Command::DeviceGetRegionInfo, &request.to_bytes(), Vec::new())?;
        let (info, _) = RegionInfo::parse(&reply.payload).map_err(|error| io_error(what(), error))?;
        let file = reply.fds.into_iter().next().filter(|_| info.flags & REGION_MMAP != 0);
        Ok(RegionView { size: info.size, file: file.map(|fd| (File::from(fd), info.offset)) })
    }

    fn vector_count(&self) -> Result<u32, DeviceError> {
        let what = "ask for the MSI-X vectors";
        let request = IrqInfo { argsz: argsz(IrqInfo::SIZE), index: IRQ_MSIX, ..IrqInfo::default() };
        let reply = self.request(what, Command::DeviceGetIrqInfo, &request.to_bytes(), Vec::new())?;
        let (info, _) = IrqInfo::parse(&reply.payload).map_err(|error| io_error(what, error))?;
        Ok(info.count)
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        let what = || format!("read {region:?} at {offset:#x}");
        let mut at = offset;
        for part in data.chunks_mut(self.transfer_size()) {
            let access = region_access(region, at, part.len());
            let reply = self.request(what(), Command::RegionRead, &access.to_bytes(), Vec::new())?;
            let (_, read) = RegionAccess::parse(&reply.payload).map_err(|error| io_error(what(), error))?;
            if read.len() != part.len() {
                return Err(io_error(what(), format!("got {} bytes: want {}", read.len(), part.len())));
            }
            part.copy_from_slice(read);
            at += u64::from(access.count);
        }
        Ok(())
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let mut at = offset;
        for part in data.chunks(self.transfer_size()) {
            let access = region_access(region, at, part.len());
            let payload = [&access.to_bytes()[..], part].concat();
            let what = format!("write {region:?} at {at:#x}");
            self.request(what, Command::RegionWrite, &payload, Vec::new())?;
            at += u64::from(access.count);
        }
        Ok(())
    }

    /// Most bytes in one access.
    fn transfer_size(&self) -> usize {
        self.server.max_data_xfer_size.clamp(1, Capabilities::OURS.max_data_xfer_size)
    }

    fn map_dma(&self, iova: u64, size: u64, file: OwnedFd) -> Result<(), DeviceError> {
        let map = DmaMap { argsz: argsz(DmaMap::SIZE), flags: DMA_READ | DMA_WRITE, offset: 0, iova, size };
        let what = format!("map {size:#x} bytes at {} for DMA", Iova(iova));
        self.request(what, Command::DmaMap, &map.to_bytes(), vec![file]).map(drop)
    }

    /// Gives the vectors from 0 on their eventfds, as many at a time as the server takes.
    fn set_vectors(&self, vectors: &[&EventFd]) -> Result<(), DeviceError> {
        let mut start = 0;
        for batch in vectors.chunks(self.server.max_msg_fds.clamp(1, FDS_MAX)) {
            let fds = batch
                .iter()
                .map(|event| eventfd::borrow(event).try_clone_to_owned())
                .collect::<Result<_, _>>();
            let fds = fds.map_err(|source| DeviceError::Io { what: "share eventfds".into(), source })?;
            let count = argsz(batch.len());
            self.set_irqs(IRQ_DATA_EVENTFD, start, count, fds)?;
            start += count;
        }
        if vectors.is_empty() { self.set_irqs(IRQ_DATA_NONE, 0, 0, Vec::new()) } else { Ok(()) }
    }

    fn set_irqs(&self, data: u32, start: u32, count: u32, fds: Vec<OwnedFd>) -> Result<(), DeviceError> {
        let flags = data | IRQ_TRIGGER;
        let set = SetIrqs { argsz: argsz(SetIrqs::SIZE), flags, index: IRQ_MSIX, start, count };
        let what = format!("set {count} MSI-X vectors from {start} on");
        self.request(what, Command::DeviceSetIrqs, &set.to_bytes(), fds).map(drop)
    }
}

fn region_access(region: Region, offset: u64, count: usize) -> RegionAccess {
    RegionAccess { offset, region: region_index(region), count: argsz(count) }
}

/// A length that is known to be small.
fn argsz(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

impl Channel {
    fn exchange(&mut self, command: Command, payload: &[u8], fds: Vec<OwnedFd>) -> io::Result<Message> {
        if self.broken {
            return Err(io::Error::new(
                io::ErrorKind::NotConnected,
                "the vfio-user connection failed before",
            ));
        }
        self.next_id = self.next_id.wrapping_add(1);
        let header = Header::command(self.next_id, command, payload.len());
        let reply = self.transport(header, payload, fds).inspect_err(|_| self.broken = true)?;
        match reply.header.refusal() {
            Some(errno) => {
                let errno = i32::try_from(errno).ok().filter(|errno| *errno != 0);
                Err(errno.map_or_else(|| io::Error::other("refused"), io::Error::from_raw_os_error))
            }
            None => Ok(reply),
        }
    }

    fn transport(&mut self, header: Header, payload: &[u8], fds: Vec<OwnedFd>) -> io::Result<Message> {
        let deadline = Instant::now() + REPLY_TIMEOUT;
        self.socket.send(header, payload, fds).map_err(socket_error)?;
        while self.socket.is_congested() {
            self.wait(PollFlags::OUT, deadline)?;
            self.socket.flush().map_err(socket_error)?;
        }
        let reply = loop {
            match self.socket.receive().map_err(socket_error)? {
                Some(reply) => break reply,
                None => self.wait(PollFlags::IN, deadline)?,
            }
        };
        let got = reply.header;
        if !got.is_reply() || (got.id, got.command) != (header.id, header.command) {
            let message = format!("unexpected vfio-user message {got:?}: want the reply to {header:?}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(reply)
    }

    fn wait(&self, interest: PollFlags, deadline: Instant) -> io::Result<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let message = format!("no reply within {} s", REPLY_TIMEOUT.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, message));
            }
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&self.socket, interest)], Some(&left)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn socket_error(error: SocketError) -> io::Error {
    match error {
        SocketError::Closed => io::Error::new(io::ErrorKind::UnexpectedEof, error),
        SocketError::Io(errno) => errno.into(),
        error => io::Error::new(io::ErrorKind::InvalidData, error),
    }
}
