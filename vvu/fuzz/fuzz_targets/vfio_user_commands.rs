//! Feeds a device the commands of a hostile vfio-user client, with and without the file descriptors that belong to them.
//! The guest's queues lie in memory that the client maps and unmaps.

#![no_main]

use std::cell::RefCell;
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vvu::device::LinkState;
use vvu::device::rig::BUFFER;
use vvu::spec::virtio::feature;
use vvu::vfio_user::protocol::Command as Number;
use vvu::vfio_user::server::hostile_client::HostileClient;
use vvu_fuzz::{Fd, Pool, drain, message, send};

/// Most commands in one execution.
const COMMANDS: usize = 24;

const NUMBERS: [Number; 10] = [
    Number::Version,
    Number::DmaMap,
    Number::DmaUnmap,
    Number::DeviceGetInfo,
    Number::DeviceGetRegionInfo,
    Number::DeviceGetIrqInfo,
    Number::DeviceSetIrqs,
    Number::RegionRead,
    Number::RegionWrite,
    Number::DeviceReset,
];

#[derive(Arbitrary, Debug)]
enum Command {
    /// Any payload.
    Raw {
        number: u8,
        fds: Vec<Fd>,
        payload: Vec<u8>,
    },
    /// Maps pages of the RAM, or of another file.
    Map {
        page: u8,
        pages: u8,
        at: u8,
        access: u8,
        fd: Option<Fd>,
    },
    Unmap {
        page: u8,
        pages: u8,
    },
    UnmapAll,
    /// Maps all RAM at once.
    MapRam,
    SetIrqs {
        flags: u8,
        start: u8,
        count: u8,
        events: u8,
    },
    GetInfo {
        number: u8,
        argsz: u8,
        index: u8,
    },
    Read {
        region: u8,
        offset: u16,
        count: u8,
    },
    Write {
        region: u8,
        offset: u16,
        data: [u8; 8],
        count: u8,
    },
    Reset,
    /// The client leaves and another one comes, and agrees on the version or not.
    Reconnect {
        greet: bool,
    },
    /// The driver brings the device up, whatever is mapped.
    BringUp {
        event_idx: bool,
    },
    /// The guest overwrites its rings.
    Memory {
        queue: bool,
        offset: u16,
        data: u64,
    },
    OfferBuffer {
        room: u16,
    },
    Send {
        request: u8,
        reply: bool,
        payload: Vec<u8>,
    },
    Notify(bool),
    Connect,
    FrontendReads,
    FrontendSends {
        request: u8,
        flags: u8,
        fds: Vec<Fd>,
        payload: Vec<u8>,
    },
    Signal(bool),
}

fuzz_target!(|commands: Vec<Command>| STATE.with_borrow_mut(|state| state.run(commands)));

thread_local! {
    static STATE: RefCell<State> = RefCell::new(State::new());
}

struct State {
    client: HostileClient,
    /// The agreed memory is the guest's RAM.
    pool: Pool,
    frontend: UnixStream,
}

impl State {
    fn new() -> Self {
        let client = HostileClient::new().expect("client");
        let pool = Pool::new(client.ram().expect("descriptor"));
        let mut state = Self { client, pool, frontend: UnixStream::pair().expect("pair").0 };
        state.restart();
        state
    }

    /// The server serves the next client, and its device a front-end, whatever came before.
    fn restart(&mut self) {
        self.client.restart();
        self.client.rig.device.forget_waiting();
        assert!(self.client.greet(), "the server serves the next client");
        self.client.map_ram();
        self.adopt();
        self.client.rig.bring_up(feature::OFFERED);
        assert_eq!(self.client.rig.device.link(), LinkState::Connected);
    }

    fn adopt(&mut self) {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        self.frontend = ours;
        self.client.rig.device.adopt_frontend(theirs).expect("front-end");
    }

    fn run(&mut self, commands: Vec<Command>) {
        for command in commands.into_iter().take(COMMANDS) {
            self.carry_out(command);
            let rig = &mut self.client.rig;
            rig.turn();
        }
        self.restart();
    }

