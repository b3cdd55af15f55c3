//! The vvu device: what the guest's accesses to registers and memory do.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;

use super::common_config::CommonConfig;
use super::config_space::{ConfigSpace, Effect};
use super::events::Source;
use super::link::{LinkState, Transition};
use super::message_queues::DriverQueues;
use super::relay::{Progress, Relay};
use super::sibling_memory::SiblingMemory;
use super::trace::Trace;
use super::{Host, copy_at};
use crate::durable::{Adopted, RestoreError};
use crate::event::EventSet;
use crate::pci::{MappableBar, PciFunction};
use crate::spec::addr::QueueIndex;
use crate::spec::express::PeerId;
use crate::spec::pci::{self, Region};
use crate::spec::virtio::{NO_VECTOR, common, device_config, isr, vector_select};

mod keep;

/// Messages moved in one direction before other events get their turn.
const MESSAGES_PER_TURN: usize = 64;

/// Configuration of a vvu device.
#[derive(Debug)]
pub struct DeviceConfig {
    /// The file that the sibling's RAM is in.
    pub memory: SiblingMemory,
    /// Socket that the sibling's front-end connects to.
    pub listener: UnixListener,
    /// Number of vhost queues, 1 to [`VvuDevice::QUEUES_MAX`].
    pub queues: u16,
    /// UUID that identifies the device to its driver.
    pub uuid: [u8; 16],
}

/// A vvu device.
#[derive(Debug)]
pub struct VvuDevice {
    queues: u16,
    uuid: [u8; 16],
    config_space: ConfigSpace,
    common: CommonConfig,
    /// Bits of [`isr`] since the driver last read them.
    isr: u8,
    /// The driver's bit of the link status; the other one is that of the link.
    backend_up: bool,
    vector_select: u16,
    relay: Relay,
    /// The state differs from the one that was saved.
    changed: bool,
}

impl VvuDevice {
    /// Most vhost queues of a device: each has a call and an error doorbell, and a doorbell has an index
    /// of eight bits.
    pub const QUEUES_MAX: u16 = 128;

