//! Kernel configuration: what fragments ask for, whether a kernel has it, and if not, why.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The options that the project's first description names. Linux 5.10 needed no others.
pub(super) const SEED: [&str; 4] = ["CONFIG_ACPI", "CONFIG_VFIO", "CONFIG_VFIO_PCI", "CONFIG_VIRTIO_IOMMU"];

/// Symbols with their values as written in a `.config`; a symbol that is off is absent.
pub(super) type Config = BTreeMap<String, String>;

/// Reads a `.config`.
pub(super) fn parse(text: &str) -> Config {
    text.lines()
        .filter_map(|line| line.trim().split_once('='))
        .filter(|(symbol, value)| symbol.starts_with("CONFIG_") && *value != "n")
        .map(|(symbol, value)| (symbol.to_owned(), value.to_owned()))
        .collect()
}

/// The options that fragments ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Requests {
    wanted: BTreeMap<String, Request>,
    optional: BTreeSet<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Request {
    /// `n` for "is not set".
    value: String,
    /// The option matters for build time or speed only, so a kernel of the user need not have it.
    preference: bool,
}

/// A request that a configuration does not meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unmet {
    /// The symbol, with its `CONFIG_`.
    pub symbol: String,
    /// The value asked for.
    pub want: String,
    /// The value it has; `n` when it is off or unknown.
    pub got: String,
    /// The fragment allows it to be absent.
    pub optional: bool,
}

impl fmt::Display for Unmet {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: want {}, got {}", self.symbol, self.want, self.got)?;
        if SEED.contains(&self.symbol.as_str()) {
            write!(out, " (one of the four options VVU's description names)")?;
        }
        Ok(())
    }
}

impl Requests {
    /// Adds a fragment; what it says replaces what earlier ones said.
    ///
    /// Besides the lines of a `.config` it knows `# optional: CONFIG_X`, and `[preference]` in a comment, which holds
    /// up to the next empty line.
    ///
    /// # Errors
    ///
    /// A line is neither of these nor a comment.
    pub(super) fn add(&mut self, name: &str, text: &str) -> Result<()> {
        let mut preference = false;
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            let mut request = |symbol: &str, value: &str| {
                let request = Request { value: value.to_owned(), preference };
                self.wanted.insert(symbol.to_owned(), request);
            };
            if line.is_empty() {
                preference = false;
            } else if let Some(comment) = line.strip_prefix('#') {
                let comment = comment.trim();
                if let Some(symbol) = comment.strip_suffix(" is not set") {
                    request(symbol, "n");
                } else if let Some(symbol) = comment.strip_prefix("optional:") {
                    self.optional.insert(symbol.trim().to_owned());
                } else if comment.contains("[preference]") {
                    preference = true;
                }
            } else if let Some((symbol, value)) = line.split_once('=')
                && symbol.starts_with("CONFIG_")
            {
                request(symbol, value);
            } else {
                bail!("{name}, line {}: {line:?} is neither CONFIG_X=value nor a comment", number + 1);
            }
        }
        Ok(())
    }

    /// The requests as one fragment for `KCONFIG_ALLCONFIG`.
    pub(super) fn text(&self) -> String {
        let lines = self.wanted.iter().map(|(symbol, request)| match request.value.as_str() {
            "n" => format!("# {symbol} is not set\n"),
            value => format!("{symbol}={value}\n"),
        });
        lines.collect()
    }

    /// The number of symbols.
    pub(super) fn len(&self) -> usize {
        self.wanted.len()
    }

    /// The requests that a configuration made from these fragments does not meet.
    pub(super) fn unmet(&self, config: &Config) -> Vec<Unmet> {
        self.compare(config, |_| true)
    }

    /// The requests that a kernel of the user does not meet: options with the value `y` that are no preference.
    pub(super) fn lacking(&self, config: &Config) -> Vec<Unmet> {
        self.compare(config, |request| request.value == "y" && !request.preference)
    }

    fn compare(&self, config: &Config, counts: impl Fn(&Request) -> bool) -> Vec<Unmet> {
        let unmet = |(symbol, request): (&String, &Request)| {
            let got = config.get(symbol).map_or("n", String::as_str);
            (got != request.value).then(|| Unmet {
                symbol: symbol.clone(),
                want: request.value.clone(),
                got: got.to_owned(),
                optional: self.optional.contains(symbol),
            })
        };
        self.wanted.iter().filter(|(_, request)| counts(request)).filter_map(unmet).collect()
    }
}

/// A declaration of a symbol.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Declaration {
    depends: Vec<String>,
    prompt: bool,
}

