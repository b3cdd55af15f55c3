//! Where packages come from: the indexes of the machine's own apt, or a Debian mirror that the user names.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::{Suites, capture};

/// The variable that names a Debian mirror for a machine whose apt has none.
const MIRROR: &str = "VVU_DEBIAN_MIRROR";
/// The suite of such a mirror that stands for the machine's own.
const MIRROR_SUITE: &str = "trixie";
/// Debian's keys, by the names the package debian-archive-keyring gave them over time.
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.pgp", "/usr/share/keyrings/debian-archive-keyring.gpg"];

/// One configured package index of the machine.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Index {
    uri: String,
    release: String,
    component: String,
    /// The file with the keys that may sign it; `None` for the keys that apt trusts for everything.
    keyring: Option<String>,
}

/// The package indexes that `suites` can come from.
///
/// # Errors
///
/// Neither the machine's apt nor the user has a mirror, or the user's cannot be used.
pub(super) fn find(suites: Suites<'_>) -> Result<BTreeSet<Index>> {
    of_machine(suites).or_else(|error| match std::env::var(MIRROR) {
        Ok(mirror) => of_mirror(&mirror, KEYRINGS.into_iter().find(|path| Path::new(path).is_file())),
        Err(_) => Err(error),
    })
}

/// The one index of a mirror that the user names. Debian's keys have to be there: apt would trust any key that it has.
fn of_mirror(mirror: &str, keyring: Option<&str>) -> Result<BTreeSet<Index>> {
    let plain = |character: char| character.is_ascii_graphic() && !"[]#".contains(character);
    let schemes = ["http://", "https://", "file:/"];
    ensure!(
        schemes.iter().any(|scheme| mirror.starts_with(scheme)) && mirror.chars().all(plain),
        "{MIRROR}: {mirror:?} is no address of a mirror: want one that begins with {}",
        schemes.join(", ")
    );
    let keyring = keyring.with_context(|| {
        format!("{MIRROR}: Debian's keys are not in {}: install debian-archive-keyring", KEYRINGS[0])
    })?;
    let index = Index {
        uri: mirror.to_owned(),
        release: MIRROR_SUITE.to_owned(),
        component: "main".to_owned(),
        keyring: Some(keyring.to_owned()),
    };
    Ok([index].into())
}

/// The package indexes of the machine's apt that `suites` can come from: those of Debian, or of a derivative of Debian
/// if the machine's own suites will do.
fn of_machine(suites: Suites<'_>) -> Result<BTreeSet<Index>> {
    const FORMAT: &str = "$(ORIGIN)|$(CREATED_BY)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(SIGNED_BY)";
    let known = capture(Command::new("apt-get").args(["indextargets", "--format", FORMAT]))?;
    let indexes = parse_indexes(&known, |origin, _| origin == "Debian");
    if !indexes.is_empty() {
        return Ok(signed_by_debian(indexes));
    }
    let all =
        capture(Command::new("apt-get").args(["indextargets", "--no-release-info", "--format", FORMAT]))?;
    let os = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    without_release_info(suites, &all, &os)
}

/// The same from indexes of which nothing is known but their configuration: the lists were never fetched, or removed to
/// save space, or the machine runs a derivative of Debian.
fn without_release_info(suites: Suites<'_>, indexes: &str, os_release: &str) -> Result<BTreeSet<Index>> {
    let field = |name: &str| {
        let line = os_release.lines().find_map(|line| line.strip_prefix(name));
        line.map(|text| text.trim_matches('"'))
    };
    if field("ID=") == Some("debian") {
        let codename = field("VERSION_CODENAME=").unwrap_or("stable");
        let releases = [codename, "stable", "oldstable", "testing"];
        let indexes = parse_indexes(indexes, |_, index| {
            let release = index.release.split(['-', '/']).next().unwrap_or_default();
            releases.contains(&release) && index.component == "main"
        });
        if !indexes.is_empty() {
            return Ok(signed_by_debian(indexes));
        }
    } else if !matches!(suites, Suites::Named(_)) {
        let indexes = parse_indexes(indexes, |_, _| true);
        if !indexes.is_empty() {
            return Ok(indexes);
        }
    }
    let what = match suites {
        Suites::Named(names) => format!("packages of {}", names.join(" and ")),
        Suites::Machine | Suites::MachineSources => "packages".to_owned(),
    };
    bail!(
        "this machine's apt has no Debian mirror configured, so {what} cannot be downloaded: {MIRROR} names one, such as \
         the address of your country's; or --qemu FILE replaces QEMU's, --kernel FILE or --kernel-source DIR the kernel's"
    )
}

/// `indexes` with Debian's keys.
fn signed_by_debian(indexes: BTreeSet<Index>) -> BTreeSet<Index> {
    let keyring = KEYRINGS.into_iter().find(|path| Path::new(path).is_file()).map(str::to_owned);
    indexes.into_iter().map(|index| Index { keyring: keyring.clone(), ..index }).collect()
}

