use super::*;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use tempfile::NamedTempFile;

/// Returns a disk with `content`, and its file.
pub(in super::super) fn disk_of(content: &[u8], read_only: bool) -> (NamedTempFile, Disk) {
    let mut file = NamedTempFile::new().expect("file");
    file.write_all(content).expect("content");
    let disk = Disk::open(&options(file.path(), read_only)).expect("disk");
    (file, disk)
}

fn options(path: &Path, read_only: bool) -> BlockOptions {
    BlockOptions { read_only, ..BlockOptions::new(path) }
}

/// Returns the error for `path`, and checks that it names the path and the remedy.
fn refused(path: &Path, read_only: bool, remedy: &str) -> OpenError {
    let error = Disk::open(&options(path, read_only)).expect_err("refused");
    let text = error.to_string();
    assert!(text.contains(&format!("{path:?}")) && text.contains(remedy), "{text}");
    error
}

#[test]
fn refuses_what_is_no_disk() {
    let dir = tempfile::tempdir().expect("directory");
    let missing = dir.path().join("missing.img");
    assert!(matches!(refused(&missing, false, "truncate -s 1G"), OpenError::NotFound { .. }));
    assert!(matches!(refused(dir.path(), true, "name a disk image"), OpenError::Directory { .. }));
    assert!(matches!(refused(Path::new("/dev/null"), false, "neither"), OpenError::Kind { .. }));
    let empty = NamedTempFile::new().expect("file");
    assert!(matches!(refused(empty.path(), false, "give it a size"), OpenError::Empty { .. }));
}

#[test]
fn refuses_part_of_a_sector() {
    let mut file = NamedTempFile::new().expect("file");
    file.write_all(&[1; 513]).expect("content");
    let error = refused(file.path(), false, "`truncate -s 1024 ");
    assert!(matches!(error, OpenError::Size { got: 513, block: 512, .. }));
}

#[test]
fn a_pipe_is_refused_rather_than_waited_for() {
    let dir = tempfile::tempdir().expect("directory");
    let pipe = dir.path().join("pipe");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).expect("pipe");
    assert!(matches!(refused(&pipe, true, "neither"), OpenError::Kind { .. }));
}

#[test]
fn names_the_access_that_is_denied() {
    let (file, disk) = disk_of(&[0; 512], true);
    drop(disk);
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o000)).expect("mode");
    // The superuser may open anything, so only the error's text can be checked then.
    let error = if rustix::process::geteuid().is_root() {
        OpenError::Permission { path: file.path().to_owned(), access: "writing" }
    } else {
        Disk::open(&options(file.path(), false)).expect_err("denied")
    };
    assert!(error.to_string().ends_with("for writing: change its mode or owner, or serve it read-only"));
}

#[test]
fn serial_numbers_fit() {
    let name = |path: &str, serial: Option<&str>| {
        let options = BlockOptions { serial: serial.map(str::to_owned), ..options(Path::new(path), false) };
        super::serial(&options).map(|serial| String::from_utf8_lossy(&serial).into_owned())
    };
    let fitting = |path, serial| name(path, serial).expect("serial").trim_end_matches('\0').to_owned();
    assert_eq!(fitting("/images/disk.img", None), "disk.img");
    assert_eq!(fitting("a-very-long-name-of-a-disk.img", None), "a-very-long-name-of-");
    assert_eq!(fitting("/images/дÿ", None), "vvu");
    assert_eq!(fitting("x", Some("12345678901234567890")), "12345678901234567890");
    for bad in ["", "123456789012345678901", "new\nline", "ö"] {
        assert!(matches!(name("x", Some(bad)), Err(OpenError::Serial { .. })), "{bad:?}");
    }
}