/// Says for each request why a kernel tree, of which `folder` below `arch` is built, did not take it; in the same order.
///
/// # Errors
///
/// The tree's Kconfig files cannot be read.
pub(super) fn reasons(tree: &Path, folder: &str, unmet: &[Unmet], config: &Config) -> Result<Vec<String>> {
    if unmet.is_empty() {
        return Ok(Vec::new());
    }
    let mut declarations = vec![Vec::new(); unmet.len()];
    for path in kconfig_files(tree, folder)? {
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let text = String::from_utf8_lossy(&text);
        for (unmet, declarations) in unmet.iter().zip(&mut declarations) {
            let name = unmet.symbol.strip_prefix("CONFIG_").unwrap_or(&unmet.symbol);
            if text.contains(name) {
                declarations.extend(find_declarations(&text, name));
            }
        }
    }
    Ok(declarations.iter().map(|declarations| explain(declarations, config)).collect())
}

fn explain(declarations: &[Declaration], config: &Config) -> String {
    if declarations.is_empty() {
        return "this kernel has no such option".to_owned();
    }
    if !declarations.iter().any(|declaration| declaration.prompt) {
        return "it cannot be set by hand: some other option selects it".to_owned();
    }
    let mut reasons = Vec::new();
    for depends in declarations.iter().flat_map(|declaration| &declaration.depends) {
        let mut symbols = BTreeMap::new();
        for word in depends.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
            if !matches!(word, "" | "y" | "m" | "n") && !word.starts_with(|c: char| c.is_ascii_lowercase()) {
                symbols.insert(word, config.get(&format!("CONFIG_{word}")).map_or("n", String::as_str));
            }
        }
        let values: Vec<String> = symbols.iter().map(|(symbol, value)| format!("{symbol}={value}")).collect();
        reasons.push(format!("depends on {depends} [{}]", values.join(", ")));
    }
    if reasons.is_empty() {
        "another choice of the same group, or an option that selects it, won".to_owned()
    } else {
        reasons.join("; ")
    }
}

/// The Kconfig files that a build of `folder` below `arch` reads.
fn kconfig_files(tree: &Path, folder: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut dirs = vec![tree.to_owned()];
    while let Some(dir) = dirs.pop() {
        let entries = fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot list {}", dir.display()))?;
            let (path, name) = (entry.path(), entry.file_name());
            let kind = entry.file_type().with_context(|| format!("cannot read {}", path.display()))?;
            if kind.is_dir() {
                let foreign = dir == tree.join("arch") && name != folder;
                let irrelevant =
                    dir == tree && (name == "Documentation" || name == "tools" || name == "scripts");
                if !foreign && !irrelevant {
                    dirs.push(path);
                }
            } else if kind.is_file() && name.to_string_lossy().starts_with("Kconfig") {
                files.push(path);
            }
        }
    }
    Ok(files)
}

/// The declarations of `name` in one Kconfig file, with the `if` and `menu` conditions around each.
fn find_declarations(text: &str, name: &str) -> Vec<Declaration> {
    /// A condition in force: of an `if`, or the lines of a `menu`.
    enum Block {
        If(String),
        Menu(Vec<String>),
    }
    let mut found = Vec::new();
    let mut blocks: Vec<Block> = Vec::new();
    let mut current: Option<Declaration> = None;
    let mut in_menu_head = false;
    let joined = text.replace("\\\n", " ");
    for line in joined.lines() {
        let mut words = line.split_whitespace();
        let (first, rest) = (words.next().unwrap_or_default(), words.collect::<Vec<_>>().join(" "));
        let starts_entry = matches!(
            first,
            "config"
                | "menuconfig"
                | "choice"
                | "endchoice"
                | "if"
                | "endif"
                | "menu"
                | "endmenu"
                | "source"
                | "comment"
        ) && !line.starts_with([' ', '\t']);
        if starts_entry {
            found.extend(current.take());
            in_menu_head = first == "menu";
        }
        match (first, starts_entry) {
            ("config" | "menuconfig", true) if rest == name => {
                let around = blocks.iter().flat_map(|block| match block {
                    Block::If(condition) => vec![condition.clone()],
                    Block::Menu(depends) => depends.clone(),
                });
                current = Some(Declaration { depends: around.collect(), prompt: false });
            }
            ("if", true) => blocks.push(Block::If(rest)),
            ("menu", true) => blocks.push(Block::Menu(Vec::new())),
            ("endif" | "endmenu", true) => drop(blocks.pop()),
            ("depends", false) => {
                let condition = rest.strip_prefix("on ").unwrap_or(&rest).to_owned();
                if let Some(declaration) = &mut current {
                    declaration.depends.push(condition);
                } else if in_menu_head && let Some(Block::Menu(depends)) = blocks.last_mut() {
                    depends.push(condition);
                }
            }
            ("bool" | "tristate" | "int" | "hex" | "string" | "prompt" | "def_bool", false) => {
                if let Some(declaration) = &mut current
                    && rest.starts_with('"')
                {
                    declaration.prompt = true;
                    if let Some((_, condition)) = rest.rsplit_once("\" if ") {
                        declaration.depends.push(condition.to_owned());
                    }
                }
            }
            _ => {}
        }
    }
    found.extend(current);
    found
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
