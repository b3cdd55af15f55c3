//! Saves the front-end's side of a device for a successor, and takes it over.

use serde::{Deserialize, Serialize};

use super::super::express::SavedExpress;
use super::super::frontend_connection::{FrontendConnection, SavedConnection};
use super::super::reconnects::SavedReconnects;
use super::super::resources::Ledgers;
use super::super::vrings::SavedVring;
use super::*;
use crate::durable::{Adopted, RestoreError};

/// A [`Relay`] as it is saved.
#[derive(Debug, Serialize, Deserialize)]
pub(in super::super) struct SavedRelay {
    link: LinkState,
    connection: Option<SavedConnection>,
    vrings: Vec<SavedVring>,
    reconnects: SavedReconnects,
    express: Option<SavedExpress>,
}

impl Relay {
    /// Returns the state for a successor.
    pub(in super::super) fn save(&self) -> SavedRelay {
        let connection = match &self.link {
            Link::Connected(connection) => connection.save(),
            _ => None,
        };
        SavedRelay {
            link: self.state(),
            connection,
            vrings: self.vrings.save(),
            reconnects: self.reconnects.save(),
            express: self.express.as_ref().map(Express::save),
        }
    }

    /// Restores what [`save`](Self::save) returned. Kicks from before may come again.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub(in super::super) fn restore(
        &mut self,
        saved: SavedRelay,
        ledgers: Ledgers,
        left: &mut Adopted,
    ) -> Result<(), RestoreError> {
        let io = |error: Errno| RestoreError::Io(error.into());
        let connection = saved.connection.map(|saved| FrontendConnection::restore(saved, ledgers, left));
        let connection = connection.transpose()?;
        if let Some(connection) = &connection {
            connection.watch(&self.resources).map_err(io)?;
            connection.watch_channel(&self.resources).map_err(io)?;
        }
        self.link.restore(saved.link, connection);
        self.vrings.restore(saved.vrings, left)?;
        for (queue, kick) in self.vrings.kicks() {
            self.resources.events.add(kick, Source::Kick(queue)).map_err(io)?;
        }
        self.reconnects.restore(saved.reconnects, left)?;
        if let (Some(express), Some(saved)) = (&mut self.express, saved.express) {
            express.restore(saved, &self.resources, left)?;
        }
        Ok(())
    }

    /// Takes note of what a predecessor did with the driver's queues after its last commit: at most one message each way,
    /// or the unread messages that it gave back when it began to use the queues.
    pub(in super::super) fn catch_up<H: Host>(
        &mut self,
        driver: &mut DriverQueues<'_, H>,
    ) -> Option<Transition> {
        let placed = driver.catch_up_receive() > 0;
        let head = match &mut self.link {
            Link::Connected(connection) => {
                if placed {
                    connection.to_driver = None;
                }
                connection.from_driver.as_mut().map(|(head, _)| head)
            }
            _ => None,
        };
        let is_read = head.as_ref().is_some_and(|head| head.is_some());
        let given_back = driver.catch_up_transmit(u16::from(is_read)) > 0;
        if let Some(head) = head.filter(|_| given_back) {
            *head = None;
        }
        let is_end_marked = placed && self.state() == LinkState::Leaving;
        is_end_marked.then(|| self.follow(LinkEvent::EndMarked)).flatten()
    }

    /// Sends what had to wait for the commit, and returns whether there was anything. An error comes again with the next use
    /// of the socket.
    pub(in super::super) fn send_committed(&mut self) -> bool {
        let has_messages = match &self.link {
            Link::Connected(connection) => connection.is_congested(),
            _ => false,
        };
        if has_messages {
            let _ = self.flush();
        }
        if let Some(express) = &mut self.express {
            express.send_committed();
        }
        has_messages
    }
}