    /// Makes a device in its reset state.
    ///
    /// # Errors
    /// When the number of queues is out of range, or when the kernel cannot poll the listener or has no
    /// asynchronous I/O.
    pub fn new(config: DeviceConfig) -> io::Result<Self> {
        let DeviceConfig { memory, listener, queues, uuid } = config;
        if !(1..=Self::QUEUES_MAX).contains(&queues) {
            let text = format!("{queues} vhost queues: want 1 to {}", Self::QUEUES_MAX);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let vectors = pci::vector_count(queues);
        let size = memory.size();
        let initial = pci::ConfigSpace::new(vectors, size);
        Ok(Self {
            queues,
            uuid,
            config_space: ConfigSpace::new(initial, |bar| bar_size(bar, size)),
            common: CommonConfig::new(vectors),
            isr: 0,
            backend_up: false,
            vector_select: 0,
            relay: Relay::new(memory, listener, queues)?,
            changed: true,
        })
    }

    /// Records every message in `trace` from now on.
    pub fn set_trace(&mut self, trace: Trace) {
        self.relay.resources.trace = Some(trace);
    }

    /// Serves the express device to the VMMs that connect to `listener`, one at a time.
    ///
    /// # Errors
    /// When the kernel cannot poll the listener, or has no memory or file descriptor left.
    pub fn serve_express(&mut self, listener: UnixListener) -> io::Result<()> {
        self.relay.serve_express(listener, self.uuid)
    }

    /// Gives the express device at most `peers` peers at a time, and none after the one with number `last`. For tests: QEMU
    /// takes so many that it is a long way there.
    #[doc(hidden)]
    pub fn limit_express(&mut self, peers: usize, last: PeerId) {
        self.relay.limit_express(peers, last);
    }

    /// Takes `stream` for a front-end that has connected to the listener.
    ///
    /// # Errors
    /// When the kernel has no credentials for the socket.
    #[cfg(fuzzing)]
    pub fn adopt_frontend(&mut self, stream: std::os::unix::net::UnixStream) -> io::Result<()> {
        self.relay.adopt_frontend(stream)
    }

    /// Forgets the front-ends that wait, so that the next one is served first.
    #[cfg(fuzzing)]
    pub fn forget_waiting(&mut self) {
        self.relay.forget_waiting();
    }

    /// Takes `stream` for a VMM that has connected to the express device, and forgets the one before.
    #[cfg(fuzzing)]
    pub fn adopt_vmm(&mut self, stream: std::os::unix::net::UnixStream) {
        self.relay.adopt_vmm(stream);
    }

    /// The sibling memory file, and its size in bytes. The shared memory BAR shows the file from its
    /// start; the BAR may be larger.
    #[must_use]
    pub fn shared_memory(&self) -> (BorrowedFd<'_>, u64) {
        (self.relay.resources.memory.file().as_fd(), self.relay.resources.memory.size())
    }

    /// The state of the link to the front-end.
    #[must_use]
    pub fn link(&self) -> LinkState {
        self.relay.state()
    }

    fn read_register(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        let len = data.len();
        if let Some(at) = pci::COMMON_CFG.locate(bar, offset, len) {
            self.common.read(at, data);
        } else if pci::ISR_CFG.locate(bar, offset, len).is_some() {
            self.changed |= self.isr != 0;
            data.fill(std::mem::take(&mut self.isr));
        } else if let Some(at) = pci::DEVICE_CFG.locate(bar, offset, len) {
            copy_at(&self.device_config(), at, data);
        } else if let Some(at) = pci::VECTOR_SELECT_CFG.locate(bar, offset, len) {
            let mut bytes = [0; vector_select::SIZE];
            bytes[..2].copy_from_slice(&self.vector_select.to_le_bytes());
            let vector = self.relay.vrings.vector(QueueIndex(self.vector_select));
            bytes[2..].copy_from_slice(&vector.to_le_bytes());
            copy_at(&bytes, at, data);
        } else {
            data.fill(0);
        }
    }

    fn link_status(&self) -> u32 {
        let backend = if self.backend_up { device_config::BACKEND_UP } else { 0 };
        let frontend = if self.link().is_frontend_up() { device_config::FRONTEND_UP } else { 0 };
        backend | frontend
    }

    fn device_config(&self) -> [u8; device_config::SIZE_WITH_WINDOW] {
        let memory = &self.relay.resources.memory;
        let mut bytes = [0; device_config::SIZE_WITH_WINDOW];
        bytes[..4].copy_from_slice(&self.link_status().to_le_bytes());
        bytes[4..8].copy_from_slice(&u32::from(self.queues).to_le_bytes());
        bytes[8..24].copy_from_slice(&self.uuid);
        bytes[24..32].copy_from_slice(&memory.header().to_le_bytes());
        bytes[32..].copy_from_slice(&memory.size().to_le_bytes());
        bytes
    }

    fn write_register<H: Host>(&mut self, host: &H, bar: u8, offset: u64, data: &[u8]) {
        let len = data.len();
        if let Some(at) = pci::DOORBELL_CFG.locate(bar, offset, len) {
            // A doorbell changes nothing here, and is written often.
            if let Ok(doorbell) = usize::try_from(at / u64::from(pci::NOTIFY_MULTIPLIER)) {
                self.relay.vrings.ring(doorbell);
            }
            return;
        }
        self.changed = true;
        if pci::NOTIFY_CFG.locate(bar, offset, len).is_some() {
            self.pump(host);
        } else if let Some(at) = pci::COMMON_CFG.locate(bar, offset, len) {
            if at == common::DEVICE_STATUS && data == [0] {
                self.reset_virtio();
            } else {
                self.common.write(at, data);
                self.update_link(host);
            }
        } else if let Some(at) = pci::DEVICE_CFG.locate(bar, offset, len) {
            // The driver may write one bit, which is in the first byte.
            if let (device_config::STATUS, Some(value)) = (at, data.first()) {
                self.backend_up = u32::from(*value) & device_config::BACKEND_UP != 0;
                self.update_link(host);
            }
        } else if let Some(at) = pci::VECTOR_SELECT_CFG.locate(bar, offset, len) {
            self.write_vector_select(host, at, data);
        }
    }

    fn write_vector_select<H: Host>(&mut self, host: &H, at: u64, data: &[u8]) {
        match (at, data) {
            (vector_select::SELECT, [a, b]) => self.vector_select = u16::from_le_bytes([*a, *b]),
            (vector_select::MSIX_VECTOR, [a, b]) => {
                let vector = u16::from_le_bytes([*a, *b]);
                let vector = if vector < self.vector_count() { vector } else { NO_VECTOR };
                if let Some(due) = self.relay.vrings.set_vector(QueueIndex(self.vector_select), vector) {
                    host.signal(due);
                }
            }
            (vector_select::SELECT, [a, b, c, d]) => {
                self.write_vector_select(host, vector_select::SELECT, &[*a, *b]);
                self.write_vector_select(host, vector_select::MSIX_VECTOR, &[*c, *d]);
            }
            _ => {}
        }
    }

    fn reset_virtio(&mut self) {
        self.common.reset();
        self.isr = 0;
        self.backend_up = false;
        self.vector_select = 0;
        self.relay.reset();
    }

    /// Brings the link in line with what the driver wrote, and moves what can be moved.
    fn update_link<H: Host>(&mut self, host: &H) {
        let ready = self.common.driver_ok() && self.config_space.bus_master() && self.backend_up;
        let (relay, mut driver) = self.split(host);
        if let Some(transition) = relay.set_driver_ready(ready, &mut driver) {
            self.announce(host, &transition);
            self.pump(host);
        }
    }

    /// Moves messages both ways until nothing can be moved, or others should have their turn.
    fn pump<H: Host>(&mut self, host: &H) {
        self.changed = true;
        for _ in 0..MESSAGES_PER_TURN {
            let (relay, mut driver) = self.split(host);
            let Progress { moved, transition } = relay.advance(&mut driver);
            if let Some(transition) = transition {
                self.announce(host, &transition);
            }
            if !moved {
                return;
            }
            if self.relay.resources.is_kept() {
                break;
            }
        }
        self.relay.resources.events.again();
    }

    fn split<'d, H>(&'d mut self, host: &'d H) -> (&'d mut Relay, DriverQueues<'d, H>) {
        let CommonConfig { rx, tx, .. } = &mut self.common;
        (&mut self.relay, DriverQueues { host, rx, tx, isr: &mut self.isr })
    }

