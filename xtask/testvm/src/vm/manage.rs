//! Requests to the VMM of a running VM.

use std::time::Instant;

use anyhow::{Result, bail};
use serde_json::Value;

use super::{State, Vm, alive};
use crate::qmp::{Exchange, Qmp, Reply};
use crate::watch::Watch;

impl Vm {
    /// Carries out exchanges with the VMM.
    ///
    /// # Errors
    ///
    /// Fails as every wait does, after `deadline`, if the VM is not managed, and if the VMM or the guest refuses.
    pub(crate) fn manage(&self, exchanges: &[Exchange], deadline: Instant) -> Result<()> {
        let managed =
            |qmp: &mut Qmp, check: &mut dyn FnMut() -> Result<()>| qmp.carry_out(exchanges, deadline, check);
        self.lock().managed(&self.watch, managed)
    }

    /// Sends a QMP command to the VM's QEMU and returns the answer.
    ///
    /// # Errors
    ///
    /// Fails as every wait does, after `deadline`, and if the VM is not managed.
    pub fn qmp(&self, command: &str, arguments: &Value, deadline: Instant) -> Result<Reply> {
        let execute = |qmp: &mut Qmp, check: &mut dyn FnMut() -> Result<()>| {
            qmp.execute(command, arguments, deadline, check)
        };
        self.lock().managed(&self.watch, execute)
    }

    /// Waits for an event of the VM's QEMU, of this name and with these fields among its data, that came after the last
    /// command was sent.
    ///
    /// # Errors
    ///
    /// Fails as every wait does, after `deadline`, if the VM is not managed, and if the guest refuses to let go of a
    /// device.
    pub fn qmp_event(&self, name: &str, data: &Value, deadline: Instant) -> Result<Value> {
        let event =
            |qmp: &mut Qmp, check: &mut dyn FnMut() -> Result<()>| qmp.event(name, data, deadline, check);
        self.lock().managed(&self.watch, event)
    }
}

impl State {
    /// Speaks with the VMM through its management connection.
    fn managed<T>(
        &mut self,
        watch: &Watch,
        speak: impl FnOnce(&mut Qmp, &mut dyn FnMut() -> Result<()>) -> Result<T>,
    ) -> Result<T> {
        let Self { vmm, console, control, vmm_log, management, .. } = self;
        let Some(qmp) = management else {
            bail!("VM {}: it is not managed: its VMM takes no requests while it runs", self.name);
        };
        let spoken = speak(qmp, &mut || {
            console.check()?;
            alive(vmm, vmm_log)?;
            control.check()?;
            watch.check()
        });
        spoken.map_err(|error| self.explain(&error))
    }
}
