//! Feeds a device the messages of a hostile front-end, with and without the file descriptors that belong to them, and
//! those of a hostile back-end behind the guest driver, which is up. A VMM of the express device comes and goes.

#![no_main]

use std::cell::RefCell;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vvu::device::LinkState;
use vvu::device::rig::{BAR2, BUFFER, Rig};
use vvu::message_socket::Message;
use vvu::pci::PciFunction;
use vvu::spec::pci::VECTOR_SELECT_CFG;
use vvu::spec::vhost_user::Header;
use vvu::spec::virtio::feature;
use vvu_fuzz::{Fd, Pool, drain, message, send};

/// Most commands in one execution.
const COMMANDS: usize = 24;
/// `SET_BACKEND_REQ_FD`.
const SET_CHANNEL: u32 = 21;

#[derive(Arbitrary, Debug)]
enum Command {
    /// The front-end sends a message as QEMU does, with one byte changed.
    Sound { message: u8, queue: u8, needs_reply: bool, at: u8, change: u8 },
    /// The front-end sends a message whose header has the right size.
    Message { request: u8, flags: u8, fds: Vec<Fd>, payload: Vec<u8> },
    /// The front-end sends anything.
    Bytes { fds: Vec<Fd>, bytes: Vec<u8> },
    /// The front-end sets the channel for requests of the back-end.
    SetChannel { needs_reply: bool },
    /// The front-end answers on that channel.
    Answer { request: u8, flags: u8, fds: Vec<Fd>, payload: Vec<u8> },
    /// The front-end sends anything on that channel.
    ChannelBytes(Vec<u8>),
    /// The front-end closes that channel.
    CloseChannel,
    /// The front-end leaves and another connects.
    Reconnect,
    /// The front-end reads what it got, on its socket or on the channel.
    Read { channel: bool },
    /// The front-end signals one of its eventfds.
    Signal(bool),
    /// The back-end replies to the last message.
    Reply(Vec<u8>),
    /// The back-end sends a request.
    BackendRequest { request: u8, flags: u8, payload: Vec<u8> },
    /// The driver rings a doorbell.
    Doorbell(u8),
    /// The driver gives a queue a vector.
    Vector { queue: u8, vector: u16 },
    /// The driver offers no receive buffers for the next commands.
    KeepBuffers(bool),
    /// A VMM connects to the express device.
    ConnectVmm,
    /// The VMM closes its connection.
    CloseVmm,
    /// The VMM sends something.
    VmmSends(u8),
    /// The VMM takes its messages, and the guest signals each eventfd that came with them.
    VmmHandles,
}

fuzz_target!(|commands: Vec<Command>| STATE.with_borrow_mut(|state| state.run(commands)));

thread_local! {
    static STATE: RefCell<State> = RefCell::new(State::new());
}

struct State {
    rig: Rig,
    pool: Pool,
    frontend: UnixStream,
    /// The front-end's end of the back-end channel.
    channel: Option<UnixStream>,
    vmm: Option<UnixStream>,
    /// Header of the last message that the driver took.
    last: Option<Header>,
    keep_buffers: bool,
}

impl State {
    fn new() -> Self {
        let mut rig = Rig::new();
        let listener = UnixListener::bind(rig.dir.path().join("express")).expect("bind");
        rig.device.serve_express(listener).expect("express");
        let memory = rig.device.shared_memory().0.try_clone_to_owned().expect("descriptor");
        let frontend = UnixStream::pair().expect("pair").0;
        let pool = Pool::new(memory);
        let mut state =
            Self { rig, pool, frontend, channel: None, vmm: None, last: None, keep_buffers: false };
        state.restart();
        state
    }

    /// Resets the device, which then has to serve a front-end whatever came before.
    fn restart(&mut self) {
        self.rig.device.reset();
        self.rig.device.forget_waiting();
        (self.channel, self.vmm, self.last, self.keep_buffers) = (None, None, None, false);
        self.connect();
        self.rig.bring_up(feature::OFFERED);
        let state = self.rig.device.link();
        assert_eq!(state, LinkState::Connected, "a device after a reset serves a front-end");
        self.rig.host.signals.borrow_mut().clear();
    }

