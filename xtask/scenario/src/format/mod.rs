//! The format of scenario files: which VMs to start, what to do in them and what must come of it, as data.
//!
//! `scenarios/README.md` describes it for people; the types here define it, for serde and for the JSON Schema alike.

mod check;
mod check_steps;
mod files;
mod layout;
mod matrix;
mod message;
mod placed;
mod scenario;
mod schema;
mod step;
mod step_host;
mod text;
mod upgrade;
mod version;

pub use files::{find, list};
pub use layout::{laid_out, to_text};
pub use matrix::{Axis, Impossible, Matrix};
pub use message::{ExpectedMessage, find_in_order};
pub use placed::Placed;
pub use scenario::{
    DiskFacts, DiskSpec, KernelSpec, Memory, Pattern, ROUND, Scenario, VmSpec, VvuFacts, VvuSpec, needs,
};
pub use schema::{SCHEMAS, SchemaFile};
pub use step::{Milestone, RunStep, Signal, Step};
pub use step_host::{AttachStep, DetachStep, ExpectedReply, QmpStep, TraceStep};
pub use text::Values;
pub use upgrade::upgraded;
pub use version::is_old;

#[cfg(test)]
mod any_text_test;
#[cfg(test)]
#[path = "format_test.rs"]
mod tests;
