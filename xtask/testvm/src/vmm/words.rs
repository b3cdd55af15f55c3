//! The arguments of a VMM while they are written.

/// Arguments, one word each.
#[derive(Default)]
pub(super) struct Words(Vec<String>);

impl Words {
    /// Adds an option without a value.
    pub(super) fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.to_owned());
        self
    }

    /// Adds an option and its value.
    pub(super) fn pair(&mut self, name: &str, value: impl Into<String>) -> &mut Self {
        self.0.push(name.to_owned());
        self.0.push(value.into());
        self
    }

    /// The words, in the order in which they were added.
    pub(super) fn done(self) -> Vec<String> {
        self.0
    }
}
