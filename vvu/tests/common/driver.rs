//! The block driver: negotiates as QEMU does, then sends requests and awaits their completion.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{Error, VhostBackend};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::ring::{Descriptor, NEXT, Ring, WRITE, readable};
use super::{DEADLINE, SiblingMemory};

/// Bytes of `struct virtio_blk_config` that a driver asks for.
const CONFIG_SIZE: u32 = 60;

/// How a driver connects.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub queues: usize,
    pub queue_size: u16,
    /// Virtio features that the driver does without.
    pub without: u64,
    /// Virtio features that the driver has although they are not offered.
    pub besides: u64,
    /// Ask for an acknowledgement of each message.
    pub acknowledged: bool,
    /// Have requests in flight tracked.
    pub inflight: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self { queues: 1, queue_size: 128, without: 0, besides: 0, acknowledged: true, inflight: false }
    }
}

/// A request that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    pub status: u8,
    /// Bytes that the device says it wrote.
    pub used: u32,
}

/// A connected driver whose rings are set up at the start of the sibling's memory.
pub struct Driver {
    pub frontend: Frontend,
    pub memory: Arc<SiblingMemory>,
    pub rings: Vec<Ring>,
    /// Virtio features of the device, and what of them was taken.
    pub offered: u64,
    pub features: u64,
    /// Protocol features of the device as the front-end gets to see them.
    pub protocol_features: VhostUserProtocolFeatures,
    pub config: Vec<u8>,
    /// The in-flight region, kept from one back-end to the next.
    pub inflight: Option<(VhostUserInflight, File)>,
    setup: Setup,
    stream: UnixStream,
}

/// What `attempt` gives when it succeeds for the first time.
fn persistently(mut attempt: impl FnMut() -> Result<Driver, Error>) -> Driver {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match attempt() {
            Ok(driver) => return driver,
            Err(error) => assert!(Instant::now() < deadline, "no back-end in time: {error}"),
        }
    }
}

impl Driver {
    /// First guest address that no ring of up to `queues` uses.
    pub fn buffers(memory: &SiblingMemory, queues: u64) -> u64 {
        memory.base() + queues * Ring::SPACE
    }

    /// Connects to `socket`, negotiates, and starts all queues.
    pub fn connect(socket: &Path, memory: &Arc<SiblingMemory>, setup: Setup) -> Result<Self, Error> {
        let mut driver = Self::negotiate(socket, memory, setup)?;
        if setup.inflight {
            let queues = u16::try_from(setup.queues).expect("few queues");
            let wanted = VhostUserInflight::new(0, 0, queues, setup.queue_size);
            driver.inflight = Some(driver.frontend.get_inflight_fd(&wanted)?);
        }
        driver.start()?;
        Ok(driver)
    }

    /// Connects as a front-end does whose connection was lost: again and again until a back-end answers.
    pub fn connect_persistently(socket: &Path, memory: &Arc<SiblingMemory>, setup: Setup) -> Self {
        persistently(|| Self::connect(socket, memory, setup))
    }

    /// Leaves and connects again, persistently, with the same rings and the same in-flight region.
    pub fn reconnect(self, socket: &Path) -> Result<Self, Error> {
        let Self { rings, inflight, memory, setup, frontend, stream, .. } = self;
        drop((frontend, stream));
        let mut driver = persistently(|| Self::negotiate_with(socket, &memory, setup, Vec::new()));
        (driver.rings, driver.inflight) = (rings, inflight);
        driver.start()?;
        Ok(driver)
    }

    /// Starts all queues where the used ring is, as QEMU does when the back-end did not tell.
    fn start(&mut self) -> Result<(), Error> {
        if let Some((description, file)) = &self.inflight {
            self.frontend.set_inflight_fd(description, file.as_raw_fd())?;
        }
        self.frontend.set_mem_table(&self.memory.table())?;
        for queue in 0..self.setup.queues {
            self.start_queue_at(queue, self.rings[queue].used_index(&self.memory))?;
        }
        Ok(())
    }

