//! Commands to a vfio-user server, and their replies.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::event::{Event, wait_any};
use rustix::event::{PollFd, PollFlags};

use crate::pci::{DeviceError, vfio_region_index};
use crate::spec::addr::Iova;
use crate::spec::pci::Region;
use crate::vfio_user::protocol::socket::{Message, MessageSocket, SocketError};
use crate::vfio_user::protocol::{
    Capabilities, Command, DMA_READ, DMA_WRITE, DeviceInfo, DmaMap, FDS_MAX, Header, IRQ_DATA_EVENTFD,
    IRQ_MSIX, IRQ_TRIGGER, IrqInfo, MessageError, REGION_COUNT, REGION_MMAP, RegionAccess, RegionInfo,
    SetIrqs, SparseArea, VERSION, Version,
};

/// Time that a server gets to answer.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// A region as the server described it.
#[derive(Debug)]
pub(super) struct RegionView {
    /// Bytes of the region, 0 if there is none.
    pub(super) size: u64,
    /// The file it can be mapped from, and where it starts there.
    pub(super) file: Option<(File, u64)>,
}

/// Reads a structure at the start of a payload, and returns what follows it.
type Parse<T> = fn(&[u8]) -> Result<(T, &[u8]), MessageError>;

/// A connection to a server: one command at a time.
#[derive(Debug)]
pub(super) struct Connection {
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
    pub(super) fn new(stream: UnixStream) -> Result<Self, DeviceError> {
        let channel = Channel { socket: MessageSocket::new(stream), next_id: 0, broken: false };
        let mut connection = Self { channel: Mutex::new(channel), server: Capabilities::OURS };
        let ours = Version { major: VERSION.0, minor: VERSION.1 };
        let payload = [&ours.to_bytes()[..], &Capabilities::OURS.to_bytes()].concat();
        let what = "agree on the vfio-user version";
        let reply = connection.request(what, Command::Version, &payload, Vec::new())?;
        let (theirs, data) =
            Version::parse(reply.payload()).map_err(|error| DeviceError::other(what, error))?;
        if theirs != ours {
            let (major, minor) = (theirs.major, theirs.minor);
            return Err(DeviceError::other(
                what,
                format!("the server speaks {major}.{minor}: want {}.{}", VERSION.0, VERSION.1),
            ));
        }
        connection.server = Capabilities::parse(data).map_err(|error| DeviceError::other(what, error))?;
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
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        channel
            .exchange(command, payload, fds)
            .map_err(|source| DeviceError::Io { what: what.into(), source })
    }

    /// Sends a command and reads the structure that its reply begins with.
    fn ask<T>(
        &self,
        what: &str,
        command: Command,
        request: &[u8],
        parse: Parse<T>,
    ) -> Result<(T, Message), DeviceError> {
        let reply = self.request(what, command, request, Vec::new())?;
        let (answer, _) = parse(reply.payload()).map_err(|error| DeviceError::other(what, error))?;
        Ok((answer, reply))
    }

    pub(super) fn device_info(&self) -> Result<(), DeviceError> {
        let what = "ask for the device";
        let request = DeviceInfo { argsz: argsz(DeviceInfo::SIZE), ..DeviceInfo::default() };
        let (info, _) = self.ask(what, Command::DeviceGetInfo, &request.to_bytes(), DeviceInfo::parse)?;
        if info.num_regions < REGION_COUNT || info.num_irqs <= IRQ_MSIX {
            return Err(DeviceError::other(what, format!("it is no PCI device: {info:?}")));
        }
        Ok(())
    }

    pub(super) fn region(&self, index: u32) -> Result<RegionView, DeviceError> {
        let what = format!("ask for region {index}");
        let argsz = argsz(RegionInfo::SIZE + SparseArea::SIZE);
        let request = RegionInfo { argsz, index, ..RegionInfo::default() };
        let (info, reply) =
            self.ask(&what, Command::DeviceGetRegionInfo, &request.to_bytes(), RegionInfo::parse)?;
        let file = reply.fds.into_iter().next().filter(|_| info.flags & REGION_MMAP != 0);
        Ok(RegionView { size: info.size, file: file.map(|fd| (File::from(fd), info.offset)) })
    }

