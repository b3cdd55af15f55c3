//! The commands that were spawned in a guest.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use vvu_init::protocol::End;

/// The spawned commands of a guest.
#[derive(Debug, Default)]
pub(crate) struct Spawned {
    /// The exit code with which each running command is to end.
    expected: BTreeMap<String, i32>,
    /// How commands have ended, until a wait asks for it.
    ended: BTreeMap<String, End>,
}

impl Spawned {
    /// Expects a new command to end with this exit code.
    pub(crate) fn expect(&mut self, name: &str, code: i32) {
        self.ended.remove(name);
        self.expected.insert(name.to_owned(), code);
    }

    /// Allows a command to end in any way.
    pub(crate) fn allow(&mut self, name: &str) {
        self.expected.remove(name);
    }

    /// Forgets all commands and returns the names of those that were expected to run on or to end in a certain way.
    pub(crate) fn clear(&mut self) -> Vec<String> {
        self.ended.clear();
        std::mem::take(&mut self.expected).into_keys().collect()
    }

    /// Records the end of a command; fails if it is not as expected.
    pub(crate) fn record(&mut self, name: String, end: End) -> Result<()> {
        if self.expected.remove(&name).is_some_and(|code| end != End::Code(code)) {
            bail!("the spawned command {name} ended with {}", ending(end));
        }
        self.ended.insert(name, end);
        Ok(())
    }

    /// How a command has ended, if it has; asked once.
    pub(crate) fn take_end(&mut self, name: &str) -> Option<End> {
        self.ended.remove(name)
    }
}

/// How a command ended, as part of a message.
#[must_use]
pub fn ending(end: End) -> String {
    match end {
        End::Code(code) => format!("exit code {code}"),
        End::Signal(signal) => format!("signal {signal}"),
    }
}