    /// Connects to `socket` and gets as far as the features and the configuration.
    pub fn negotiate(socket: &Path, memory: &Arc<SiblingMemory>, setup: Setup) -> Result<Self, Error> {
        let mut driver = Self::negotiate_with(socket, memory, setup, Vec::new())?;
        driver.renew_rings();
        Ok(driver)
    }

    fn negotiate_with(
        socket: &Path,
        memory: &Arc<SiblingMemory>,
        setup: Setup,
        rings: Vec<Ring>,
    ) -> Result<Self, Error> {
        let stream = UnixStream::connect(socket).map_err(vhost::vhost_user::Error::SocketConnect)?;
        stream.set_read_timeout(Some(DEADLINE)).expect("timeout");
        stream.set_write_timeout(Some(DEADLINE)).expect("timeout");
        let watched = stream.try_clone().expect("descriptor");
        let mut frontend = Frontend::from_stream(stream, setup.queues as u64);

        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        let protocol_features = frontend.get_protocol_features()?;
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        let tracking = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        let wanted = if setup.inflight { wanted | tracking } else { wanted };
        frontend.set_protocol_features(protocol_features & wanted)?;
        if setup.acknowledged {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let queues = frontend.get_queue_num()?;
        assert!(setup.queues as u64 <= queues, "want {} queues, got {queues}", setup.queues);
        let space = vec![0; CONFIG_SIZE as usize];
        let (_, config) = frontend.get_config(0, CONFIG_SIZE, VhostUserConfigFlags::empty(), &space)?;

        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = offered & !setup.without | setup.besides | protocol;
        frontend.set_features(features)?;
        let memory = memory.clone();
        let (stream, inflight) = (watched, None);
        Ok(Self {
            frontend,
            memory,
            rings,
            offered,
            features,
            protocol_features,
            config,
            inflight,
            setup,
            stream,
        })
    }

    /// Lays all rings out anew, as a driver does that has just been loaded.
    pub fn renew_rings(&mut self) {
        let event_idx = self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let ring = |index| {
            let base = self.memory.base() + index as u64 * Ring::SPACE;
            Ring::new(&self.memory, base, self.setup.queue_size, event_idx)
        };
        self.rings = (0..self.setup.queues).map(ring).collect();
    }

    /// Tells the device about a queue and starts it where the driver is.
    pub fn start_queue(&mut self, queue: usize) -> Result<(), Error> {
        self.start_queue_at(queue, self.rings[queue].next_avail())
    }

    /// Tells the device about a queue and starts it at an available index.
    pub fn start_queue_at(&mut self, queue: usize, base: u16) -> Result<(), Error> {
        let ring = &self.rings[queue];
        self.frontend.set_vring_num(queue, ring.size())?;
        self.frontend.set_vring_base(queue, base)?;
        self.frontend.set_vring_addr(queue, &ring.config(&self.memory))?;
        self.frontend.set_vring_call(queue, &ring.call)?;
        self.frontend.set_vring_kick(queue, &ring.kick)?;
        self.frontend.set_vring_enable(queue, true)
    }

    /// Makes a request available and kicks. `data` are guest addresses and lengths.
    pub fn submit(&mut self, queue: usize, kind: u32, sector: u64, data: &[(u64, u32)]) -> u16 {
        let head = self.prepare(queue, kind, sector, data);
        self.rings[queue].kick();
        head
    }

    /// Makes a request available without a kick.
    pub fn prepare(&mut self, queue: usize, kind: u32, sector: u64, data: &[(u64, u32)]) -> u16 {
        let device_writes = matches!(kind, VIRTIO_BLK_T_IN | VIRTIO_BLK_T_GET_ID);
        let ring = &mut self.rings[queue];
        let indices: Vec<u16> = (0..data.len() + 2).map(|_| ring.allocate()).collect();
        let head = indices[0];
        let header = Self::header(&self.memory, queue, head);
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        bytes.push(0xff);
        self.memory.write(header, &bytes);

        let mut parts = vec![(header, 16, 0)];
        parts.extend(data.iter().map(|(addr, len)| (*addr, *len, if device_writes { WRITE } else { 0 })));
        parts.push((header + 16, 1, WRITE));
        for (position, (addr, len, flags)) in parts.into_iter().enumerate() {
            let next = indices.get(position + 1).copied();
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            let descriptor = Descriptor { addr, len, flags, next: next.unwrap_or(0) };
            ring.store(&self.memory, indices[position], descriptor);
        }
        ring.push(&self.memory, head);
        head
    }

    /// Guest address of the header of the request at `head`; its status is behind it.
    pub fn header(memory: &SiblingMemory, queue: usize, head: u16) -> u64 {
        assert!(head < 1024, "headers have eight pages");
        memory.base() + queue as u64 * Ring::SPACE + Ring::END + u64::from(head) * 32
    }

    /// Awaits the next completion of a queue. Its descriptors are not used again.
    pub fn wait(&mut self, queue: usize) -> Result<(u16, Completion), String> {
        let (head, used) = self.rings[queue].wait(&self.memory)?;
        let status = self.memory.read(Self::header(&self.memory, queue, head) + 16, 1)[0];
        Ok((head, Completion { status, used }))
    }

    /// Sends one request and awaits it.
    ///
    /// # Panics
    /// When it does not come back in time, or another one does.
    pub fn request(&mut self, queue: usize, kind: u32, sector: u64, data: &[(u64, u32)]) -> Completion {
        let free = self.rings[queue].snapshot();
        let head = self.submit(queue, kind, sector, data);
        let completion = self.wait(queue);
        let (got, completion) =
            completion.unwrap_or_else(|error| panic!("request {kind} at sector {sector}: {error}"));
        assert_eq!(got, head, "the request that was sent comes back");
        self.rings[queue].restore(free);
        completion
    }

    /// Reads `len` bytes at `sector` by way of guest memory at `gpa`.
    pub fn read(&mut self, queue: usize, sector: u64, gpa: u64, len: u32) -> Vec<u8> {
        let got = self.request(queue, VIRTIO_BLK_T_IN, sector, &[(gpa, len)]);
        assert_eq!(got, Completion { status: 0, used: len + 1 }, "read of {len} bytes at sector {sector}");
        self.memory.read(gpa, len as usize)
    }

    /// Writes `data` at `sector` by way of guest memory at `gpa`.
    pub fn write(&mut self, queue: usize, sector: u64, gpa: u64, data: &[u8]) {
        self.memory.write(gpa, data);
        let len = u32::try_from(data.len()).expect("length");
        let got = self.request(queue, VIRTIO_BLK_T_OUT, sector, &[(gpa, len)]);
        assert_eq!(got, Completion { status: 0, used: 1 }, "write of {len} bytes at sector {sector}");
    }

    pub fn flush(&mut self, queue: usize) {
        let got = self.request(queue, VIRTIO_BLK_T_FLUSH, 0, &[]);
        assert_eq!(got, Completion { status: 0, used: 1 }, "flush");
    }

    /// The serial number, without its padding.
    pub fn id(&mut self, queue: usize, gpa: u64) -> String {
        let got = self.request(queue, VIRTIO_BLK_T_GET_ID, 0, &[(gpa, 20)]);
        assert_eq!(got, Completion { status: 0, used: 21 }, "get id");
        let bytes = self.memory.read(gpa, 20);
        String::from_utf8(bytes).expect("ASCII").trim_end_matches('\0').to_owned()
    }

    /// Awaits that the device hangs up.
    ///
    /// # Panics
    /// When it does not.
    pub fn wait_disconnected(&self) {
        assert!(readable(&self.stream, DEADLINE), "the connection did not end within {DEADLINE:?}");
        let mut byte = [0];
        let got = (&self.stream).read(&mut byte);
        assert!(matches!(got, Ok(0) | Err(_)), "want the end of the connection, got a message");
    }
}

/// A field of the configuration.
pub fn config_u64(config: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(config[offset..offset + 8].try_into().expect("eight bytes"))
}

/// A field of the configuration.
pub fn config_u16(config: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(config[offset..offset + 2].try_into().expect("two bytes"))
}