    fn connect(&mut self) {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        self.frontend = ours;
        self.rig.device.adopt_frontend(theirs).expect("front-end");
    }

    fn run(&mut self, commands: Vec<Command>) {
        for command in commands.into_iter().take(COMMANDS) {
            self.carry_out(command);
            self.rig.turn();
            self.go_on();
        }
        self.restart();
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Sound { message, queue, needs_reply, at, change } => {
                let (request, mut payload, fds) = sound(message, queue);
                if let Some(byte) = payload.get_mut(usize::from(at)) {
                    *byte ^= change;
                }
                self.send(request, 1 | u32::from(needs_reply) << 3, &fds, &payload);
            }
            Command::Message { request, flags, fds, payload } => {
                self.send(request.into(), u32::from(flags) & 0xc | 1, &fds, &payload);
            }
            Command::Bytes { fds, bytes } => self.send_bytes(&bytes, &fds),
            Command::SetChannel { needs_reply } => {
                self.send(SET_CHANNEL, 1 | u32::from(needs_reply) << 3, &[Fd::Socket], &[]);
            }
            Command::Answer { request, flags, fds, payload } => {
                let message = message(request, u32::from(flags) & 0xc | 1, &payload).bytes;
                if let Some(channel) = &self.channel {
                    send(channel, &message, &self.pool.get(&fds, None));
                }
            }
            Command::ChannelBytes(bytes) => {
                if let Some(channel) = &self.channel
                    && !bytes.is_empty()
                {
                    send(channel, &bytes, &[]);
                }
            }
            Command::CloseChannel => self.channel = None,
            Command::Reconnect => {
                self.connect();
                // The device accepts it as soon as it has noticed the end of the one before.
                self.rig.turn();
                self.rig.notify(0);
            }
            Command::Read { channel: false } => drain(&self.frontend),
            Command::Read { channel: true } => self.channel.iter().for_each(drain),
            Command::Signal(which) => self.pool.signal(which),
            Command::Reply(payload) => {
                if let Some(last) = self.last {
                    self.backend_sends(last.request, 5, &payload);
                }
            }
            Command::BackendRequest { request, flags, payload } => {
                self.backend_sends(request.into(), u32::from(flags) & 0xc | 1, &payload);
            }
            Command::Doorbell(doorbell) => self.rig.write(BAR2, 4 * u64::from(doorbell), &[1]),
            Command::Vector { queue, vector } => {
                let [queue, zero] = u16::from(queue).to_le_bytes();
                let [low, high] = vector.to_le_bytes();
                self.rig.write(BAR2, VECTOR_SELECT_CFG.offset, &[queue, zero, low, high]);
            }
            Command::KeepBuffers(keep) => self.keep_buffers = keep,
            Command::ConnectVmm => {
                let (ours, theirs) = UnixStream::pair().expect("pair");
                self.vmm = Some(ours);
                self.rig.device.adopt_vmm(theirs);
            }
            Command::CloseVmm => self.vmm = None,
            Command::VmmSends(count) => {
                if let Some(vmm) = &self.vmm
                    && count > 0
                {
                    send(vmm, &vec![0; count.into()], &[]);
                }
            }
            Command::VmmHandles => self.handle_vmm_messages(),
        }
    }

    /// The driver takes its messages, offers its buffers again, and asks for the next front-end after the end of a
    /// connection.
    fn go_on(&mut self) {
        let mut offered = false;
        while !self.keep_buffers
            && let Some(bytes) = self.rig.used(0)
        {
            if !bytes.is_empty() {
                self.last = Some(Header::parse(&bytes).expect("the driver gets nothing but messages"));
            }
            self.rig.offer(0, &[], BUFFER);
            offered = true;
        }
        match self.rig.device.link() {
            LinkState::Down => self.rig.backend_up(),
            LinkState::Broken => panic!("a front-end broke the driver's link"),
            _ if offered => self.rig.notify(0),
            _ => {}
        }
    }

    fn send(&mut self, request: u32, flags: u32, fds: &[Fd], payload: &[u8]) {
        let bytes = message(request, flags, payload).bytes;
        self.send_bytes(&bytes, fds);
    }

    fn send_bytes(&mut self, bytes: &[u8], fds: &[Fd]) {
        if bytes.is_empty() {
            return;
        }
        let mut theirs = None;
        if fds.iter().any(|fd| matches!(fd, Fd::Socket)) {
            let (ours, end) = UnixStream::pair().expect("pair");
            (self.channel, theirs) = (Some(ours), Some(end));
        }
        send(&self.frontend, bytes, &self.pool.get(fds, theirs.as_ref()));
    }

    fn backend_sends(&mut self, request: u32, flags: u32, payload: &[u8]) {
        let size = u32::try_from(payload.len()).expect("small");
        self.rig.send(&Message::new(Header { request, flags, size }, payload));
        while self.rig.used(1).is_some() {}
    }

    fn handle_vmm_messages(&mut self) {
        let Some(vmm) = &self.vmm else { return };
        loop {
            let mut bytes = [0; 8];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            match recvmsg(vmm, &mut parts, &mut control, flags) {
                Ok(got) if got.bytes == bytes.len() => {}
                _ => return,
            }
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    // Writing to the shared page's file does the guest's worst to it as well.
                    fds.for_each(|fd: OwnedFd| {
                        let _ = rustix::io::write(fd.as_fd(), &1u64.to_ne_bytes());
                    });
                }
            }
        }
    }
}

