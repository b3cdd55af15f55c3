//! The driver's side of a split virtqueue (virtio 1.2, 2.7).

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vhost::VringConfigData;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{DEADLINE, SiblingMemory};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A descriptor, as it is in the table.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    pub fn to_bytes(self) -> Vec<u8> {
        let mut bytes = self.addr.to_le_bytes().to_vec();
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.next.to_le_bytes());
        bytes
    }
}

/// A virtqueue and its events.
pub struct Ring {
    pub kick: EventFd,
    pub call: EventFd,
    size: u16,
    /// Guest address of the descriptor table; the other structures follow, each on pages of its own.
    base: u64,
    event_idx: bool,
    free: Vec<u16>,
    next_avail: u16,
    last_used: u16,
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("eventfd")
}

impl Ring {
    /// Bytes that a ring of any size takes.
    pub const SPACE: u64 = 0x1_0000;
    /// Where the ring ends in it.
    pub const END: u64 = 0x8000;
    const AVAIL: u64 = 0x4000;
    const USED: u64 = 0x5000;

    pub fn new(memory: &SiblingMemory, base: u64, size: u16, event_idx: bool) -> Self {
        assert!(size <= 1024, "descriptors have four pages");
        memory.write(base, &vec![0; usize::try_from(Self::END).expect("small")]);
        let free = (0..size).rev().collect();
        Self { kick: event(), call: event(), size, base, event_idx, free, next_avail: 0, last_used: 0 }
    }

