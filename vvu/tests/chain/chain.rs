//! Starts and ends the parts of the chain.

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;

use vvu::StopToken;
use vvu::bridge::{BackendSocket, Bridge, BridgeError, Options, Retry};
use vvu::device::{DeviceConfig, VvuDevice};
use vvu::driver::Driver as GuestDriver;
use vvu::listening_socket::ListeningSocket;
use vvu::vfio_user::client::VfioUserDevice;
use vvu::vfio_user::server::{Server, ServerError};

use crate::common::{Backend, DEADLINE, Driver, Piece, Setup, SiblingMemory, Task, Vmm};
use crate::logs;

/// The vvu proxy, as `vvu proxy` runs it.
pub struct Proxy {
    dir: tempfile::TempDir,
    memory: File,
    stop: StopToken,
    task: Task<Result<(), ServerError>>,
}

impl Proxy {
    /// Starts a proxy for a sibling with `ram` bytes of memory.
    pub fn start(ram: u64, queues: u16) -> Self {
        Self::start_with(ram, queues, |_| {})
    }

    /// As [`start`](Self::start), with changes to the vvu device.
    pub fn start_with(ram: u64, queues: u16, adjust: impl FnOnce(&mut VvuDevice)) -> Self {
        logs::collect();
        let ram = vvu::device::SiblingMemory::create(ram).expect("memory file");
        let memory = ram.file().try_clone().expect("descriptor");
        let dir = tempfile::tempdir().expect("directory");
        let vhost_user = ListeningSocket::bind(&dir.path().join("vhost-user")).expect("socket");
        let vfio_user = ListeningSocket::bind(&dir.path().join("vfio-user")).expect("socket");
        let listener = vhost_user.listener().try_clone().expect("descriptor");
        let config = DeviceConfig { memory: ram, listener, queues, uuid: [7; 16] };
        let mut device = VvuDevice::new(config).expect("device");
        let express = ListeningSocket::bind(&dir.path().join("express")).expect("socket");
        device.serve_express(express.listener().try_clone().expect("descriptor")).expect("express");
        adjust(&mut device);
        let stop = StopToken::new().expect("token");
        let listener = vfio_user.listener().try_clone().expect("descriptor");
        let server = Server::new(listener, stop.clone(), &device).expect("server");
        let task = Task::spawn("proxy", move || {
            let _sockets = (vhost_user, vfio_user, express);
            server.serve(&mut device)
        });
        Self { dir, memory, stop, task }
    }

    /// Sibling memory as the guest sees it.
    pub fn memory(&self, pieces: &[Piece]) -> SiblingMemory {
        SiblingMemory::of(self.memory.try_clone().expect("descriptor"), pieces)
    }

    /// Where the sibling's front-end connects.
    pub fn vhost_user(&self) -> PathBuf {
        self.dir.path().join("vhost-user")
    }

    /// Where the device VM's VMM connects.
    pub fn vfio_user(&self) -> PathBuf {
        self.dir.path().join("vfio-user")
    }

    /// Connects a VMM with an express device.
    pub fn express(&self) -> Vmm {
        Vmm::connect(&self.dir.path().join("express"))
    }

    pub fn end(self) {
        self.stop.stop();
        self.task.join().expect("proxy");
    }
}

/// The guest driver and the bridge, as they run in the device VM.
pub struct Guest {
    stop: StopToken,
    connection: UnixStream,
    task: Task<Result<(), BridgeError>>,
}

impl Guest {
    /// Returns once a front-end can connect.
    pub fn start(proxy: &Proxy, backend: &Path, retry: Retry) -> Self {
        Self::start_with(proxy, backend, retry, None)
    }

