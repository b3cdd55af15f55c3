//! The server as a whole: a device behind it, the crate's own client, the crate's own driver and
//! clients that break the rules in front of it.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::event::{Event, StopToken, wait_readable};
use tempfile::TempDir;
use vm_memory::Bytes;

use super::*;
use crate::device::{DeviceConfig, SiblingMemory, VvuDevice};
use crate::driver::{Driver, Incoming};
use crate::pci::{DeviceError, PciDevice};
use crate::spec::pci::{self, Region};
use crate::spec::vhost_user;
use crate::vfio_user::client::VfioUserDevice;
use crate::vfio_user::protocol::socket::{Message, MessageSocket};
use crate::vfio_user::protocol::{
    Capabilities, Command, DeviceInfo, FDS_MAX, Header, MESSAGE_SIZE_MAX, RegionAccess, SetIrqs, Version,
};

const MEMORY: u64 = 3 << 20;
/// Bounds every wait, so that a failure ends.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server in a thread, stopped when it is dropped.
struct Rig {
    dir: TempDir,
    stop: StopToken,
    server: Option<JoinHandle<Result<(), ServerError>>>,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let memory = SiblingMemory::create(MEMORY).expect("memfd");
        let listener = UnixListener::bind(dir.path().join("sibling")).expect("bind");
        let config = DeviceConfig { memory, listener, queues: 16, uuid: [7; 16] };
        let mut device = VvuDevice::new(config).expect("device");
        let listener = UnixListener::bind(dir.path().join("vmm")).expect("bind");
        let stop = StopToken::new().expect("token");
        let server = Server::new(listener, stop.clone(), &device).expect("server");
        let server = Some(std::thread::spawn(move || server.serve(&mut device)));
        Self { dir, stop, server }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("vmm")
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
        stream
    }

    /// A client past the version exchange.
    fn client(&self) -> UnixStream {
        let mut stream = self.connect();
        stream.write_all(&version()).expect("write");
        assert_eq!(reply(&mut stream).0.refusal(), None);
        stream
    }

    fn device(&self) -> VfioUserDevice {
        VfioUserDevice::connect(&self.socket()).expect("device")
    }

    fn frontend(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("sibling")).expect("connect")
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.stop();
        let result = self.server.take().expect("a server").join().expect("the server must not panic");
        assert!(result.is_ok(), "{result:?}");
    }
}

fn message(command: Command, payload: &[u8]) -> Vec<u8> {
    [&Header::command(9, command, payload.len()).to_bytes()[..], payload].concat()
}

fn version() -> Vec<u8> {
    let version = Version { major: 0, minor: 0 };
    message(Command::Version, &[&version.to_bytes()[..], &Capabilities::OURS.to_bytes()].concat())
}

fn read_config(offset: u64, count: u32) -> Vec<u8> {
    message(Command::RegionRead, &RegionAccess { offset, region: 7, count }.to_bytes())
}

fn reply(stream: &mut UnixStream) -> (Header, Vec<u8>) {
    let mut header = [0; 16];
    stream.read_exact(&mut header).expect("header");
    let (header, _) = Header::parse(&header).expect("header");
    let mut payload = vec![0; header.payload_size()];
    stream.read_exact(&mut payload).expect("payload");
    (header, payload)
}

fn event() -> Event {
    Event::new().expect("event")
}

fn wait(event: &Event) {
    let deadline = Instant::now() + PATIENCE;
    assert_eq!(wait_readable(&[event.as_fd()], Some(deadline)).expect("wait"), Some(0), "no signal came");
    event.drain();
}

