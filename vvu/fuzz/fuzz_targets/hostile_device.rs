//! Lets the guest driver find, bring up and use a vvu device that lies, with and without an express device that lies,
//! and the bridge pass its messages to a hostile back-end.

#![no_main]

use std::cell::RefCell;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vvu::bridge::hostile_device::{HostileDevice, MEMORY, Session};
use vvu::driver::Driver;
use vvu::spec::express::page::Entry;
use vvu::spec::express::{PAGE_BAR, PeerId};
use vvu::spec::pci::{COMMON_CFG, DEVICE_CFG, Region};
use vvu::spec::virtio::common;
use vvu_fuzz::{Fd, Pool, message, send};

/// Most commands in one execution.
const COMMANDS: usize = 24;
/// `SET_BACKEND_REQ_FD`.
const SET_CHANNEL: u32 = 21;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Space {
    Config,
    Common,
    Device,
    Notify,
    Page,
}

#[derive(Arbitrary, Debug)]
struct Lie {
    space: Space,
    offset: u16,
    bytes: [u8; 4],
    len: u8,
}

#[derive(Arbitrary, Debug)]
struct Setup {
    /// Lies from the start on.
    lies: Vec<Lie>,
    fail_after: Option<u8>,
    express: bool,
}

#[derive(Arbitrary, Debug)]
enum Command {
    /// The device delivers a message of the front-end as QEMU sends it.
    Sound {
        message: u8,
        queue: u8,
        flags: u8,
    },
    /// The device delivers a message whose header has the right size.
    Deliver {
        request: u8,
        flags: u8,
        payload: Vec<u8>,
    },
    /// The device delivers anything.
    DeliverBytes(Vec<u8>),
    /// The device has sent a message of the driver.
    Complete,
    /// The device claims something in a used ring.
    Claim {
        queue: bool,
        slot: u8,
        id: u16,
        len: u16,
        index: u16,
    },
    /// The device overwrites rings.
    Overwrite {
        queue: bool,
        offset: u16,
        data: u64,
    },
    Lie(Lie),
    /// The device changes the link.
    Link(u8),
    /// The device or the express device fails.
    Fail {
        express: bool,
        after: u8,
    },
    /// The proxy writes the entry of a queue in the page.
    Entry {
        queue: u8,
        call: u8,
        registered: u8,
    },
    /// The back-end answers.
    Answer {
        request: u8,
        flags: u8,
        fds: Vec<Fd>,
        payload: Vec<u8>,
    },
    /// The back-end sends anything.
    BackendBytes(Vec<u8>),
    /// The back-end takes its messages, and keeps its end of the request channel.
    BackendReads,
    /// The back-end sends a request on its channel.
    Request {
        request: u8,
        flags: u8,
        fds: Vec<Fd>,
        payload: Vec<u8>,
    },
    ChannelBytes(Vec<u8>),
    CloseChannel,
    CloseBackend,
    Step {
        idle: bool,
    },
}

fuzz_target!(|input: (Setup, Vec<Command>)| STATE.with_borrow_mut(|state| state.run(input.0, input.1)));

thread_local! {
    static STATE: RefCell<State> = RefCell::new(State::new());
}

struct State {
    device: HostileDevice,
    express: HostileDevice,
    pool: Pool,
    backend: Option<UnixStream>,
    /// The back-end's end of its request channel.
    channel: Option<UnixStream>,
}

impl State {
    fn new() -> Self {
        let device = HostileDevice::new().expect("device");
        let express = HostileDevice::new().expect("device");
        let pool = Pool::new(UnixStream::pair().expect("pair").0.into());
        Self { device, express, pool, backend: None, channel: None }
    }

    fn run(&mut self, setup: Setup, commands: Vec<Command>) {
        self.device.restart();
        self.express.restart_express();
        (self.backend, self.channel) = (None, None);
        setup.lies.iter().take(4).for_each(|lie| self.lie(lie));
        if let Some(after) = setup.fail_after {
            self.device.fail_after(after.into());
        }
        let Ok(mut driver) = Driver::new(self.device.clone()) else { return };
        if setup.express {
            let _ = driver.use_express(Box::new(self.express.clone()));
        }
        let (ours, theirs) = UnixStream::pair().expect("pair");
        self.backend = Some(ours);
        let Some(mut session) = Session::new(&mut driver, theirs) else { return };
        for command in commands.into_iter().take(COMMANDS) {
            let idle = matches!(command, Command::Step { idle: true });
            self.carry_out(command);
            if !session.step(idle) {
                break;
            }
        }
        session.close();
    }