fn parse_indexes(text: &str, is_wanted: impl Fn(&str, &Index) -> bool) -> BTreeSet<Index> {
    text.lines()
        .filter_map(|line| {
            let [origin, "Packages", uri, release, component, keyring] =
                line.split('|').collect::<Vec<_>>()[..]
            else {
                return None;
            };
            let index = Index {
                uri: uri.to_owned(),
                release: release.to_owned(),
                component: component.to_owned(),
                // apt prints the variable's name for an index without one.
                keyring: keyring.starts_with('/').then(|| keyring.to_owned()),
            };
            is_wanted(origin, &index).then_some(index)
        })
        .collect()
}

/// The lines of sources.list.
pub(super) fn sources(suites: Suites<'_>, indexes: &BTreeSet<Index>) -> Result<String> {
    let mut text = String::new();
    let mut line = |kind: &str, index: &Index, release: &str| {
        let options = index.keyring.as_ref().map_or(String::new(), |path| format!("[signed-by={path}] "));
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{kind} {options}{} {release} {}", index.uri, index.component);
    };
    match suites {
        Suites::Machine | Suites::MachineSources => {
            for index in indexes {
                line("deb", index, &index.release);
                if matches!(suites, Suites::MachineSources) {
                    line("deb-src", index, &index.release);
                }
            }
        }
        Suites::Named(names) => {
            let archive = indexes
                .iter()
                .find(|index| index.component == "main" && !index.release.contains("security"))
                .context("this machine's apt is configured for Debian's security updates only")?;
            for name in names {
                line("deb", archive, name);
            }
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGETS: &str = "\
Debian|Packages|http://mirror.example/debian/|bookworm|main|/etc/keys
Debian|DEP-11|http://mirror.example/debian/|bookworm|main|/etc/keys
Debian|Packages|http://mirror.example/debian-security/|bookworm-security|main|$(SIGNED_BY)
Other|Packages|http://other.example/|bookworm|main|$(SIGNED_BY)
";

    #[test]
    fn only_debian_package_indexes_count() {
        let indexes = parse_indexes(TARGETS, |origin, _| origin == "Debian");
        let releases: Vec<&str> = indexes.iter().map(|index| index.release.as_str()).collect();
        assert_eq!(releases, ["bookworm-security", "bookworm"]);
    }

    #[test]
    fn sources_come_from_the_machines_mirror() {
        let indexes = parse_indexes(TARGETS, |origin, _| origin == "Debian");
        let named = sources(Suites::Named(&["trixie", "trixie-backports"]), &indexes).expect("has a mirror");
        assert_eq!(named.lines().count(), 2);
        assert!(named.contains("http://mirror.example/debian/ trixie main\n"), "{named}");
        assert!(!named.contains("security") && !named.contains("trusted"), "{named}");
        let own = sources(Suites::MachineSources, &indexes).expect("has a mirror");
        assert_eq!(own.lines().filter(|line| line.starts_with("deb-src ")).count(), 2);
        let security = indexes.into_iter().filter(|index| index.release.contains("security")).collect();
        sources(Suites::Named(&["trixie"]), &security).expect_err("no archive");
    }

    #[test]
    fn a_derivative_of_debian_has_its_own_suites_and_no_others() {
        let all = "$(ORIGIN)|Packages|http://u.example/|noble|main|/k\n$(ORIGIN)|Packages|http://u.example/|noble|universe|/k\n";
        let os = "NAME=Ubuntu\nID=ubuntu\nID_LIKE=debian\n";
        let indexes = without_release_info(Suites::MachineSources, all, os).expect("has a mirror");
        let own = sources(Suites::MachineSources, &indexes).expect("has a mirror");
        assert!(own.contains("deb-src [signed-by=/k] http://u.example/ noble universe\n"), "{own}");
        let named = without_release_info(Suites::Named(&["trixie"]), all, os).expect_err("not Debian's");
        let named = named.to_string();
        for want in
            ["no Debian mirror", "packages of trixie", "--qemu FILE", "--kernel FILE", "--kernel-source DIR"]
        {
            assert!(named.contains(want), "{named}");
        }
        without_release_info(Suites::Machine, "", os).expect_err("no mirror at all");
        // Debian itself, whose lists were never fetched.
        let os = "ID=debian\nVERSION_CODENAME=bookworm\n";
        let all = TARGETS.replace("Debian", "$(ORIGIN)").replace("|bookworm|main|$", "|sid|main|$");
        assert_eq!(
            without_release_info(Suites::Named(&["trixie"]), &all, os).expect("has a mirror").len(),
            2
        );
    }

    #[test]
    fn a_mirror_that_the_user_names_is_taken_with_debians_keys_only() {
        let indexes = of_mirror("https://m.example/debian", Some("/k.gpg")).expect("a mirror");
        let named = sources(Suites::Named(&["sid"]), &indexes).expect("has a mirror");
        assert_eq!(named, "deb [signed-by=/k.gpg] https://m.example/debian sid main\n");
        let own = sources(Suites::MachineSources, &indexes).expect("has a mirror");
        assert!(own.contains("deb-src [signed-by=/k.gpg] https://m.example/debian trixie main\n"), "{own}");
        let refused = |mirror: &str, keyring| of_mirror(mirror, keyring).expect_err("refused").to_string();
        assert!(refused("https://m.example", None).contains("install debian-archive-keyring"));
        for mirror in ["", "m.example", "https://m.example/ x", "https://m.example/[trusted=yes]"] {
            assert!(refused(mirror, Some("/k")).contains("is no address of a mirror"), "{mirror}");
        }
    }
}