/// Whether the server hangs up, perhaps after replies.
fn is_dropped(mut stream: UnixStream) -> bool {
    match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => true,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn the_client_sees_the_device() {
    let rig = Rig::new();
    let device = rig.device();
    let sizes = [0, 1, 2, 3, 5].map(|bar| device.region_size(Region::Bar(bar)));
    assert_eq!(sizes, [0x8000, 0, 0x4000, 0, 0]);
    assert_eq!(device.region_size(Region::Config), 256);
    let mut ids = [0; 4];
    device.read(Region::Config, 0, &mut ids).expect("read");
    assert_eq!(ids, [0xf4, 0x1a, 0x7d, 0x10]);
    let outside = device.read(Region::Config, 254, &mut ids);
    assert!(matches!(outside, Err(DeviceError::OutOfRange { size: 256, .. })));
    assert!(device.enable_msix(&[&event(); 20]).is_err());
}

#[test]
fn the_shared_memory_bar_is_the_sibling_memory_file() {
    let rig = Rig::new();
    let device = rig.device();
    let file = device.bar_file(pci::SHARED_MEMORY_BAR).expect("file").file;
    let size = file.metadata().expect("metadata").len();
    assert!(size >= MEMORY);
    assert_eq!(device.region_size(Region::Bar(pci::SHARED_MEMORY_BAR)), size.next_power_of_two());
    device.write(Region::Bar(pci::SHARED_MEMORY_BAR), 0x1234, b"through the BAR").expect("write");
    let mut bytes = [0; 15];
    rustix::io::pread(&file, &mut bytes, 0x1234).expect("pread");
    assert_eq!(&bytes, b"through the BAR");
    // More than goes into one message.
    let mut all = vec![1; 3 << 20];
    device.read(Region::Bar(pci::SHARED_MEMORY_BAR), 0, &mut all).expect("read");
    assert_eq!((&all[0x1234..0x1243], all[0], all.last()), (&bytes[..], 0, Some(&0)));
    for bar in [0, 1, 2, 7] {
        assert!(device.bar_file(bar).is_err());
    }
}

/// Brings the device up and lets a front-end in, up to the interrupt that says so.
fn driver_with_frontend(rig: &Rig, device: VfioUserDevice) -> (Driver<VfioUserDevice>, UnixStream) {
    let driver = Driver::new(device).expect("bring-up");
    driver.set_backend_up(true).expect("backend up");
    let frontend = rig.frontend();
    wait(driver.rx_event());
    assert!(driver.link().expect("link").frontend_up);
    (driver, frontend)
}

#[test]
fn a_driver_exchanges_messages_with_a_front_end() {
    let rig = Rig::new();
    let (mut driver, mut frontend) = driver_with_frontend(&rig, rig.device());
    let header = vhost_user::Header { request: 1, flags: 1, size: 0 };
    frontend.write_all(&header.to_bytes()).expect("write");
    let received = loop {
        if let Some(incoming) = driver.receive().expect("receive") {
            break incoming;
        }
        wait(driver.rx_event());
    };
    assert!(matches!(received, Incoming::Message(message) if message.header.request == 1));
    // The next client finds the device reset.
    drop(driver);
    let device = rig.device();
    let mut status = [0xff];
    device.read(Region::Bar(0), 20, &mut status).expect("read");
    assert_eq!(status, [0]);
}

#[test]
fn an_unfinished_message_does_not_hold_up_the_front_end() {
    let rig = Rig::new();
    let stream = rig.connect();
    let mut aside = stream.try_clone().expect("dup");
    let driver = Driver::new(VfioUserDevice::from_stream(stream).expect("device")).expect("bring-up");
    driver.set_backend_up(true).expect("backend up");
    let read = read_config(0, 4);
    aside.write_all(&read[..9]).expect("write");
    let _frontend = rig.frontend();
    wait(driver.rx_event());
    aside.write_all(&read[9..]).expect("write");
    assert_eq!(reply(&mut aside).1[16..], [0xf4, 0x1a, 0x7d, 0x10]);
}

#[test]
fn doorbells_reach_the_front_end() {
    let rig = Rig::new();
    let (mut driver, frontend) = driver_with_frontend(&rig, rig.device());
    let call = event();
    let mut frontend = crate::message_socket::MessageSocket::new(frontend);
    let header = vhost_user::Header { request: 13, flags: 1, size: 8 };
    let message = crate::message_socket::Message::new(header, &3u64.to_le_bytes());
    let fd = call.as_fd().try_clone_to_owned().expect("dup");
    frontend.send(message.bytes, vec![fd]).expect("send");
    while driver.receive().expect("receive").is_none() {
        wait(driver.rx_event());
    }
    driver.call(crate::spec::addr::QueueIndex(3)).expect("call").signal();
    wait(&call);
}

#[test]
fn messages_may_come_byte_by_byte_and_all_at_once() {
    let rig = Rig::new();
    let mut stream = rig.connect();
    for byte in [version(), read_config(0, 2)].concat() {
        stream.write_all(&[byte]).expect("write");
    }
    assert_eq!(reply(&mut stream).0.refusal(), None);
    assert_eq!(reply(&mut stream).1[16..], [0xf4, 0x1a]);
    let burst = [read_config(0, 1), read_config(1, 1), read_config(2, 1)].concat();
    stream.write_all(&burst).expect("write");
    let bytes: Vec<_> = (0..3).map(|_| reply(&mut stream).1[16]).collect();
    assert_eq!(bytes, [0xf4, 0x1a, 0x7d]);
}

#[test]
fn refused_commands_leave_the_stream_in_step() {
    let rig = Rig::new();
    let mut stream = rig.client();
    let number = |number: u16, payload: usize| {
        let header = Header { command: number, ..Header::command(5, Command::Version, payload) };
        [&header.to_bytes()[..], &vec![0xee; payload]].concat()
    };
    for (bytes, errno) in [
        (number(6, 16), 95),
        (number(15, 4000), 95),
        (number(0xffff, 1 << 20), 95),
        (version(), 22),
        (message(Command::DmaMap, &[0; 31]), 22),
        (message(Command::DeviceGetInfo, &DeviceInfo { argsz: 15, ..DeviceInfo::default() }.to_bytes()), 22),
        (read_config(256, 1), 22),
        (read_config(u64::MAX, 2), 22),
        (message(Command::RegionRead, &RegionAccess { offset: 0, region: 6, count: 1 }.to_bytes()), 22),
        (message(Command::RegionRead, &RegionAccess { offset: 0, region: 4, count: 1 << 21 }.to_bytes()), 22),
        (message(Command::RegionWrite, &RegionAccess { offset: 0, region: 7, count: 1 }.to_bytes()), 22),
    ] {
        stream.write_all(&bytes).expect("write");
        let (header, payload) = reply(&mut stream);
        assert_eq!((header.refusal(), payload.len()), (Some(errno), 0), "{:?}", &bytes[..16]);
    }
    stream.write_all(&read_config(0, 2)).expect("write");
    assert_eq!(reply(&mut stream).1[16..], [0xf4, 0x1a]);
}

#[test]
fn no_reply_means_none() {
    let rig = Rig::new();
    let mut stream = rig.client();
    let silent = |bytes: Vec<u8>| {
        let mut bytes = bytes;
        bytes[8] |= 0x10;
        bytes
    };
    // One that succeeds, one that fails, and one to be answered.
    let write = [&RegionAccess { offset: 4, region: 7, count: 2 }.to_bytes()[..], &[6, 0]].concat();
    let burst =
        [silent(message(Command::RegionWrite, &write)), silent(read_config(999, 1)), read_config(4, 2)];
    stream.write_all(&burst.concat()).expect("write");
    let (header, payload) = reply(&mut stream);
    assert_eq!((header.command, &payload[16..]), (Command::RegionRead.number(), &[6, 0][..]));
}

#[test]
fn the_version_comes_first_and_fits() {
    let rig = Rig::new();
    let mut stream = rig.connect();
    let other_major = message(Command::Version, &[1, 0, 0, 0]);
    let no_json = message(Command::Version, b"\0\0\0\0{\0");
    for early in [read_config(0, 1), other_major, no_json, message(Command::Version, &[0, 0])] {
        stream.write_all(&early).expect("write");
        assert_eq!(reply(&mut stream).0.refusal(), Some(22));
    }
    // The version data is optional, and the reply says 0.0 to any minor version.
    stream.write_all(&message(Command::Version, &[0, 0, 1, 0])).expect("write");
    let (header, payload) = reply(&mut stream);
    assert_eq!((header.refusal(), &payload[..4]), (None, &[0; 4][..]));
    assert_eq!(Capabilities::parse(&payload[4..]), Ok(Capabilities::OURS));
}

#[test]
fn clients_that_break_the_framing_are_dropped_and_the_next_is_served() {
    let rig = Rig::new();
    let bound = u32::try_from(MESSAGE_SIZE_MAX).expect("small");
    let header = Header::command(1, Command::RegionRead, 0);
    for broken in [
        Header { size: 15, ..header },
        Header { size: 0, ..header },
        Header { size: bound + 1, ..header },
        Header { size: u32::MAX, ..header },
        Header { flags: 2, ..header },
        header.reply(0),
    ] {
        let mut stream = rig.client();
        stream.write_all(&broken.to_bytes()).expect("write");
        assert!(is_dropped(stream), "{broken:?}");
    }
    // One that leaves in the middle of a message.
    rig.client().write_all(&read_config(0, 1)[..20]).expect("write");
    rig.device();
}

#[test]
fn more_fds_than_a_message_may_have_end_the_connection() {
    let rig = Rig::new();
    for (fds, dropped) in [(FDS_MAX, false), (FDS_MAX + 1, true), (253, true)] {
        let stream = rig.client();
        let sent: Vec<_> = (0..fds).map(|_| rig.stop.as_fd()).collect();
        let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&sent)));
        let bytes = read_config(0, 1);
        let parts = [std::io::IoSlice::new(&bytes)];
        let flags = rustix::net::SendFlags::empty();
        rustix::net::sendmsg(&stream, &parts, &mut control, flags).expect("send");
        if dropped {
            assert!(is_dropped(stream), "{fds}");
        } else {
            assert_eq!(reply(&mut stream.try_clone().expect("dup")).0.refusal(), None);
        }
    }
}

