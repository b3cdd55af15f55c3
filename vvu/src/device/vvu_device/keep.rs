//! Saves a device for a successor, and takes it over.

use serde::{Deserialize, Serialize};

use super::super::common_config::SavedCommonConfig;
use super::super::relay::SavedRelay;
use super::super::resources::Ledgers;
use super::*;
use crate::durable::{Adopted, RestoreError, SocketSlot, Store};
use crate::spec::virtio::isr;

/// A [`VvuDevice`] as it is saved.
#[derive(Debug, Serialize, Deserialize)]
struct SavedDevice {
    config_space: Vec<u8>,
    common: SavedCommonConfig,
    isr: u8,
    backend_up: bool,
    vector_select: u16,
    relay: SavedRelay,
}

impl VvuDevice {
    /// Makes the device fit to be saved: its host commits after each call, and takes the ledgers of its sockets from `store`.
    #[doc(hidden)]
    pub fn keep_state(&mut self, store: &Store) {
        self.relay.resources.ledgers = Some(Ledgers {
            frontend: store.ledger(SocketSlot::Frontend),
            channel: store.ledger(SocketSlot::Channel),
            express: store.ledger(SocketSlot::Express),
        });
    }

    pub(super) fn save_changes(&mut self) -> Option<Vec<u8>> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        let saved = SavedDevice {
            config_space: self.config_space.save(),
            common: self.common.save(),
            isr: self.isr,
            backend_up: self.backend_up,
            vector_select: self.vector_select,
            relay: self.relay.save(),
        };
        serde_json::to_vec(&saved).inspect_err(|error| log::error!("cannot save the device: {error}")).ok()
    }

    /// Restores what was saved. Interrupts that the predecessor may have been about to send are sent, perhaps once more.
    pub(super) fn take_over<H: Host>(
        &mut self,
        host: &H,
        saved: &[u8],
        left: &mut Adopted,
    ) -> Result<(), RestoreError> {
        let saved: SavedDevice = serde_json::from_slice(saved)?;
        let no_store = || RestoreError::Value("the device has no store".to_owned());
        let ledgers = self.relay.resources.ledgers.ok_or_else(no_store)?;
        if !self.config_space.restore(&saved.config_space) {
            return Err(RestoreError::Value("the configuration space has another size".to_owned()));
        }
        self.common.restore(saved.common)?;
        (self.isr, self.backend_up, self.vector_select) = (saved.isr, saved.backend_up, saved.vector_select);
        self.relay.restore(saved.relay, ledgers, left)?;
        let (relay, mut driver) = self.split(host);
        if let Some(transition) = relay.catch_up(&mut driver) {
            self.announce(host, &transition);
        }
        if self.common.driver_ok() {
            self.isr |= isr::CONFIG | isr::QUEUE;
            let CommonConfig { config_vector, rx, tx, .. } = &self.common;
            for vector in [*config_vector, rx.vector, tx.vector] {
                if vector != NO_VECTOR {
                    host.signal(vector);
                }
            }
        }
        self.changed = true;
        self.relay.resources.events.again();
        Ok(())
    }
}
