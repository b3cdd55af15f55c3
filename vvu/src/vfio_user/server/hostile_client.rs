//! A hostile client without a socket, for fuzz targets: commands go straight to a device.

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, Permissions};

use super::commands::CommandHandler;
use super::host::VmmHost;
use crate::device::rig::{MEMORY, Rig};
use crate::pci::PciFunction;
use crate::spec::addr::Iova;
use crate::vfio_user::protocol::socket::Message;
use crate::vfio_user::protocol::{Capabilities, Command, Header, Version};

/// A client, and the device that it drives through the server.
#[derive(Debug)]
pub struct HostileClient {
    /// The device, and the driver in the client's guest.
    pub rig: Rig<VmmHost>,
    commands: CommandHandler,
    ram: OwnedFd,
    /// Commands so far.
    id: u16,
}

impl HostileClient {
    /// A client that has agreed on the version.
    ///
    /// # Errors
    /// When the system has no memory or no file descriptors left.
    pub fn new() -> std::io::Result<Self> {
        let ram = memfd_create("ram", MemfdFlags::CLOEXEC)?;
        ftruncate(&ram, MEMORY as u64)?;
        let file = FileOffset::new(ram.try_clone()?.into(), 0);
        let memory = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY, Some(file))]);
        let memory = memory.map_err(std::io::Error::other)?;
        let rig = Rig::with_host(VmmHost::new(19), memory);
        let mut client = Self { rig, commands: CommandHandler::default(), ram, id: 0 };
        client.restart();
        Ok(client)
    }

    /// The file of the guest's RAM.
    ///
    /// # Errors
    /// When there is no file descriptor left.
    pub fn ram(&self) -> std::io::Result<OwnedFd> {
        self.ram.try_clone()
    }

    /// Lets the client go and another one come, as the server does.
    pub fn restart(&mut self) {
        self.rig.device.reset();
        self.rig.host = VmmHost::new(self.rig.device.vector_count());
        (self.commands, self.id) = (CommandHandler::default(), 0);
    }

    /// Agrees on the version; whether the server accepts.
    pub fn greet(&mut self) -> bool {
        let version = Version { major: 0, minor: 0 };
        let payload = [&version.to_bytes()[..], &Capabilities::OURS.to_bytes()].concat();
        self.command(Command::Version, &payload, Vec::new())
    }

    /// Maps all RAM at address 0, and nothing else.
    pub fn map_ram(&mut self) {
        self.rig.host.dma.clear();
        let Ok(file) = self.ram() else { return };
        let _ = self.rig.host.dma.map(Iova(0), MEMORY as u64, Permissions::ReadWrite, Some((file, 0)));
    }

    /// Sends a command; whether the server carried it out.
    pub fn command(&mut self, command: Command, payload: &[u8], fds: Vec<OwnedFd>) -> bool {
        self.id = self.id.wrapping_add(1);
        let mut message = Message::new(Header::command(self.id, command, payload.len()), payload);
        message.fds = fds;
        self.commands.answer(message, &mut self.rig.host, &mut self.rig.device).is_ok()
    }
}