    /// As [`start`](Self::start), in a VM whose VMM has an express device, or none.
    pub fn start_with(proxy: &Proxy, backend: &Path, retry: Retry, vmm: Option<&Vmm>) -> Self {
        let express = vmm.map(Vmm::device);
        let stream = UnixStream::connect(proxy.vfio_user()).expect("proxy");
        let connection = stream.try_clone().expect("descriptor");
        let stop = StopToken::new().expect("token");
        let stopped = stop.clone();
        let socket = backend.to_owned();
        let (sender, ready) = channel();
        let task = Task::spawn("bridge", move || {
            let device = VfioUserDevice::from_stream(stream).expect("vfio-user");
            let mut driver = GuestDriver::new(device).expect("vvu device");
            if let Some(express) = express {
                driver.use_express(express).expect("express device");
            }
            let mut bridge = Bridge::new(driver, Options { backend: BackendSocket::Connect(socket), retry });
            bridge.run(&[stopped.as_fd()], || sender.send(()).expect("test"))
        });
        if let Err(error) = ready.recv_timeout(DEADLINE) {
            panic!("waiting for the bridge to be ready: {error}");
        }
        Self { stop, connection, task }
    }

    /// Asks the bridge to end, and waits until it has.
    pub fn end(self) {
        self.stop.stop();
        self.task.join().expect("bridge");
    }

    /// Cuts the connection to the proxy, as when the device VM is killed: the device gets no order
    /// any more, not even to reset.
    pub fn kill(self) {
        self.connection.shutdown(Shutdown::Both).expect("shutdown");
        self.stop.stop();
        // What becomes of the bridge in a dead VM does not matter.
        let _ = self.task.join();
    }

    /// What the bridge came to by itself.
    pub fn outcome(self) -> Result<(), BridgeError> {
        self.task.join()
    }
}

/// Everything between the sibling's front-end and the disk.
pub struct Chain {
    pub memory: Arc<SiblingMemory>,
    pub proxy: Proxy,
    pub guest: Guest,
    pub backend: Backend,
    pub vmm: Option<Vmm>,
}

/// Memory of a small sibling.
pub const FLAT: [Piece; 1] = [Piece { gpa: 0, size: 8 << 20, offset: 0 }];

impl Chain {
    /// Starts a chain for a sibling with the memory `pieces` and a disk with `content`.
    pub fn start(pieces: &[Piece], content: &[u8]) -> Self {
        let end = pieces.iter().map(|piece| piece.offset + piece.size as u64).max();
        Self::with_ram(end.expect("memory"), pieces, content)
    }

    /// As [`start`](Self::start), with room for more memory than the guest sees at first.
    pub fn with_ram(ram: u64, pieces: &[Piece], content: &[u8]) -> Self {
        let proxy = Proxy::start(ram, 16);
        Self::of(proxy, pieces, content, None)
    }

    /// As [`start`](Self::start), in a device VM with an express device.
    pub fn express(content: &[u8]) -> Self {
        Self::express_with(content, |_| {})
    }

    /// As [`express`](Self::express), with changes to the vvu device.
    pub fn express_with(content: &[u8], adjust: impl FnOnce(&mut VvuDevice)) -> Self {
        let proxy = Proxy::start_with(FLAT[0].size as u64, 16, adjust);
        let vmm = proxy.express();
        Self::of(proxy, &FLAT, content, Some(vmm))
    }

    fn of(proxy: Proxy, pieces: &[Piece], content: &[u8], vmm: Option<Vmm>) -> Self {
        let memory = Arc::new(proxy.memory(pieces));
        let backend = Backend::start(content, |_| {});
        let guest = Guest::start_with(&proxy, &backend.socket, Retry::Forever, vmm.as_ref());
        Self { memory, proxy, guest, backend, vmm }
    }

    /// The VMM that has the express device.
    pub fn vmm(&self) -> &Vmm {
        self.vmm.as_ref().expect("an express device")
    }

    pub fn connect(&self, setup: Setup) -> Driver {
        Driver::connect_persistently(&self.proxy.vhost_user(), &self.memory, setup)
    }

    /// Ends every part; none may have come to grief before.
    pub fn end(self) {
        self.guest.end();
        self.backend.end();
        self.proxy.end();
    }
}
