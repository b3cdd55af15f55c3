use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::anyhow;

use super::host::{Host, Place};
use super::*;
use vvu_artifacts::accel::{Accelerator, Kind};
use vvu_artifacts::cache::Surveyed;
use vvu_artifacts::host_system::HostSystem;
use vvu_artifacts::packages::Brings;

/// A program that answers every question with `text`.
fn program(dir: &Path, name: &str, text: &str) {
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\necho '{text}'\n")).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("made executable");
}

/// A machine that has everything, in `dir`.
fn ready(dir: &Path) -> Host {
    let bin = dir.join("bin");
    fs::create_dir_all(&bin).expect("made");
    for package in kernel::PACKAGES {
        match package.brings {
            Brings::Program(name) => program(&bin, name, ""),
            Brings::File(path) => {
                let path = dir.join(path.trim_start_matches('/'));
                fs::create_dir_all(path.parent().expect("has one")).expect("made");
                fs::write(path, "").expect("written");
            }
        }
    }
    let lib = dir.join("libc.a");
    fs::write(&lib, "").expect("written");
    program(&bin, "cc", &lib.display().to_string());
    program(&bin, "cargo-nextest", "cargo-nextest 0.9.143");
    program(&bin, "apt-get", "");
    program(&bin, "rustup", "");
    program(&bin, "qemu-system-x86_64", "QEMU emulator version 11.1.3");
    let rustc =
        format!("#!/bin/sh\n[ $1 = --version ] && echo 'rustc 1.95.0 (x)' || echo {}\n", dir.display());
    fs::write(bin.join("rustc"), rustc).expect("written");
    fs::set_permissions(bin.join("rustc"), fs::Permissions::from_mode(0o755)).expect("made executable");
    let entry = |kind: &str| Surveyed { kind: kind.to_owned(), files: dir.join(kind), damage: None };
    let content = vec![entry("kernel"), entry("guest-tools")];
    let reason = "KVM runs kernel code at 1.00 of the host's speed".to_owned();
    Host {
        programs: vec![bin],
        root: dir.to_owned(),
        arch: "x86_64",
        system: None,
        installs: true,
        free_mib: Ok(8192),
        accelerator: Ok(Accelerator { kind: Kind::Kvm, reason, evidence: None }),
        kvm_opens: Some(true),
        memfd: Ok(()),
        low_limits: Vec::new(),
        cache: Place { path: dir.join("cache"), writable: true, free_mib: 8192, content },
        runs: Place { path: dir.join("runs"), writable: true, free_mib: 8192, content: () },
    }
}

/// The requirements that are not met: the id and status of each.
fn unmet(host: &Host) -> Vec<(String, Status)> {
    let unmet = checks::all(host).into_iter().filter(|requirement| requirement.status != Status::Ok);
    unmet
        .map(|requirement| {
            assert!(!requirement.evidence.is_empty() && requirement.consequence.is_some(), "{requirement:?}");
            (requirement.id, requirement.status)
        })
        .collect()
}

fn remove(host: &Host, name: &str) {
    fs::remove_file(host.program(name).expect("there")).expect("removed");
}

#[test]
fn a_machine_with_everything_is_ready() {
    let dir = tempfile::tempdir().expect("a directory");
    let host = ready(dir.path());
    assert_eq!(unmet(&host), []);
    let all = checks::all(&host);
    let text = text(&all, Status::Ok);
    assert!(text.ends_with("\nready\n") && text.lines().count() == all.len() + 1, "{text}");
}

#[test]
fn each_program_that_is_missing_is_named_alone() {
    for (name, id, status) in [
        ("flex", "package-flex", Status::Unfinished),
        ("bison", "package-bison", Status::Unfinished),
        ("cargo-nextest", "nextest", Status::Worse),
        ("qemu-system-x86_64", "qemu", Status::Unfinished),
        ("apt-get", "apt", Status::Worse),
        ("cc", "libc-static", Status::Unfinished),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let host = ready(dir.path());
        remove(&host, name);
        assert_eq!(unmet(&host), [(id.to_owned(), status)], "{name}");
    }
    let dir = tempfile::tempdir().expect("a directory");
    let host = ready(dir.path());
    fs::remove_file(dir.path().join("usr/include/gelf.h")).expect("removed");
    assert_eq!(unmet(&host), [("package-libelf-dev".to_owned(), Status::Unfinished)]);
}