    /// Shows the driver a change of the link in its registers.
    fn announce<H: Host>(&mut self, host: &H, transition: &Transition) {
        if (transition.from, transition.to) == (LinkState::Leaving, LinkState::Down) {
            // The driver sets it again to ask for the next front-end.
            self.backend_up = false;
        }
        if transition.to == LinkState::Broken {
            self.common.set_needs_reset();
        }
        if transition.concerns_driver() {
            self.common.bump_generation();
            self.isr |= isr::CONFIG;
            if self.common.config_vector != NO_VECTOR && self.config_space.bus_master() {
                host.signal(self.common.config_vector);
            }
        }
    }
}

impl PciFunction for VvuDevice {
    fn region_size(&self, region: Region) -> u64 {
        match region {
            Region::Config => pci::CONFIG_SPACE_SIZE as u64,
            Region::Bar(bar) => bar_size(bar, self.relay.resources.memory.size()),
        }
    }

    fn vector_count(&self) -> u16 {
        pci::vector_count(self.queues)
    }

    fn mappable_bar(&self) -> Option<MappableBar<'_>> {
        let (file, size) = self.shared_memory();
        (size > 0).then_some(MappableBar { bar: pci::SHARED_MEMORY_BAR, file, size })
    }

    fn events(&self) -> &EventSet {
        self.relay.resources.events.set()
    }

    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        match region {
            Region::Config => {
                if self.config_space.is_window(offset, data.len())
                    && let Some(window) = self.config_space.window()
                {
                    let mut bytes = [0; 4];
                    self.changed = true;
                    self.read(Region::Bar(window.bar), window.offset, &mut bytes[..window.len]);
                    self.config_space.set_window_data(window, &bytes[..window.len]);
                }
                self.config_space.read(offset, data);
            }
            Region::Bar(pci::SHARED_MEMORY_BAR) => self.relay.resources.memory.read(offset, data),
            Region::Bar(bar) => self.read_register(bar, offset, data),
        }
    }

    fn write<H: Host>(&mut self, host: &H, region: Region, offset: u64, data: &[u8]) {
        match region {
            Region::Config => match self.config_space.write(offset, data) {
                Effect::None => {
                    self.changed = true;
                    self.update_link(host);
                }
                Effect::Reset => self.reset(),
                Effect::WindowWrite => {
                    self.changed = true;
                    if let Some(window) = self.config_space.window() {
                        let bytes = self.config_space.window_data(window);
                        self.write(host, Region::Bar(window.bar), window.offset, &bytes[..window.len]);
                    }
                }
            },
            Region::Bar(pci::SHARED_MEMORY_BAR) => self.relay.resources.memory.write(offset, data),
            Region::Bar(bar) => self.write_register(host, bar, offset, data),
        }
    }

    fn process<H: Host>(&mut self, host: &H, ready: &[u32]) {
        let (mut pump, mut express) = (false, false);
        for number in ready {
            match Source::from_number(*number) {
                Source::Kick(queue) => match self.relay.vrings.kicked(queue) {
                    Some(vector) => host.signal(vector),
                    None => self.changed = true,
                },
                Source::Listener | Source::Socket => pump = true,
                Source::Express => express = true,
                Source::Again => (pump, express) = (true, true),
                Source::Confirmation(peer) => {
                    self.changed = true;
                    self.relay.confirm(peer);
                }
            }
        }
        if express {
            self.changed = true;
            self.relay.process_express();
        }
        if pump {
            self.pump(host);
        }
    }

    fn reset(&mut self) {
        self.changed = true;
        self.config_space.reset();
        self.reset_virtio();
    }

    fn failure(&self) -> Option<&str> {
        self.relay.failure()
    }

    fn save(&mut self) -> Option<Vec<u8>> {
        self.save_changes()
    }

    fn committed(&mut self, released: Vec<Box<dyn Send>>) {
        released.into_iter().for_each(|value| self.relay.resources.closer.close_now(value));
        // The channel of a front-end may turn out to be gone.
        self.changed |= self.relay.send_committed();
    }

    fn restore<H: Host>(&mut self, host: &H, saved: &[u8], left: &mut Adopted) -> Result<(), RestoreError> {
        self.take_over(host, saved, left)
    }
}

/// Bytes of BAR `bar` for a sibling memory file of `memory` bytes.
fn bar_size(bar: u8, memory: u64) -> u64 {
    match bar {
        pci::REGISTER_BAR => pci::REGISTER_BAR_SIZE,
        pci::NOTIFY_BAR => pci::NOTIFY_BAR_SIZE,
        pci::SHARED_MEMORY_BAR => memory.next_power_of_two(),
        _ => 0,
    }
}

#[cfg(test)]
#[path = "hostile_test.rs"]
mod hostile_tests;
#[cfg(test)]
#[path = "vvu_device_test.rs"]
mod tests;