#[test]
fn a_second_client_waits_for_the_first_to_leave() {
    let rig = Rig::new();
    let mut first = rig.client();
    let mut second = rig.connect();
    second.write_all(&version()).expect("write");
    first.write_all(&read_config(0, 1)).expect("write");
    reply(&mut first);
    assert_eq!(wait_readable(&[second.as_fd()], Some(Instant::now())).expect("look"), None);
    drop(first);
    assert_eq!(reply(&mut second).0.refusal(), None);
}

#[test]
fn what_a_client_lent_is_let_go_when_it_leaves() {
    let rig = Rig::new();
    let client = rig.client();
    // Any descriptor will do for an interrupt; this one tells when its other holders are gone.
    let (mut watch, lent) = UnixStream::pair().expect("socketpair");
    watch.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let mut socket = MessageSocket::new(client);
    let set = SetIrqs { argsz: 20, flags: 0x24, index: 2, start: 0, count: 1 };
    let header = Header::command(1, Command::DeviceSetIrqs, SetIrqs::SIZE);
    socket.send(Message::new(header, &set.to_bytes()).bytes, vec![lent.into()]).expect("send");
    drop(socket);
    assert_eq!(watch.read(&mut [0]).expect("end of file"), 0);
}

#[test]
fn a_client_that_reads_no_replies_does_not_hold_up_the_front_end() {
    let rig = Rig::new();
    let stream = rig.connect();
    let mut aside = stream.try_clone().expect("dup");
    let driver = Driver::new(VfioUserDevice::from_stream(stream).expect("device")).expect("bring-up");
    driver.set_backend_up(true).expect("backend up");
    // Each command asks for a megabyte. Once the replies go out no longer, the commands go in no longer.
    aside.set_nonblocking(true).expect("nonblocking");
    let access = RegionAccess { offset: 0, region: 4, count: 1 << 20 };
    let read = message(Command::RegionRead, &access.to_bytes());
    let refused = loop {
        if let Err(error) = aside.write_all(&read) {
            break error;
        }
    };
    assert_eq!(refused.kind(), std::io::ErrorKind::WouldBlock);
    let _frontend = rig.frontend();
    wait(driver.rx_event());
    aside.shutdown(std::net::Shutdown::Both).expect("shutdown");
    drop(driver);
    rig.device();
}

