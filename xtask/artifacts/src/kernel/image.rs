//! Reads a kernel image: its version, its configuration, and whether a VMM can start it.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use memchr::memmem;

use super::config::{self, Config};
use crate::machine::KernelFormat;

/// Decompressed kernels larger than this are refused.
const MAX_SIZE: u64 = 1 << 30;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: where a PVH loader enters the kernel.
const PHYS32_ENTRY: u32 = 18;
/// The first bytes of an ELF file.
const ELF: &[u8] = b"\x7fELF";
const PT_NOTE: u32 = 4;
const EM_X86_64: u16 = 62;

/// A kernel image that a VMM can start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Image {
    /// The release, such as `6.12.57`.
    pub version: String,
    /// The configuration; `None` if the kernel was built without `CONFIG_IKCONFIG` and no file beside it has it.
    pub config: Option<Config>,
}

/// Reads a kernel of this format.
///
/// # Errors
///
/// The file has another format, is a vmlinux without PVH entry, or is compressed in a way this machine cannot undo.
pub(super) fn inspect(path: &Path, format: KernelFormat) -> Result<Image> {
    let size = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    if size > MAX_SIZE {
        bail!("{} has {size} bytes, more than any kernel", path.display());
    }
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut image = inspect_bytes(&bytes, format)
        .with_context(|| format!("{} cannot be used as kernel", path.display()))?;
    if image.config.is_none() {
        let dir = path.parent().unwrap_or(Path::new("."));
        let beside = [&*format!("config-{}", image.version), ".config", "config"].map(|name| dir.join(name));
        image.config =
            beside.iter().find_map(|path| fs::read_to_string(path).ok()).map(|text| config::parse(&text));
    }
    Ok(image)
}

fn inspect_bytes(bytes: &[u8], format: KernelFormat) -> Result<Image> {
    match format {
        KernelFormat::Pvh => inspect_pvh(bytes),
        KernelFormat::Arm64Image if field(bytes, 56) == Some(*b"ARM\x64") => inspect_plain(bytes),
        KernelFormat::Arm64Image => {
            bail!(
                "it is not an uncompressed arm64 Image, which comes out of a kernel build (arch/arm64/boot/Image)"
            )
        }
    }
}

fn inspect_pvh(bytes: &[u8]) -> Result<Image> {
    if bytes.starts_with(ELF) {
        if !has_pvh_note(bytes) {
            bail!(
                "it is an ELF file without PVH entry; build it with CONFIG_PVH=y, or give its bzImage instead"
            );
        }
        return inspect_plain(bytes);
    }
    let payload = bzimage_payload(bytes).context(
        "it is neither an x86-64 vmlinux (ELF) nor a bzImage; both come out of a kernel build (arch/x86/boot/bzImage)",
    )?;
    inspect_plain(&decompress(payload)?)
}

/// The ELF file with a PVH entry in a bzImage, which starts without decompressing itself in the guest; `None` if there is
/// none that this machine can take out.
pub(super) fn pvh_payload(bytes: &[u8]) -> Option<Vec<u8>> {
    let elf = decompress(bzimage_payload(bytes)?).ok()?;
    has_pvh_note(&elf).then_some(elf)
}

/// What a compressed file holds; the bytes themselves if they are an ELF file.
///
/// # Errors
///
/// It is compressed in a way this machine cannot undo, or damaged.
pub(super) fn plain_elf(bytes: Vec<u8>) -> Result<Vec<u8>> {
    if bytes.starts_with(ELF) {
        return Ok(bytes);
    }
    let Some(program) = compression(&bytes) else { bail!("it is compressed in an unknown way") };
    let elf = filter(program, &bytes)?;
    if !elf.starts_with(ELF) {
        bail!("it is damaged: it holds no ELF file");
    }
    Ok(elf)
}

