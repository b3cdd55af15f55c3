//! Feeds a device the register accesses and the queues of a hostile guest, while front-ends connect, send and leave.

#![no_main]

use std::cell::RefCell;
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vvu::device::LinkState;
use vvu::device::rig::{BAR0, BAR2, BUFFER, Rig};
use vvu::pci::PciFunction;
use vvu::spec::pci::{self, Region};
use vvu::spec::virtio::feature;
use vvu_fuzz::{Fd, Pool, drain, message, send};

/// Most commands in one execution.
const COMMANDS: usize = 32;
/// Most front-ends in one execution.
const CONNECTIONS: usize = 6;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Space {
    Registers,
    Notify,
    Config,
    Memory,
    Missing,
}

impl From<Space> for Region {
    fn from(space: Space) -> Self {
        match space {
            Space::Registers => BAR0,
            Space::Notify => BAR2,
            Space::Config => Self::Config,
            Space::Memory => Self::Bar(pci::SHARED_MEMORY_BAR),
            Space::Missing => Self::Bar(5),
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Command {
    /// The guest writes to one of the first registers, where most are.
    Near {
        space: Space,
        offset: u8,
        data: [u8; 8],
        len: u8,
    },
    /// The guest writes anywhere.
    Write {
        space: Space,
        offset: u64,
        data: [u8; 8],
        len: u8,
    },
    /// The guest writes to a register of the common configuration.
    Common {
        field: u8,
        value: u16,
        wide: bool,
    },
    Read {
        space: Space,
        offset: u16,
        len: u8,
    },
    /// The driver brings the device up properly, with or without event indices.
    BringUp {
        event_idx: bool,
    },
    /// The guest overwrites rings and descriptors.
    Memory {
        queue: bool,
        offset: u16,
        data: u64,
        len: u8,
    },
    OfferBuffer {
        room: u16,
    },
    /// The driver sends a message, perhaps a bad one.
    Send(Vec<u8>),
    /// The driver sends a message whose header has the right size.
    SendSound {
        request: u8,
        reply: bool,
        payload: Vec<u8>,
    },
    Notify(bool),
    TakeUsed(bool),
    Connect,
    Disconnect,
    FrontendSends {
        request: u8,
        flags: u8,
        fds: Vec<Fd>,
        payload: Vec<u8>,
    },
    FrontendsRead,
    /// The front-end signals one of its eventfds.
    Signal(bool),
}

fuzz_target!(|commands: Vec<Command>| STATE.with_borrow_mut(|state| state.run(commands)));

thread_local! {
    static STATE: RefCell<State> = RefCell::new(State::new());
}

struct State {
    rig: Rig,
    pool: Pool,
    frontends: Vec<UnixStream>,
}

impl State {
    fn new() -> Self {
        let rig = Rig::new();
        let memory = rig.device.shared_memory().0.try_clone_to_owned().expect("descriptor");
        let mut state = Self { rig, pool: Pool::new(memory), frontends: Vec::new() };
        state.restart();
        state
    }

    /// Resets the device, which then has to serve a front-end whatever came before.
    fn restart(&mut self) {
        self.rig.device.reset();
        self.rig.device.forget_waiting();
        // A connection costs as much as a whole execution without one.
        let want = if self.frontends.is_empty() { LinkState::Waiting } else { LinkState::Connected };
        if want == LinkState::Connected {
            self.adopt();
        }
        self.rig.bring_up(feature::OFFERED);
        assert_eq!(self.rig.device.link(), want, "a device after a reset serves a front-end");
        self.rig.device.reset();
        self.frontends.clear();
        self.rig.host.signals.borrow_mut().clear();
    }

    fn adopt(&mut self) {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        self.frontends.push(ours);
        self.rig.device.adopt_frontend(theirs).expect("front-end");
    }

    fn run(&mut self, commands: Vec<Command>) {
        for command in commands.into_iter().take(COMMANDS) {
            self.carry_out(command);
            self.rig.turn();
        }
        self.restart();
    }

    fn carry_out(&mut self, command: Command) {
        let rig = &mut self.rig;
        match command {
            Command::Near { space, offset, data, len } => {
                rig.write(space.into(), offset.into(), &data[..usize::from(1 + len % 8)]);
            }
            Command::Write { space, offset, data, len } => {
                rig.write(space.into(), offset, &data[..usize::from(1 + len % 8)]);
            }
            Command::Common { field, value, wide } => {
                let data = u32::from(value).to_le_bytes();
                let offset = u64::from(field % 56) & if wide { !3 } else { !1 };
                rig.common(offset, &data[..if wide { 4 } else { 2 }]);
            }
            Command::Read { space, offset, len } => {
                let mut data = [0; 16];
                rig.device.read(space.into(), offset.into(), &mut data[..usize::from(len % 17)]);
            }
            Command::BringUp { event_idx } => {
                let features =
                    if event_idx { feature::OFFERED } else { feature::OFFERED & !feature::EVENT_IDX };
                rig.bring_up(features);
            }
            Command::Memory { queue, offset, data, len } => {
                let address = rig.rings[usize::from(queue)].base + u64::from(offset % 0x4000);
                let data = &data.to_le_bytes()[..usize::from(1 + len % 8)];
                rig.memory.write_slice(data, GuestAddress(address)).expect("in range");
            }
            Command::OfferBuffer { room } => rig.offer(0, &[], BUFFER.min(room.into())),
            Command::Send(bytes) => {
                rig.offer(1, &bytes[..bytes.len().min(1024)], 0);
                rig.notify(1);
            }
            Command::SendSound { request, reply, payload } => {
                let flags = if reply { 5 } else { 9 };
                rig.send(&message(request, flags, &payload[..payload.len().min(1024)]));
            }
            Command::Notify(queue) => rig.notify(queue.into()),
            // What a guest has done to its own ring is not the device's fault.
            Command::TakeUsed(queue) => rig.forget_used(queue.into()),
            Command::Connect if self.frontends.len() < CONNECTIONS => {
                self.adopt();
                self.rig.notify(0);
            }
            Command::Connect => {}
            Command::Disconnect => {
                if let Some(frontend) = self.frontends.last() {
                    // The socket stays, so that the end of the execution knows that there was a front-end.
                    let _ = rustix::net::shutdown(frontend, rustix::net::Shutdown::Both);
                }
            }
            Command::FrontendSends { request, flags, fds, payload } => {
                if let Some(frontend) = self.frontends.first() {
                    let message = message(request, u32::from(flags) & 0xc | 1, &payload);
                    send(frontend, &message.bytes, &self.pool.get(&fds, None));
                }
            }
            Command::FrontendsRead => self.frontends.iter().for_each(drain),
            Command::Signal(which) => self.pool.signal(which),
        }
    }
}