    fn carry_out(&mut self, command: Command) {
        let client = &mut self.client;
        match command {
            Command::Raw { number, fds, payload } => {
                let number = NUMBERS[usize::from(number) % NUMBERS.len()];
                client.command(number, &payload[..payload.len().min(1024)], self.pool.duplicate(&fds));
            }
            Command::Map { page, pages, at, access, fd } => {
                let payload = [
                    &words32(&[32, u32::from(access & 3)])[..],
                    &words64(&[u64::from(at) << 12, u64::from(page) << 12, u64::from(pages) << 12]),
                ]
                .concat();
                let fds: Vec<_> = fd.into_iter().collect();
                client.command(Number::DmaMap, &payload, self.pool.duplicate(&fds));
            }
            Command::Unmap { page, pages } => {
                let range = words64(&[u64::from(page) << 12, u64::from(pages) << 12]);
                client.command(Number::DmaUnmap, &[&words32(&[24, 0])[..], &range].concat(), Vec::new());
            }
            Command::UnmapAll => {
                let payload = [&words32(&[24, 2])[..], &[0; 16]].concat();
                client.command(Number::DmaUnmap, &payload, Vec::new());
            }
            Command::MapRam => client.map_ram(),
            Command::SetIrqs { flags, start, count, events } => {
                let flags = [0x21, 0x24, 0x22, flags.into()][usize::from(flags & 3)];
                let payload = words32(&[20, flags, 2, start.into(), count.into()]);
                let fds = vec![Fd::Event(events & 1 == 0); usize::from(events % 24)];
                client.command(Number::DeviceSetIrqs, &payload, self.pool.duplicate(&fds));
            }
            Command::GetInfo { number, argsz, index } => {
                let number = NUMBERS[3 + usize::from(number % 3)];
                let payload = [&words32(&[argsz.into(), 0, index.into()])[..], &[0; 20]].concat();
                client.command(number, &payload, Vec::new());
            }
            Command::Read { region, offset, count } => {
                let payload = access(region, offset, count);
                client.command(Number::RegionRead, &payload, Vec::new());
            }
            Command::Write { region, offset, data, count } => {
                let payload = [&access(region, offset, count)[..], &data].concat();
                client.command(Number::RegionWrite, &payload, Vec::new());
            }
            Command::Reset => {
                client.command(Number::DeviceReset, &[], Vec::new());
            }
            Command::Reconnect { greet } => {
                client.restart();
                if greet {
                    client.greet();
                }
            }
            Command::BringUp { event_idx } => {
                client.rig.bring_up(if event_idx {
                    feature::OFFERED
                } else {
                    feature::OFFERED & !feature::EVENT_IDX
                });
            }
            Command::Memory { queue, offset, data } => {
                let address = client.rig.rings[usize::from(queue)].base + u64::from(offset % 0x4000);
                client.rig.memory.write_obj(data, GuestAddress(address)).expect("in range");
            }
            Command::OfferBuffer { room } => client.rig.offer(0, &[], BUFFER.min(room.into())),
            Command::Send { request, reply, payload } => {
                client.rig.send(&message(
                    request,
                    if reply { 5 } else { 9 },
                    &payload[..payload.len().min(1024)],
                ));
            }
            Command::Notify(queue) => client.rig.notify(queue.into()),
            Command::Connect => {
                self.adopt();
                self.client.rig.notify(0);
            }
            Command::FrontendReads => drain(&self.frontend),
            Command::FrontendSends { request, flags, fds, payload } => {
                let message = message(request, u32::from(flags) & 0xc | 1, &payload);
                send(&self.frontend, &message.bytes, &self.pool.get(&fds, None));
            }
            Command::Signal(which) => self.pool.signal(which),
        }
    }
}

fn access(region: u8, offset: u16, count: u8) -> Vec<u8> {
    [&u64::from(offset).to_le_bytes()[..], &words32(&[u32::from(region % 10), u32::from(count % 12)])]
        .concat()
}

fn words32(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn words64(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
