//! An executable of the host that VMs get, with the libraries that it needs.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::programs::{copy, create_parent, libraries};

/// Where the program and its libraries are in the guest: apart from those of other programs, which may come from
/// another release of the distribution.
const FOLDER: &str = "opt";

/// Copies the executable `file` into the tree `root`, as a command of the same name. A program that is linked dynamically
/// gets its own loader and libraries.
///
/// # Errors
///
/// The file is no executable of this machine, or one of its libraries is missing.
pub fn add_own_program(file: &Path, root: &Path) -> Result<()> {
    let named = || format!("--program {}", file.display());
    let name = file.file_name().and_then(OsStr::to_str).filter(|name| is_plain(name));
    let name = name.with_context(|| {
        format!("{}: want a name of letters, digits, `-`, `_`, `.` and `+`, as a command has", named())
    })?;
    let is_executable = fs::metadata(file).with_context(named)?.permissions().mode() & 0o111 != 0;
    ensure!(is_executable, "{}: want an executable file; `chmod +x` makes it one", named());
    let command = root.join("usr/bin").join(name);
    let Some(Linkage { loader, libraries }) = Linkage::of(file).with_context(named)? else {
        return copy(file, &command);
    };
    let place = format!("{FOLDER}/{name}");
    let folder = root.join(&place);
    copy(file, &folder.join(name))?;
    copy(&loader, &folder.join("lib/loader"))?;
    for (library, path) in &libraries {
        copy(path, &folder.join("lib").join(library))?;
    }
    let script = format!(
        "#!/bin/sh\nexec /{place}/lib/loader --library-path /{place}/lib --argv0 {name} /{place}/{name} \"$@\"\n"
    );
    create_parent(&command)?;
    fs::write(&command, script)
        .and_then(|()| fs::set_permissions(&command, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("cannot write {}", command.display()))
}

/// What a dynamically linked program needs.
#[derive(Debug, PartialEq, Eq)]
struct Linkage {
    loader: PathBuf,
    /// Name and path of each library.
    libraries: Vec<(String, PathBuf)>,
}

impl Linkage {
    /// Asks the C library's `ldd`; `None` if the program is linked statically.
    fn of(program: &Path) -> Result<Option<Self>> {
        let program = program.canonicalize()?;
        let output = Command::new("ldd")
            .env("LC_ALL", "C")
            .arg(&program)
            .output()
            .context("cannot run `ldd`, which belongs to the C library")?;
        let (list, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let is_static =
            |text: &str| text.contains("statically linked") || text.contains("not a dynamic executable");
        if is_static(&list) || is_static(&errors) {
            return Ok(None);
        }
        ensure!(output.status.success(), "ldd: {}", errors.trim());
        Self::parse(&list).map(Some)
    }

    fn parse(list: &str) -> Result<Self> {
        let found = libraries(list)?.into_iter();
        let libraries = found.map(|(name, path)| (name.to_owned(), PathBuf::from(path))).collect();
        // Only the loader is listed by its path, with or without an arrow behind it.
        let mut paths = list.lines().filter_map(|line| line.split_whitespace().next());
        match paths.find(|path| path.starts_with('/')) {
            Some(loader) => Ok(Self { loader: loader.into(), libraries }),
            None => bail!("ldd names no loader: {}", list.trim()),
        }
    }
}

fn is_plain(name: &str) -> bool {
    !name.starts_with(['.', '-'])
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_and_the_libraries_are_told_apart() {
        let list = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/m/libc.so.6 (0x2)\n\t/lib64/ld-linux-x86-64.so.2 (0x3)\n";
        let libraries = vec![("libc.so.6".to_owned(), PathBuf::from("/lib/m/libc.so.6"))];
        let want = Linkage { loader: "/lib64/ld-linux-x86-64.so.2".into(), libraries };
        assert_eq!(Linkage::parse(list).expect("complete"), want);
        let error = Linkage::parse("\tlibx.so => not found\n").expect_err("missing").to_string();
        assert!(error.contains("libx.so"), "{error}");
    }

    #[test]
    fn a_program_runs_from_its_own_folder() {
        let root = tempfile::tempdir().expect("directory");
        let program = std::env::current_exe().expect("this program");
        let name = program.file_name().expect("a name").to_str().expect("plain");
        add_own_program(&program, root.path()).expect("this program is one");
        let command = root.path().join("usr/bin").join(name);
        let script = fs::read_to_string(&command).expect("linked dynamically");
        // The guest's root is the host's directory here.
        let here = script.replace(&format!("/{FOLDER}/"), &format!("{}/{FOLDER}/", root.path().display()));
        fs::write(&command, here).expect("write");
        let listed = Command::new(&command).arg("--list").output().expect("run");
        assert!(
            String::from_utf8_lossy(&listed.stdout).contains("a_program_runs_from_its_own_folder"),
            "{listed:?}"
        );
    }

    #[test]
    fn what_is_no_program_is_named() {
        let directory = tempfile::tempdir().expect("directory");
        let text = directory.path().join("notes.txt");
        fs::write(&text, "no program").expect("write");
        let error = format!("{:#}", add_own_program(&text, directory.path()).expect_err("no program"));
        assert!(error.contains("notes.txt") && error.contains("executable"), "{error}");
        let missing = directory.path().join("missing");
        let error = format!("{:#}", add_own_program(&missing, directory.path()).expect_err("missing"));
        assert!(error.contains("missing") && error.contains("No such file"), "{error}");
        let odd = directory.path().join("a b");
        let error = format!("{:#}", add_own_program(&odd, directory.path()).expect_err("odd"));
        assert!(error.contains("want a name"), "{error}");
    }
}