/// Returns a message that QEMU sends: request code, payload and file descriptors.
fn sound(index: u8, queue: u8) -> (u32, Vec<u8>, Vec<Fd>) {
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let queue = u64::from(queue);
    let (page, half) = (0x1000, 0x8000);
    let event = || vec![Fd::Event(queue & 1 == 1)];
    match index % 26 {
        0 => (1, vec![], vec![]),
        1 => (3, vec![], vec![]),
        2 => (15, vec![], vec![]),
        3 => (16, words(&[u64::MAX]), vec![]),
        4 => (2, words(&[1 << 32]), vec![]),
        // A table of one region, and of two.
        5 => (5, words(&[1, 0, 0x10000, 0, 0]), vec![Fd::Agreed]),
        6 => (5, words(&[2, 0, half, 0, 0, 0x10000, half, 0x10000, half]), vec![Fd::Agreed; 2]),
        7 => (8, words(&[8 << 32 | queue]), vec![]),
        8 => (9, words(&[queue, 0, page, 2 * page, 0]), vec![]),
        9 => (10, words(&[queue]), vec![]),
        10 => (11, words(&[queue]), vec![]),
        11 => (12, words(&[queue]), event()),
        12 | 13 => (13, words(&[queue]), event()),
        14 => (14, words(&[queue]), event()),
        15 => (18, words(&[1 << 32 | queue]), vec![]),
        16 => (24, [&[0, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0][..], &[0; 60]].concat(), vec![]),
        17 => (31, words(&[page, 0, 0x0008_0001]), vec![]),
        18 => (32, words(&[page, 0x10000, 0x0008_0001]), vec![Fd::Agreed]),
        19 => (37, words(&[0, 0, page, 0, 0]), vec![Fd::Agreed]),
        20 => (38, words(&[0, 0, page, 0, 0]), vec![]),
        // An IOTLB update.
        21 => (22, words(&[0, page, 0, 0x0203]), vec![]),
        22 => (17, vec![], vec![]),
        23 => (36, vec![], vec![]),
        24 => (34, vec![], vec![]),
        _ => (40, vec![], vec![]),
    }
}