#[test]
fn a_dma_buffer_starts_zeroed_at_an_address_of_its_own() {
    let rig = Rig::new();
    let device = rig.device();
    let buffers: Vec<_> =
        (0..20).map(|pages| device.allocate_dma(pages * 4096 + 1).expect("buffer")).collect();
    for (buffer, next) in buffers.iter().zip(&buffers[1..]) {
        assert!(buffer.iova.0 + buffer.memory.size() as u64 <= next.iova.0);
    }
    let last = buffers.last().expect("buffers");
    assert_eq!(last.memory.size(), 20 * 4096);
    let zero: u64 = vm_memory::VolatileMemory::as_volatile_slice(&last.memory).read_obj(4096).expect("read");
    assert_eq!(zero, 0);
}

#[test]
fn a_server_that_does_not_speak_the_protocol_is_refused() {
    let (ours, mut theirs) = UnixStream::pair().expect("socketpair");
    let version = Header::command(1, Command::Version, 0);
    let other = Version { major: 0, minor: 1 }.to_bytes();
    let bytes = [&version.reply(4).to_bytes()[..], &other].concat();
    theirs.write_all(&bytes).expect("write");
    let error = VfioUserDevice::from_stream(ours).expect_err("another version");
    assert!(error.to_string().contains("0.1: want 0.0"), "{error}");

    let (ours, mut theirs) = UnixStream::pair().expect("socketpair");
    theirs.write_all(&Header { id: 77, ..version.reply(0) }.to_bytes()).expect("write");
    assert!(VfioUserDevice::from_stream(ours).is_err());

    let (ours, theirs) = UnixStream::pair().expect("socketpair");
    drop(theirs);
    assert!(VfioUserDevice::from_stream(ours).is_err());
}
