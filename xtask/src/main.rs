//! `cargo xtask`: builds the guests, runs the VMs and proves VVU end to end.

mod apt;
mod cache;
mod children;
mod kernel;
mod logged;
mod packages;
mod progress;
mod qemu;

use clap::Parser;

/// Until the command line proper is there: what this branch can be tried with.
#[derive(Parser)]
enum Trial {
    Qemu { qemu: Option<std::path::PathBuf> },
    Kernel(kernel::KernelOptions),
}

fn main() -> anyhow::Result<()> {
    let progress = progress::Progress::new(false);
    let cache = cache::Cache::open(&progress)?;
    match Trial::parse() {
        Trial::Qemu { qemu } => {
            println!("{}", qemu::Qemu::locate(&progress, &cache, qemu.as_deref())?.argv_prefix().join(" "));
        }
        Trial::Kernel(options) => println!("{:#?}", kernel::Kernel::obtain(&progress, &cache, &options)?),
    }
    Ok(())
}
