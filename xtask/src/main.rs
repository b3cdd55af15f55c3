//! `cargo xtask`: builds the guests, runs the VMs and proves VVU end to end.

mod accel;
mod apt;
mod cache;
mod children;
mod image;
mod logged;
mod packages;
mod progress;
mod qemu;

fn main() -> anyhow::Result<()> {
    if std::env::args().nth(1).as_deref() == Some(accel::PROBE_COMMAND) {
        return accel::serve_probe();
    }
    println!("{:#?}", accel::choose(accel::Request::Auto));
    let progress = progress::Progress::new(false);
    let cache = cache::Cache::open(&progress)?;
    let binaries = image::GuestBinaries::build(&progress)?;
    let tools = image::GuestTools::obtain(&progress, &cache)?;
    println!("{:?}", image::build_base(&cache, &binaries, &tools)?);
    Ok(())
}
