//! `cargo xtask`: builds the guests, runs the VMs and proves VVU end to end.

mod apt;
mod cache;
mod children;
mod logged;
mod packages;
mod progress;
mod qemu;

fn main() -> anyhow::Result<()> {
    let progress = progress::Progress::new(false);
    let cache = cache::Cache::open(&progress)?;
    let qemu = qemu::Qemu::locate(&progress, &cache, None)?;
    println!("{qemu:?} {:?} {}", qemu.argv_prefix(), qemu.probe_device("virtio-iommu-pci"));
    Ok(())
}
