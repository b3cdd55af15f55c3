//! Command-line options of `cargo xtask bench`.

use std::path::PathBuf;

use vvu_testvm::SetupOptions;

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// What to measure [default: everything]
    #[arg(value_enum)]
    pub(crate) what: Option<What>,
    /// Rounds, each with new connections and VMs
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,
    /// Seconds that each test of a round takes
    #[arg(long, value_name = "S", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) seconds: u64,
    /// VMs: measure only these variants
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = ["vvu", "vvu-no-express", "plain", "qsd", "qemu"])]
    pub(crate) only: Vec<String>,
    /// VMs: the --poll-us of our back-ends, in the device VM and on the host
    #[arg(long, value_name = "N")]
    pub(crate) poll_us: Option<u32>,
    /// VMs: number of the first round, which decides which variant goes first
    #[arg(long, value_name = "N", default_value_t = 1, hide = true, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) first_round: u32,
    /// Compare with the JSON of an earlier run
    #[arg(long, value_name = "FILE")]
    pub(crate) baseline: Option<PathBuf>,
    /// Print the results as JSON, and nothing else, on stdout
    #[arg(long)]
    pub(crate) json: bool,
    /// Run the VMs with KVM in a VM whose CPU QEMU emulates, on a machine without KVM
    #[arg(long, conflicts_with_all = ["prepared", "accel", "qemu", "file"])]
    pub(crate) nested: bool,
    #[command(flatten)]
    pub(crate) setup: SetupOptions,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum What {
    /// The chain in one process, without VMs
    Chain,
    /// The disk of a sibling VM, and how long it takes to appear
    Vms,
    /// The sibling's memory in the device VM, by the BAR and in the window: type and speed of the mappings, and a disk
    /// that is served through them; not among everything
    Memory,
}
