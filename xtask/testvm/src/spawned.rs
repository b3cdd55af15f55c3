//! The commands that were spawned in a guest.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};
use vvu_init::protocol::End;

/// The spawned commands of a guest.
#[derive(Debug, Default)]
pub(crate) struct Spawned {
    running: BTreeSet<String>,
    /// The exit code with which each running command is to end, for those that may not end in any way.
    expected: BTreeMap<String, i32>,
    /// How commands have ended, until a wait asks for it.
    ended: BTreeMap<String, End>,
    /// How commands have ended that were not started again.
    last_ends: BTreeMap<String, End>,
}

impl Spawned {
    /// Expects a new command to end with this exit code.
    pub(crate) fn expect(&mut self, name: &str, code: i32) {
        self.ended.remove(name);
        self.last_ends.remove(name);
        self.running.insert(name.to_owned());
        self.expected.insert(name.to_owned(), code);
    }

    /// Allows a command to end in any way.
    pub(crate) fn allow(&mut self, name: &str) {
        self.expected.remove(name);
    }

    /// Forgets a command that was not started.
    pub(crate) fn forget(&mut self, name: &str) {
        self.expected.remove(name);
        self.running.remove(name);
    }

    /// Forgets all commands and returns the names of those that were expected to run on or to end in a certain way.
    pub(crate) fn clear(&mut self) -> Vec<String> {
        std::mem::take(self).expected.into_keys().collect()
    }

    /// Records the end of a command; fails if it is not as expected.
    pub(crate) fn record(&mut self, name: String, end: End) -> Result<()> {
        self.running.remove(&name);
        self.last_ends.insert(name.clone(), end);
        if self.expected.remove(&name).is_some_and(|code| end != End::Code(code)) {
            bail!("the spawned command {name} ended with {}", ending(end));
        }
        self.ended.insert(name, end);
        Ok(())
    }

    /// How a command has ended, if it has; asked once.
    ///
    /// # Errors
    ///
    /// Fails if it neither runs nor has ended since it was asked for.
    pub(crate) fn take_end(&mut self, name: &str) -> Result<Option<End>> {
        let end = self.ended.remove(name);
        if end.is_none() && !self.running.contains(name) {
            bail!("there is no spawned command {name} to wait for: it does not run");
        }
        Ok(end)
    }

    /// How a command has ended that does not run any more.
    pub(crate) fn last_end(&self, name: &str) -> Option<End> {
        self.last_ends.get(name).copied()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_for_a_command_that_does_not_run_ends_at_once() {
        let mut spawned = Spawned::default();
        let error = spawned.take_end("backend").expect_err("never started").to_string();
        assert!(error.contains("no spawned command backend"), "{error}");
        spawned.expect("backend", 0);
        assert_eq!(spawned.take_end("backend").expect("runs"), None);
        spawned.allow("backend");
        assert_eq!(spawned.take_end("backend").expect("still runs"), None);
        spawned.record("backend".to_owned(), End::Signal(9)).expect("allowed");
        assert_eq!(spawned.take_end("backend").expect("ended"), Some(End::Signal(9)));
        spawned.take_end("backend").expect_err("asked for already");
        assert_eq!(spawned.last_end("backend"), Some(End::Signal(9)));
        spawned.expect("backend", 0);
        assert_eq!(spawned.last_end("backend"), None, "it runs again");
        assert_eq!(spawned.clear(), ["backend"]);
        spawned.take_end("backend").expect_err("gone");
        spawned.expect("backend", 0);
        spawned.forget("backend");
        spawned.take_end("backend").expect_err("not started");
    }
}