fn inspect_plain(bytes: &[u8]) -> Result<Image> {
    let version = find_version(bytes).context("no \"Linux version\" in it; is it a kernel?")?;
    let config = match ikconfig(bytes) {
        None => None,
        Some(packed) => {
            let text = filter("gzip", packed).context("its embedded configuration is damaged")?;
            Some(config::parse(&String::from_utf8_lossy(&text)))
        }
    };
    Ok(Image { version, config })
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    field(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    field(bytes, at).map(u32::from_le_bytes)
}

fn usize_at(bytes: &[u8], at: usize) -> Option<usize> {
    field(bytes, at).map(u64::from_le_bytes)?.try_into().ok()
}

/// Tells whether an ELF-64 file for x86-64 has the note that PVH loaders look for.
fn has_pvh_note(elf: &[u8]) -> bool {
    note_segments(elf).is_some_and(|segments| segments.iter().any(|segment| has_entry_note(segment)))
}

fn note_segments(elf: &[u8]) -> Option<Vec<&[u8]>> {
    const CLASS_64_LITTLE_ENDIAN: [u8; 2] = [2, 1];
    if field(elf, 4)? != CLASS_64_LITTLE_ENDIAN || u16_at(elf, 18)? != EM_X86_64 {
        return None;
    }
    let (offset, size, count) = (usize_at(elf, 32)?, usize::from(u16_at(elf, 54)?), u16_at(elf, 56)?);
    let mut segments = Vec::new();
    for index in 0..usize::from(count) {
        let header = offset.checked_add(index * size)?;
        let header = elf.get(header..)?;
        if u32_at(header, 0)? == PT_NOTE {
            let (start, length) = (usize_at(header, 8)?, usize_at(header, 32)?);
            segments.push(elf.get(start..start.checked_add(length)?)?);
        }
    }
    Some(segments)
}

fn has_entry_note(mut notes: &[u8]) -> bool {
    let padded = |size: u32| usize::try_from(size).ok()?.checked_next_multiple_of(4);
    while let (Some(name_size), Some(size), Some(kind)) =
        (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8))
    {
        if kind == PHYS32_ENTRY && notes.get(12..16) == Some(b"Xen\0") && name_size == 4 {
            return true;
        }
        let next = padded(name_size)
            .zip(padded(size))
            .and_then(|(name, desc)| name.checked_add(desc)?.checked_add(12));
        let Some(rest) = next.and_then(|next| notes.get(next..)) else { return false };
        notes = rest;
    }
    false
}

/// The compressed kernel in a bzImage, found by its setup header (Documentation/arch/x86/boot.rst).
fn bzimage_payload(bytes: &[u8]) -> Option<&[u8]> {
    const MAGIC: usize = 0x202;
    if field(bytes, MAGIC)? != *b"HdrS" || u16_at(bytes, 0x206)? < 0x208 {
        return None;
    }
    let setup_sectors = match *bytes.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = ((setup_sectors + 1) * 512).checked_add(usize::try_from(u32_at(bytes, 0x248)?).ok()?)?;
    let length = usize::try_from(u32_at(bytes, 0x24c)?).ok()?;
    bytes.get(start..start.checked_add(length)?)
}

/// The program that decompresses `bytes`.
fn compression(bytes: &[u8]) -> Option<&'static str> {
    const FORMATS: [(&[u8], &str); 5] = [
        (b"\x1f\x8b", "gzip"),
        (b"\xfd7zXZ", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x02\x21\x4c\x18", "lz4"),
        (b"BZh", "bzip2"),
    ];
    FORMATS.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, program)| *program)
}

fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    let Some(program) = compression(payload) else {
        bail!("the bzImage is compressed in an unknown way; give the vmlinux it was made from");
    };
    filter(program, payload).context("give the vmlinux that the bzImage was made from")
}

/// Runs `bytes` through `PROGRAM -dc`.
///
/// The exit status does not count: a bzImage's payload has four bytes after the end of the compressed stream.
fn filter(program: &str, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new(program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run {program} to decompress it"))?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            // A program that stopped reading writes nothing more either.
            let _ = stdin.map(|mut stdin| stdin.write_all(bytes));
        });
        let mut output = Vec::new();
        let result = stdout.map_or(Ok(0), |stdout| stdout.take(MAX_SIZE).read_to_end(&mut output));
        result.map(|_| output)
    });
    // It may still have output beyond MAX_SIZE.
    let _ = child.kill();
    child.wait().with_context(|| format!("cannot wait for {program}"))?;
    let output = output.with_context(|| format!("cannot read from {program}"))?;
    if output.is_empty() {
        bail!("{program} cannot decompress it");
    }
    Ok(output)
}

/// The gzip stream that `CONFIG_IKCONFIG` puts between two markers.
fn ikconfig(bytes: &[u8]) -> Option<&[u8]> {
    let start = memmem::find(bytes, b"IKCFG_ST\x1f\x8b")? + b"IKCFG_ST".len();
    let length = memmem::find(bytes.get(start..)?, b"IKCFG_ED")?;
    bytes.get(start..start + length)
}

fn find_version(bytes: &[u8]) -> Option<String> {
    const MARK: &[u8] = b"Linux version ";
    // The first hit may be a format string.
    memmem::find_iter(bytes, MARK).find_map(|at| {
        let text = bytes.get(at + MARK.len()..)?;
        let text = text.get(..text.len().min(64))?;
        let end = text.iter().position(|byte| *byte <= b' ')?;
        let text = std::str::from_utf8(&text[..end]).ok()?;
        text.starts_with(|c: char| c.is_ascii_digit()).then(|| text.to_owned())
    })
}

#[cfg(test)]
#[path = "image_test.rs"]
mod tests;
