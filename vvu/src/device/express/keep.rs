//! Saves the server of the express device for a successor, and takes it over.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use serde::{Deserialize, Serialize};

use super::super::events::Source;
use super::super::resources::{Ledgers, Resources};
use super::super::vrings::Eventfd;
use super::peers::{Peers, SavedPeers};
use super::{Express, SharedPage};
use crate::durable::{Adopted, RestoreError};
use crate::framed_socket::{FramedSocket, SavedSocket};
use crate::spec::express::PeerId;

/// An [`Express`] as it is saved.
#[derive(Debug, Serialize, Deserialize)]
pub(in super::super) struct SavedExpress {
    page: Option<RawFd>,
    peers: SavedPeers,
    confirmations: Vec<(u16, RawFd)>,
    vmm: Option<SavedSocket>,
    exhausted: bool,
}

impl Express {
    /// Returns the state for a successor.
    pub(in super::super) fn save(&self) -> SavedExpress {
        let confirmations = self.confirmations.iter().map(|(id, fd)| (id.get(), fd.number()));
        SavedExpress {
            page: self.page.as_ref().map(|page| page.file.as_raw_fd()),
            peers: self.peers.save(Eventfd::number),
            confirmations: confirmations.collect(),
            vmm: self.vmm.as_ref().and_then(FramedSocket::save),
            exhausted: self.exhausted,
        }
    }

    /// Restores what [`save`](Self::save) returned, and writes the page anew.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub(in super::super) fn restore(
        &mut self,
        saved: SavedExpress,
        resources: &Resources,
        left: &mut Adopted,
    ) -> Result<(), RestoreError> {
        let io = |error: rustix::io::Errno| RestoreError::Io(error.into());
        if let Some(number) = saved.page {
            self.page = Some(SharedPage::open(File::from(left.adopt(number)?.into_inner()))?);
        }
        self.peers = Peers::restore(saved.peers, |number| left.adopt(number).map(Eventfd::new))?;
        self.exhausted = saved.exhausted;
        for (id, number) in saved.confirmations {
            let confirmation = left.adopt(number)?;
            if let Some(id) = PeerId::new(id) {
                resources.events.add(&confirmation, Source::Confirmation(id)).map_err(io)?;
                self.confirmations.insert(id, confirmation);
            }
        }
        if let (Some(saved), Some(Ledgers { express, .. })) = (saved.vmm, resources.ledgers) {
            let vmm = FramedSocket::restore(saved, express, left)?;
            resources.events.add(&vmm, Source::Express).map_err(io)?;
            self.vmm = Some(vmm);
        }
        for stream in left.connections_to(&self.listener) {
            if self.vmm.is_none() {
                self.greet(resources, stream);
            }
        }
        self.publish_all();
        Ok(())
    }

    /// Sends what had to wait for the commit. An error comes again with the next use of the socket.
    pub(in super::super) fn send_committed(&mut self) {
        if let Some(vmm) = &mut self.vmm {
            let _ = vmm.flush();
        }
    }
}