    pub fn config(&self, memory: &SiblingMemory) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: memory.user_address(self.base),
            avail_ring_addr: memory.user_address(self.base + Self::AVAIL),
            used_ring_addr: memory.user_address(self.base + Self::USED),
            log_addr: None,
        }
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Takes a free descriptor.
    pub fn allocate(&mut self) -> u16 {
        self.free.pop().expect("a free descriptor")
    }

    /// The free descriptors, to be given back once a request is done.
    pub fn snapshot(&self) -> Vec<u16> {
        self.free.clone()
    }

    pub fn restore(&mut self, free: Vec<u16>) {
        self.free = free;
    }

    pub fn store(&self, memory: &SiblingMemory, index: u16, descriptor: Descriptor) {
        memory.write(self.base + u64::from(index) * 16, &descriptor.to_bytes());
    }

    /// Makes the chain that starts at `head` available, without a kick.
    pub fn push(&mut self, memory: &SiblingMemory, head: u16) {
        let avail = self.base + Self::AVAIL;
        memory.write(avail + 4 + u64::from(self.next_avail % self.size) * 2, &head.to_le_bytes());
        self.next_avail = self.next_avail.wrapping_add(1);
        self.set_avail_index(memory, self.next_avail);
    }

    /// Writes the available index, which a well-behaved driver leaves to [`push`](Self::push).
    pub fn set_avail_index(&self, memory: &SiblingMemory, index: u16) {
        let addr = GuestAddress(self.base + Self::AVAIL + 2);
        memory.map().store(index.to_le(), addr, Ordering::SeqCst).expect("available index");
    }

    /// Sets `VIRTQ_AVAIL_F_NO_INTERRUPT`.
    pub fn ask_for_silence(&self, memory: &SiblingMemory) {
        memory.write(self.base + Self::AVAIL, &1u16.to_le_bytes());
    }

    /// Asks to be called when the used index goes beyond `index`.
    pub fn set_used_event(&self, memory: &SiblingMemory, index: u16) {
        let used_event = self.base + Self::AVAIL + 4 + u64::from(self.size) * 2;
        let addr = GuestAddress(used_event);
        memory.map().store(index.to_le(), addr, Ordering::SeqCst).expect("used event");
    }

    /// Whether the device asks for a kick after chains were made available from index `before` on.
    pub fn wants_kick(&self, memory: &SiblingMemory, before: u16) -> bool {
        let load = |at: u64| {
            let addr = GuestAddress(self.base + Self::USED + at);
            u16::from_le(memory.map().load(addr, Ordering::SeqCst).expect("used ring"))
        };
        let added = self.next_avail.wrapping_sub(before);
        if !self.event_idx {
            return added > 0 && load(0) & 1 == 0;
        }
        let avail_event = load(4 + u64::from(self.size) * 8);
        self.next_avail.wrapping_sub(avail_event).wrapping_sub(1) < added
    }

    /// Whether every chain that came back was taken.
    pub fn is_idle(&self, memory: &SiblingMemory) -> bool {
        self.used_index(memory) == self.last_used
    }

    pub fn kick(&self) {
        self.kick.write(1).expect("kick");
    }

    /// Sets the kick and call events up anew.
    pub fn renew_kick(&mut self) -> EventFd {
        std::mem::replace(&mut self.kick, event())
    }

    pub fn renew_call(&mut self) -> EventFd {
        std::mem::replace(&mut self.call, event())
    }

    pub fn used_index(&self, memory: &SiblingMemory) -> u16 {
        let addr = GuestAddress(self.base + Self::USED + 2);
        u16::from_le(memory.map().load(addr, Ordering::SeqCst).expect("used index"))
    }

    /// Gives back the chain that starts at `head`, as a device does, without a call.
    pub fn use_up(&self, memory: &SiblingMemory, head: u16, len: u32) {
        let index = self.used_index(memory);
        let element = self.base + Self::USED + 4 + u64::from(index % self.size) * 8;
        memory.write(element, &[u32::from(head).to_le_bytes(), len.to_le_bytes()].concat());
        let addr = GuestAddress(self.base + Self::USED + 2);
        memory.map().store(index.wrapping_add(1).to_le(), addr, Ordering::SeqCst).expect("used index");
    }

    /// The next used element, if there is one: head and length.
    pub fn pop(&mut self, memory: &SiblingMemory) -> Option<(u16, u32)> {
        if self.used_index(memory) == self.last_used {
            return None;
        }
        let element = self.base + Self::USED + 4 + u64::from(self.last_used % self.size) * 8;
        let bytes = memory.read(element, 8);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        self.last_used = self.last_used.wrapping_add(1);
        if self.event_idx {
            self.set_used_event(memory, self.last_used);
        }
        Some((u16::try_from(word(0)).expect("head"), word(4)))
    }

    /// The next used element, waited for by way of the call event.
    pub fn wait(&mut self, memory: &SiblingMemory) -> Result<(u16, u32), String> {
        self.wait_for(memory, DEADLINE)
    }

    pub fn wait_for(&mut self, memory: &SiblingMemory, limit: Duration) -> Result<(u16, u32), String> {
        let start = Instant::now();
        loop {
            if let Some(used) = self.pop(memory) {
                return Ok(used);
            }
            let rest = limit.saturating_sub(start.elapsed());
            if rest.is_zero() {
                return Err(format!("no used descriptor and no call within {limit:?}"));
            }
            if readable(&self.call, rest) {
                self.call.read().expect("call event");
            }
        }
    }
}

/// Whether `fd` gets readable, or its peer goes away, within `limit`.
pub fn readable(fd: &impl AsRawFd, limit: Duration) -> bool {
    let epoll = Epoll::new().expect("epoll");
    let interest = EpollEvent::new(EventSet::IN | EventSet::READ_HANG_UP, 0);
    epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), interest).expect("epoll");
    wait(&epoll, limit)
}

/// Waits until `epoll` has an event, for at most `limit`, and returns whether it has one.
///
/// The kernel interrupts the wait of a thread that has made an io_uring, when the ring is gone.
pub fn wait(epoll: &Epoll, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let rest = deadline.saturating_duration_since(Instant::now());
        let rest = i32::try_from(rest.as_millis()).expect("a short limit").max(1);
        match epoll.wait(rest, &mut [EpollEvent::default()]) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result.expect("epoll") != 0,
        }
    }
}
