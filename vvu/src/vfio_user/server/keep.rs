//! Saves the state of a server for a successor, and takes it over.

use std::io;
use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

use super::commands::CommandHandler;
use super::{Client, Kept, MessageSocket, ServerError, Service};
use crate::durable::{Adopted, RestoreError, SavedState, Section, SocketSlot, Store, hold, release};
use crate::framed_socket::SavedSocket;
use crate::pci::PciFunction;

/// [`Section::Client`].
#[derive(Debug, Serialize, Deserialize)]
struct SavedServer {
    client: Option<SavedClient>,
    vectors: Vec<Option<RawFd>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedClient {
    socket: SavedSocket,
    version_agreed: bool,
    refusals: u32,
}

impl<D: PciFunction> Service<'_, D> {
    /// Takes over from a predecessor, if the state is to be kept and there was one, and commits for the first time.
    pub(super) fn take_over(&mut self) -> Result<(), ServerError> {
        let Some(kept) = &mut self.server.kept else { return Ok(()) };
        hold();
        kept.store.touch().map_err(ServerError::Save)?;
        let saved = kept.store.load().map_err(ServerError::Save)?;
        let ledger = kept.store.ledger(SocketSlot::Client);
        if let (Some(saved), Some(mut left)) = (saved, kept.left.take()) {
            self.restore(&saved, ledger, &mut left)?;
            // The rest is closed after the next commit.
            drop(left.rest());
        }
        self.commit()?;
        self.watch_client()
    }

    fn restore(
        &mut self,
        saved: &SavedState,
        ledger: crate::durable::Ledger,
        left: &mut Adopted,
    ) -> Result<(), ServerError> {
        let json = |error: serde_json::Error| RestoreError::from(error);
        let SavedServer { client, vectors } = serde_json::from_slice(&saved.client).map_err(json)?;
        let maps = serde_json::from_slice(&saved.dma).map_err(json)?;
        self.host.restore_vectors(vectors, left)?;
        self.host.dma.restore(maps, left)?;
        if let Some(SavedClient { socket, version_agreed, refusals }) = client {
            let socket = MessageSocket::restore(socket, ledger, left)?;
            self.server.events.remove(&self.server.listener)?;
            self.server.watch_socket(&socket)?;
            let commands = CommandHandler { version_agreed };
            self.client = Some(Client { socket, commands, refusals, waits_for_room: false });
        }
        self.device.restore(&self.host, &saved.device, left)?;
        for stream in left.connections_to(&self.server.listener) {
            if self.client.is_none() {
                self.server.events.remove(&self.server.listener)?;
                self.serve_client(stream)?;
            }
        }
        Ok(())
    }

    /// Saves what has changed, then drops and sends what had to wait for that.
    pub(super) fn commit(&mut self) -> Result<(), ServerError> {
        let Some(Kept { store, .. }) = &self.server.kept else { return Ok(()) };
        save(store, self.client.as_ref(), &mut self.host, self.device).map_err(ServerError::Save)?;
        self.device.committed(release());
        if let Some(client) = &mut self.client {
            // An error comes again with the next use of the socket.
            let _ = client.socket.flush();
        }
        Ok(())
    }
}

fn save<D: PciFunction>(
    store: &Store,
    client: Option<&Client>,
    host: &mut super::VmmHost,
    device: &mut D,
) -> io::Result<()> {
    let client = client.and_then(|Client { socket, commands, refusals, .. }| {
        let (version_agreed, refusals) = (commands.version_agreed, *refusals);
        Some(SavedClient { socket: socket.save()?, version_agreed, refusals })
    });
    let server = SavedServer { client, vectors: host.save_vectors() };
    let mut sections = vec![(Section::Client, serde_json::to_vec(&server)?)];
    if let Some(maps) = host.dma.save() {
        sections.push((Section::Dma, serde_json::to_vec(&maps)?));
    }
    sections.extend(device.save().map(|device| (Section::Device, device)));
    store.commit(&sections)
}