    fn lie(&self, lie: &Lie) {
        let bytes = &lie.bytes[..usize::from(1 + lie.len % 4)];
        let (region, start, end) = match lie.space {
            Space::Config => (Region::Config, 0, 256),
            Space::Common => (Region::Bar(COMMON_CFG.bar), COMMON_CFG.offset, 56),
            Space::Device => (Region::Bar(DEVICE_CFG.bar), DEVICE_CFG.offset, 32),
            Space::Notify => (Region::Bar(2), 0, 0x4000),
            Space::Page => {
                return self.express.lie(Region::Bar(PAGE_BAR), u64::from(lie.offset) % 256, bytes);
            }
        };
        self.device.lie(region, start + u64::from(lie.offset) % end, bytes);
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Sound { message: index, queue, flags } => {
                let (request, payload) = sound(index, queue);
                self.device.use_buffer(0, &message(request, u32::from(flags) & 8 | 1, &payload).bytes);
            }
            Command::Deliver { request, flags, payload } => {
                let message = message(request, u32::from(flags) & 0xc | 1, &payload).bytes;
                self.device.use_buffer(0, &message);
            }
            Command::DeliverBytes(bytes) => self.device.use_buffer(0, &bytes),
            Command::Complete => self.device.use_buffer(1, &[]),
            Command::Claim { queue, slot, id, len, index } => {
                self.device.claim(queue.into(), slot.into(), id.into(), len.into(), index);
            }
            Command::Overwrite { queue, offset, data } => {
                self.device.overwrite(queue.into(), offset, &data.to_le_bytes());
            }
            Command::Lie(lie) => self.lie(&lie),
            Command::Link(link) => {
                self.device.put(Region::Bar(DEVICE_CFG.bar), DEVICE_CFG.offset, &[link]);
                if link & 0x80 != 0 {
                    let status = COMMON_CFG.offset + common::DEVICE_STATUS;
                    self.device.put(Region::Bar(COMMON_CFG.bar), status, &[link]);
                }
            }
            Command::Fail { express, after } => {
                let device = if express { &self.express } else { &self.device };
                device.fail_after(after.into());
            }
            Command::Entry { queue, call, registered } => {
                let [call, registered] = [call, registered].map(|id| PeerId::new(id.into()));
                let offset = Entry::call_offset(vvu::spec::addr::QueueIndex(u16::from(queue) % 3));
                let values = Entry { call, registered }.to_values().map(u32::to_le_bytes).concat();
                self.express.put(Region::Bar(PAGE_BAR), offset, &values);
            }
            Command::Answer { request, flags, fds, payload } => {
                let message = message(request, u32::from(flags) & 0xc | 5, &payload).bytes;
                self.backend_sends(&message, &fds);
            }
            Command::BackendBytes(bytes) => self.backend_sends(&bytes, &[]),
            Command::BackendReads => self.read_as_backend(),
            Command::Request { request, flags, fds, payload } => {
                let message = message(request, u32::from(flags) & 0xc | 1, &payload).bytes;
                self.channel_sends(&message, &fds);
            }
            Command::ChannelBytes(bytes) => self.channel_sends(&bytes, &[]),
            Command::CloseChannel => self.channel = None,
            Command::CloseBackend => self.backend = None,
            Command::Step { .. } => {}
        }
    }

    fn backend_sends(&self, bytes: &[u8], fds: &[Fd]) {
        if let Some(backend) = &self.backend
            && !bytes.is_empty()
        {
            send(backend, bytes, &self.pool.get(fds, None));
        }
    }

    fn channel_sends(&self, bytes: &[u8], fds: &[Fd]) {
        if let Some(channel) = &self.channel
            && !bytes.is_empty()
        {
            send(channel, bytes, &self.pool.get(fds, None));
        }
    }

    fn read_as_backend(&mut self) {
        let Some(backend) = &self.backend else { return };
        loop {
            let mut bytes = [0; 12];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(40))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            match recvmsg(backend, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
                Ok(got) if got.bytes > 0 => {}
                _ => return,
            }
            let is_channel = bytes[..4] == SET_CHANNEL.to_le_bytes();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(mut fds) = message
                    && is_channel
                    && let Some(fd) = fds.next()
                {
                    self.channel = Some(fd.into());
                }
            }
        }
    }
}

/// Returns a message that the device passes on: request code and payload.
fn sound(index: u8, queue: u8) -> (u32, Vec<u8>) {
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let queue = u64::from(queue % 3);
    match index % 12 {
        0 => (1, vec![]),
        1 => (2, words(&[1 << 32])),
        2 => (5, words(&[1, 0, MEMORY, 0, 0])),
        3 => (12, words(&[queue])),
        4 => (13, words(&[queue])),
        5 => (14, words(&[queue])),
        6 => (SET_CHANNEL, vec![]),
        7 => (22, words(&[0, 0x1000, 0, 0x0203])),
        8 => (32, words(&[0x1000, 0x1000, 0x0008_0001])),
        9 => (37, words(&[0, 0, 0x1000, 0, 0])),
        10 => (38, words(&[0, 0, 0x1000, 0, 0])),
        _ => (11, words(&[queue])),
    }
}
