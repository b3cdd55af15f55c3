//! Feeds a vfio-user server the commands of a hostile client, with and without the file descriptors that
//! belong to them.

#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vvu::device::{DeviceConfig, SiblingMemory, VvuDevice};
use vvu::vfio_user::protocol::{Capabilities, Command, Header, Version};
use vvu::StopToken;
use vvu::vfio_user::protocol::socket::{Message, MessageSocket};
use vvu::vfio_user::server::Server;
use vvu_fuzz::{Input, fds};

fuzz_target!(|data: &[u8]| run(Input(data)));

/// The socket of a server that serves for as long as the process runs.
static SERVER: LazyLock<PathBuf> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("directory").keep();
    let listener = UnixListener::bind(dir.join("sibling")).expect("bind");
    let memory = SiblingMemory::create(0x10000).expect("memory");
    let config = DeviceConfig { memory, listener, queues: 16, uuid: [7; 16] };
    let mut device = VvuDevice::new(config).expect("device");
    let listener = UnixListener::bind(dir.join("vmm")).expect("bind");
    let stop = StopToken::new().expect("token");
    let server = Server::new(listener, stop).expect("server");
    std::thread::spawn(move || {
        let ended = server.serve(&mut device);
        panic!("a client ended the server: {ended:?}");
    });
    dir.join("vmm")
});

fn run(mut input: Input<'_>) {
    let stream = connect(&SERVER);
    let mut client = MessageSocket::new(stream.try_clone().expect("dup"));
    // One file for all maps, as with a VMM.
    let memory = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("memfd");
    ftruncate(&memory, 0x10000).expect("size");
    let own = || -> OwnedFd { memory.try_clone().expect("dup") };
    if input.below(16) != 0 {
        send(&mut client, version(), Vec::new());
    }
    let mut id = 0;
    while !input.is_empty() {
        id += 1;
        match input.below(8) {
            0 => {
                let (pattern, bytes) = (input.u8(), input.block().to_vec());
                if !bytes.is_empty() {
                    send(&mut client, bytes, fds(pattern, &own));
                }
            }
            kind => {
                let (pattern, payload) = (input.u8(), input.block());
                let command = COMMANDS[usize::from(input.u8()) % COMMANDS.len()];
                let mut header = Header::command(id, command, payload.len());
                // Most commands want no reply, so that the socket does not fill up.
                header.flags |= if kind < 6 { 1 << 4 } else { 0 };
                send(&mut client, Message::new(header, payload).bytes, fds(pattern, &own));
            }
        }
    }
    stream.shutdown(Shutdown::Write).expect("shutdown");
    // The server hangs up after the last message or earlier.
    let mut stream = stream;
    stream.set_nonblocking(false).expect("blocking");
    let _ = stream.read_to_end(&mut Vec::new());
    // The server serves the next client.
    let mut next = connect(&SERVER);
    next.write_all(&version()).expect("write");
    let mut reply = [0; 16];
    next.read_exact(&mut reply).expect("a reply");
    let (header, _) = Header::parse(&reply).expect("header");
    assert_eq!(header.refusal(), None);
}

const COMMANDS: [Command; 9] = [
    Command::DmaMap,
    Command::DmaUnmap,
    Command::DeviceGetInfo,
    Command::DeviceGetRegionInfo,
    Command::DeviceGetIrqInfo,
    Command::DeviceSetIrqs,
    Command::RegionRead,
    Command::RegionWrite,
    Command::DeviceReset,
];

fn connect(path: &Path) -> UnixStream {
    UnixStream::connect(path).expect("connect")
}

fn version() -> Vec<u8> {
    let version = Version { major: 0, minor: 0 };
    let payload = [&version.to_bytes()[..], &Capabilities::OURS.to_bytes()].concat();
    Message::new(Header::command(0, Command::Version, payload.len()), &payload).bytes
}

/// Sends a message, unless the server has hung up or does not read at the moment.
fn send(client: &mut MessageSocket, bytes: Vec<u8>, fds: Vec<OwnedFd>) {
    if !client.is_congested() {
        let _ = client.send(bytes, fds);
    }
}
