//! The distribution of the host: how it installs packages, and what it calls them.

use std::fs;

/// A distribution, or a family of them.
#[derive(Debug, PartialEq, Eq)]
pub struct HostSystem {
    /// Its names in `ID` and `ID_LIKE` of os-release(5).
    ids: &'static [&'static str],
    /// The command that installs the packages whose names follow, as root.
    install: &'static str,
    /// Packages that are called otherwise than in Debian: Debian's name, its own.
    names: &'static [(&'static str, &'static str)],
}

const SYSTEMS: [HostSystem; 4] = [
    HostSystem {
        ids: &["debian", "ubuntu"],
        install: "sudo apt-get install --no-install-recommends",
        names: &[],
    },
    HostSystem {
        ids: &["fedora", "rhel", "centos"],
        install: "sudo dnf install",
        // Fedora keeps the static library apart.
        names: &[
            ("libc6-dev", "glibc-devel glibc-static"),
            ("libelf-dev", "elfutils-libelf-devel"),
            ("xz-utils", "xz"),
        ],
    },
    HostSystem {
        ids: &["arch"],
        install: "sudo pacman -S --needed",
        names: &[("libc6-dev", "glibc"), ("libelf-dev", "libelf"), ("xz-utils", "xz")],
    },
    HostSystem {
        ids: &["nixos"],
        install: "nix-shell -p",
        names: &[("libc6-dev", "glibc.static"), ("libelf-dev", "elfutils"), ("xz-utils", "xz")],
    },
];

impl HostSystem {
    /// The system of this machine, by /etc/os-release; `None` if it is of no family that is known.
    #[must_use]
    pub fn this() -> Option<&'static Self> {
        Self::of(&fs::read_to_string("/etc/os-release").unwrap_or_default())
    }

    /// The system that an os-release file describes.
    #[must_use]
    pub fn of(os_release: &str) -> Option<&'static Self> {
        let field = |name: &str| {
            let line = os_release.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim_matches('"').split_ascii_whitespace()
        };
        field("ID=")
            .chain(field("ID_LIKE="))
            .find_map(|id| SYSTEMS.iter().find(|system| system.ids.contains(&id)))
    }

    /// The command that installs packages, which are given by Debian's names.
    #[must_use]
    pub fn install_command(&self, packages: &[&str]) -> String {
        let own = |package: &str| {
            let found = self.names.iter().find(|(name, _)| *name == package);
            found.map_or(package, |(_, own)| own).to_owned()
        };
        let names: Vec<_> = packages.iter().map(|package| own(package)).collect();
        format!("{} {}", self.install, names.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_system_installs_with_its_own_command_and_names() {
        let command =
            |os: &str| HostSystem::of(os).expect("known").install_command(&["xz-utils", "libelf-dev", "bc"]);
        assert_eq!(
            command("NAME=Ubuntu\nID=ubuntu\nID_LIKE=debian\n"),
            "sudo apt-get install --no-install-recommends xz-utils libelf-dev bc"
        );
        assert_eq!(command("ID=fedora\n"), "sudo dnf install xz elfutils-libelf-devel bc");
        assert_eq!(command("ID=manjaro\nID_LIKE=arch\n"), "sudo pacman -S --needed xz libelf bc");
        assert_eq!(command("ID=nixos\n"), "nix-shell -p xz elfutils bc");
        assert_eq!(
            command("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n"),
            "sudo dnf install xz elfutils-libelf-devel bc"
        );
        assert_eq!(HostSystem::of("ID=plan9\n"), None);
    }
}