#[test]
fn each_fact_that_is_wrong_is_named_alone() {
    type Break = fn(&mut Host);
    let cases: [(&str, Status, Break); 13] = [
        ("machine", Status::Missing, |host| host.arch = "aarch64"),
        ("memory", Status::Missing, |host| host.free_mib = Ok(1000)),
        ("memory", Status::Missing, |host| host.free_mib = Err(anyhow!("no /proc"))),
        ("shared-memory", Status::Missing, |host| host.memfd = Err(anyhow!("EPERM"))),
        ("limits", Status::Missing, |host| host.low_limits = vec!["open files: 64".to_owned()]),
        ("kvm-permission", Status::Worse, |host| host.kvm_opens = Some(false)),
        ("accelerator", Status::Worse, |host| host.accelerator = Err(anyhow!("no probe"))),
        ("cache", Status::Unfinished, |host| {
            let damage = Some("its manifest is missing".to_owned());
            let files = PathBuf::from("/c/qemu");
            host.cache.content.push(Surveyed { kind: "qemu".to_owned(), files, damage });
        }),
        ("kernel", Status::Unfinished, |host| host.cache.content.retain(|entry| entry.kind != "kernel")),
        ("guest-tools", Status::Unfinished, |host| {
            host.cache.content.retain(|entry| entry.kind != "guest-tools");
        }),
        ("cache-room", Status::Missing, |host| host.cache.free_mib = 1023),
        ("run-room", Status::Missing, |host| host.runs.free_mib = 1023),
        ("run-room", Status::Missing, |host| host.runs.writable = false),
    ];
    for (id, status, spoil) in cases {
        let dir = tempfile::tempdir().expect("a directory");
        let mut host = ready(dir.path());
        spoil(&mut host);
        assert_eq!(unmet(&host), [(id.to_owned(), status)]);
    }
}

#[test]
fn what_nobody_can_install_is_left_to_a_person() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut host = ready(dir.path());
    host.installs = false;
    remove(&host, "bc");
    let fix = |host: &Host| {
        let all = checks::all(host);
        let found = all.into_iter().find(|requirement| requirement.id == "package-bc").expect("listed");
        (found.status, found.fix.expect("a remedy"))
    };
    let command = "sudo apt-get install --no-install-recommends bc".to_owned();
    assert_eq!(fix(&host), (Status::Missing, command));
    remove(&host, "apt-get");
    let by_name = "install the package that your distribution has for bc".to_owned();
    assert_eq!(fix(&host), (Status::Missing, by_name));
    host.system = HostSystem::of("ID=fedora\n");
    assert_eq!(fix(&host), (Status::Missing, "sudo dnf install bc".to_owned()));
    let all = checks::all(&host);
    let apt = all.iter().find(|requirement| requirement.id == "apt").expect("listed");
    let remedy = apt.fix.as_deref().expect("a remedy");
    assert!(
        remedy.starts_with("sudo dnf install apt dpkg debian-archive-keyring; then VVU_DEBIAN_MIRROR"),
        "{remedy}"
    );
}

#[test]
fn an_old_rust_and_an_old_qemu_are_told_with_their_versions() {
    let dir = tempfile::tempdir().expect("a directory");
    let host = ready(dir.path());
    program(&dir.path().join("bin"), "rustc", "rustc 1.9.0");
    let qemu = "#!/bin/sh\n[ $1 = --version ] && echo 'QEMU emulator version 7.2.0' && exit\nexit 1\n";
    fs::write(dir.path().join("bin/qemu-system-x86_64"), qemu).expect("written");
    let evidence = |id: &str| {
        let all = checks::all(&host);
        all.into_iter().find(|requirement| requirement.id == id).expect("listed").evidence
    };
    assert!(evidence("rust").starts_with("rustc 1.9.0, want 1."), "{}", evidence("rust"));
    let qemu = evidence("qemu");
    assert!(qemu.contains("7.2.0") && qemu.contains("no vfio-user-pci"), "{qemu}");
}

#[test]
fn nothing_at_all_is_told_without_a_failure() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut host = ready(dir.path());
    host.programs = Vec::new();
    host.root = dir.path().join("nowhere");
    host.installs = false;
    host.cache.content.clear();
    let unmet = unmet(&host);
    for id in ["rust", "rust-target", "nextest", "libc-static", "apt", "qemu", "kernel", "guest-tools"] {
        assert!(unmet.iter().any(|(found, _)| found == id), "{id}: {unmet:?}");
    }
    let packages = unmet.iter().filter(|(id, _)| id.starts_with("package-")).count();
    assert_eq!(packages, kernel::PACKAGES.len());
}
