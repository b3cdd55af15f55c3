//! The modules of a kernel: finds those that a guest needs, in the order in which they can be loaded.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use elf::ElfBytes;
use elf::endian::AnyEndian;

use super::image;

/// The endings of a module's file; the kernel's build may have compressed it.
const ENDINGS: [&str; 4] = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"];
/// The list of the modules that are part of the kernel's image (Documentation/kbuild/kbuild.rst of Linux).
const BUILTIN: &str = "modules.builtin";
/// Module files that are larger are refused.
const MAX_SIZE: u64 = 64 << 20;
/// Folders below the one with the modules may be nested this deep.
const MAX_DEPTH: usize = 16;

/// The modules of a kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// A module that can be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores in place of hyphens as in `/proc/modules`.
    pub name: String,
    /// The uncompressed file, with its signature if it has one.
    pub bytes: Vec<u8>,
}

impl Modules {
    /// Finds the modules below a directory, such as `/lib/modules/VERSION`.
    ///
    /// # Errors
    ///
    /// The directory cannot be read, or holds no module.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut modules = Self::default();
        modules.scan(dir, MAX_DEPTH)?;
        ensure!(!modules.files.is_empty(), "there is no kernel module (NAME.ko) below {}", dir.display());
        if let Ok(text) = fs::read_to_string(dir.join(BUILTIN)) {
            let names = text.lines().filter_map(|path| module_name(path.rsplit('/').next()?));
            modules.builtin = names.collect();
        }
        Ok(modules)
    }

    /// The number of modules.
    #[must_use]
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Tells whether there is no module.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Reads the modules of these names and those that they depend on, in the order in which they are to be loaded.
    /// What is part of the kernel's image needs no module.
    ///
    /// # Errors
    ///
    /// One is neither there nor in the kernel's image, or cannot be read.
    pub fn load_order<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Result<Vec<Module>> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            self.add(&normal(name), &mut seen, &mut order)?;
        }
        Ok(order)
    }

    fn add(&self, name: &str, seen: &mut BTreeSet<String>, order: &mut Vec<Module>) -> Result<()> {
        // Whoever is seen twice is loaded already, or will be before the one that asks: modules cannot need each other.
        if self.builtin.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self.files.get(name).with_context(|| {
            format!("the kernel has no module {name}, neither as a file nor in its image ({BUILTIN})")
        })?;
        let module = read(name, path).with_context(|| format!("the module {}", path.display()))?;
        for needed in depends(&module.bytes).with_context(|| format!("the module {}", path.display()))? {
            self.add(&needed, seen, order).with_context(|| format!("{name} needs {needed}"))?;
        }
        order.push(module);
        Ok(())
    }

    fn scan(&mut self, dir: &Path, depth: usize) -> Result<()> {
        let unreadable = || format!("cannot read {}", dir.display());
        for entry in fs::read_dir(dir).with_context(unreadable)? {
            let entry = entry.with_context(unreadable)?;
            let path = entry.path();
            // Not through links: `build` and `source` lead out of the directory.
            let kind = entry.file_type().with_context(|| format!("cannot read {}", path.display()))?;
            if kind.is_dir() && depth > 0 {
                self.scan(&path, depth - 1)?;
            } else if kind.is_file()
                && let Some(name) = entry.file_name().to_str().and_then(module_name)
            {
                self.files.insert(name, path);
            }
        }
        Ok(())
    }
}

/// The name of the module in a file of this name; `None` if it holds none.
fn module_name(file: &str) -> Option<String> {
    ENDINGS.iter().find_map(|ending| file.strip_suffix(ending)).map(normal)
}

/// A module's name as the kernel writes it.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn read(name: &str, path: &Path) -> Result<Module> {
    let size = fs::metadata(path).context("cannot be read")?.len();
    ensure!(size <= MAX_SIZE, "has {size} bytes, more than any module");
    let bytes = image::plain_elf(fs::read(path).context("cannot be read")?)?;
    Ok(Module { name: name.to_owned(), bytes })
}

/// The names in a module's `depends=`, which modpost wrote into its section `.modinfo`.
fn depends(module: &[u8]) -> Result<Vec<String>> {
    let file = ElfBytes::<AnyEndian>::minimal_parse(module).context("is no ELF file")?;
    let section = file.section_header_by_name(".modinfo").context("has no section headers")?;
    let Some(section) = section else { bail!("has no section .modinfo") };
    let (bytes, _) = file.section_data(&section).context("has a damaged section .modinfo")?;
    let fields = bytes.split(|byte| *byte == 0).filter_map(|field| std::str::from_utf8(field).ok());
    let names = fields.filter_map(|field| field.strip_prefix("depends=")).flat_map(|names| names.split(','));
    Ok(names.filter(|name| !name.is_empty()).map(normal).collect())
}

#[cfg(test)]
#[path = "modules_test.rs"]
mod tests;