    pub(super) fn vector_count(&self) -> Result<u32, DeviceError> {
        let what = "ask for the MSI-X vectors";
        let request = IrqInfo { argsz: argsz(IrqInfo::SIZE), index: IRQ_MSIX, ..IrqInfo::default() };
        let (info, _) = self.ask(what, Command::DeviceGetIrqInfo, &request.to_bytes(), IrqInfo::parse)?;
        Ok(info.count)
    }

    pub(super) fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        let what = || format!("read {region:?} at {offset:#x}");
        let mut at = offset;
        for part in data.chunks_mut(self.transfer_size()) {
            let access = region_access(region, at, part.len());
            let reply = self.request(what(), Command::RegionRead, &access.to_bytes(), Vec::new())?;
            let (_, read) =
                RegionAccess::parse(reply.payload()).map_err(|error| DeviceError::other(what(), error))?;
            if read.len() != part.len() {
                return Err(DeviceError::other(
                    what(),
                    format!("got {} bytes: want {}", read.len(), part.len()),
                ));
            }
            part.copy_from_slice(read);
            at += u64::from(access.count);
        }
        Ok(())
    }

    pub(super) fn write(&self, region: Region, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
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

    pub(super) fn map_dma(&self, iova: u64, size: u64, file: OwnedFd) -> Result<(), DeviceError> {
        let map = DmaMap { argsz: argsz(DmaMap::SIZE), flags: DMA_READ | DMA_WRITE, offset: 0, iova, size };
        let what = format!("map {size:#x} bytes at {} for DMA", Iova(iova));
        self.request(what, Command::DmaMap, &map.to_bytes(), vec![file]).map(drop)
    }

    /// Gives the vectors from 0 on their eventfds, as many at a time as the server takes.
    pub(super) fn set_vectors(&self, vectors: &[&Event]) -> Result<(), DeviceError> {
        let mut start = 0;
        for batch in vectors.chunks(self.server.max_msg_fds.clamp(1, FDS_MAX)) {
            let fds = batch.iter().map(|event| event.as_fd().try_clone_to_owned()).collect::<Result<_, _>>();
            let fds = fds.map_err(|source| DeviceError::Io { what: "share eventfds".into(), source })?;
            let count = argsz(batch.len());
            self.set_irqs(start, count, fds)?;
            start += count;
        }
        Ok(())
    }

    /// Takes the eventfds of `count` vectors from `start` on away.
    pub(super) fn clear_vectors(&self, start: u32, count: u32) -> Result<(), DeviceError> {
        if count == 0 { Ok(()) } else { self.set_irqs(start, count, Vec::new()) }
    }

    fn set_irqs(&self, start: u32, count: u32, fds: Vec<OwnedFd>) -> Result<(), DeviceError> {
        let flags = IRQ_DATA_EVENTFD | IRQ_TRIGGER;
        let set = SetIrqs { argsz: argsz(SetIrqs::SIZE), flags, index: IRQ_MSIX, start, count };
        let what = format!("set {count} MSI-X vectors from {start} on");
        self.request(what, Command::DeviceSetIrqs, &set.to_bytes(), fds).map(drop)
    }
}

fn region_access(region: Region, offset: u64, count: usize) -> RegionAccess {
    RegionAccess { offset, region: vfio_region_index(region), count: argsz(count) }
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
        self.socket.send(Message::new(header, payload).bytes, fds).map_err(socket_error)?;
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
        if wait_any(&mut [PollFd::new(&self.socket, interest)], Some(deadline))? > 0 {
            return Ok(());
        }
        let message = format!("no reply within {} s", REPLY_TIMEOUT.as_secs());
        Err(io::Error::new(io::ErrorKind::TimedOut, message))
    }
}

fn socket_error(error: SocketError) -> io::Error {
    match error {
        SocketError::Closed => io::Error::new(io::ErrorKind::UnexpectedEof, error),
        SocketError::Io(errno) => errno.into(),
        error => io::Error::new(io::ErrorKind::InvalidData, error),
    }
}
