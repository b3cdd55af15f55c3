//! `vvu device memory`: how this VM maps the sibling's memory, and how fast it reads and writes it.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use vvu::pci::BarFile;
use vvu::{Bdf, WindowUse, open_vfio_with};

/// Bytes that are mapped and copied over and over: more than a processor's caches hold.
const LENGTH: usize = 64 << 20;
/// Bytes of a copy, as in a large request.
const PIECE: usize = 128 << 10;
/// List of the memory types of mappings (Linux, arch/x86/mm/pat), in the kernel's debugfs.
const TYPES: &str = "/sys/kernel/debug/x86/pat_memtype_list";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// PCI address of the vvu device, which no back-end may use
    #[arg(long, value_name = "BDF")]
    vfio: Bdf,
    /// Measure writes too, which overwrite the sibling's RAM
    #[arg(long)]
    overwrite: bool,
    /// Seconds for each figure
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
}

/// Prints a line for the BAR and one for the window, or why there is none.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let bdf = args.vfio;
    let bar = open_vfio_with(bdf, WindowUse::Off)?;
    let address = bar_address(bdf)?;
    // The window's file has the sibling's RAM behind the header, and so it is measured there in both.
    let header = bar.window_sizes()?.map_or(0, |sizes| sizes.header);
    let figures = args.measure(bar.shared_memory()?, header, address)?;
    say(&format!("BAR: {figures}"))?;
    drop(bar);
    match open_vfio_with(bdf, WindowUse::Required) {
        Ok(window) => {
            let figures =
                args.measure(window.shared_memory()?, header, memory_address(window.window_name())?)?;
            say(&format!("window: {figures}"))
        }
        Err(error) => say(&format!("window: none, {error}")),
    }
}

impl Args {
    /// Maps a part of the memory, and says what type of mapping it is and how fast copies are.
    fn measure(&self, memory: BarFile, header: u64, address: u64) -> anyhow::Result<String> {
        let BarFile { file, offset } = memory;
        let mapping: MmapRegion = MmapRegion::from_file(FileOffset::new(file, offset + header), LENGTH)
            .context("cannot map 64 MiB of the sibling's memory")?;
        let mut piece = vec![0; PIECE];
        // Makes the kernel map every page.
        for at in (0..LENGTH).step_by(PIECE) {
            mapping.as_volatile_slice().read_slice(&mut piece, at)?;
        }
        let kind = memory_type(address + header).unwrap_or_else(|| format!("unknown ({TYPES} does not say)"));
        let read = self.speed(|at| mapping.as_volatile_slice().read_slice(&mut piece, at))?;
        let mut text = format!("{kind}, read {read:.0} MB/s");
        if self.overwrite {
            let write = self.speed(|at| mapping.as_volatile_slice().write_slice(&piece, at))?;
            text += &format!(", write {write:.0} MB/s");
        }
        Ok(text)
    }

    /// Megabytes a second that `copy`, which gets an offset, moves.
    fn speed<E>(&self, mut copy: impl FnMut(usize) -> Result<(), E>) -> Result<f64, E> {
        let (start, limit) = (Instant::now(), Duration::from_secs(self.seconds));
        let mut copies = 0_u32;
        while start.elapsed() < limit {
            for at in (0..LENGTH).step_by(PIECE) {
                copy(at)?;
                copies += 1;
            }
        }
        Ok(f64::from(copies) * 0.131_072 / start.elapsed().as_secs_f64())
    }
}

/// The physical address of the shared memory BAR.
fn bar_address(bdf: Bdf) -> anyhow::Result<u64> {
    let text = read(Path::new(&format!("/sys/bus/pci/devices/{bdf}/resource")))?;
    let word = text.lines().nth(4).and_then(|line| line.split_whitespace().next());
    number(word.context("the device has no BAR 4")?)
}

/// The physical address of persistent memory.
fn memory_address(name: Option<&str>) -> anyhow::Result<u64> {
    let name = name.context("the window has no name")?;
    number(read(Path::new(&format!("/sys/block/{name}/device/resource")))?.trim())
}

/// The type of the mapping that has this physical address.
fn memory_type(address: u64) -> Option<String> {
    fs::read_to_string(TYPES).ok()?.lines().find_map(|line| type_of(line, address))
}

/// The type in a line such as `PAT: [mem 0x0000000140000000-0x0000000162200000] write-back`, if it is about this address.
fn type_of(line: &str, address: u64) -> Option<String> {
    let (range, kind) = line.split_once("[mem ")?.1.split_once("] ")?;
    let (first, end) = range.split_once('-')?;
    (number(first).ok()? <= address && address < number(end).ok()?).then(|| kind.trim().to_owned())
}

fn number(text: &str) -> anyhow::Result<u64> {
    let digits = text.trim_start_matches("0x");
    u64::from_str_radix(digits, 16).with_context(|| format!("{text:?} is no address"))
}

fn read(path: &Path) -> anyhow::Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(!text.trim().is_empty(), "{} is empty", path.display());
    Ok(text)
}

fn say(line: &str) -> anyhow::Result<()> {
    writeln!(io::stdout(), "{line}").context("cannot write to standard output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_of_an_address_is_found() {
        let line = "PAT: [mem 0x0000000140000000-0x0000000162200000] write-back";
        assert_eq!(type_of(line, 0x1_4000_0000).as_deref(), Some("write-back"));
        assert_eq!(type_of(line, 0x1_621f_ffff).as_deref(), Some("write-back"));
        assert_eq!(type_of(line, 0x1_6220_0000), None);
        assert_eq!(type_of(line, 0x1_3fff_ffff), None);
        for other in ["PAT memtype list:", "", "[mem 0x1-", "[mem x-y] z", "[mem 0x0-0xq] z"] {
            assert_eq!(type_of(other, 0), None, "{other}");
        }
    }
}
