use super::*;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

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
    assert!(matches!(error, OpenError::Size { got: 513, .. }));
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

/// Returns memory, and the addresses of every second 16 bytes in it.
fn striped(count: usize) -> (GuestMemoryMmap, Vec<GuestAddress>) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), count * 32)]).expect("memory");
    let addresses = (0..count as u64).map(|index| GuestAddress(index * 32)).collect();
    (memory, addresses)
}

#[test]
fn moves_more_pieces_than_one_call_takes() {
    let content: Vec<u8> = (0..64 << 10).map(|index: u32| index.to_le_bytes()[index as usize % 2]).collect();
    let (file, disk) = disk_of(&content, false);
    let (memory, addresses) = striped(2048);
    let slices: Vec<_> = addresses.iter().map(|at| memory.get_slice(*at, 16).expect("slice")).collect();
    disk.read(512, &slices).expect("read");
    for (index, address) in addresses.iter().enumerate() {
        let mut got = [0; 16];
        memory.read_slice(&mut got, *address).expect("memory");
        assert_eq!(got, content[512 + index * 16..][..16], "piece {index}");
    }
    disk.write(0, &slices).expect("write");
    let want = [&content[512..][..32 << 10], &content[32 << 10..]].concat();
    assert_eq!(fs::read(file.path()).expect("file"), want);
}

#[test]
fn a_disk_that_shrank_is_an_error() {
    let (file, disk) = disk_of(&[1; 1024], false);
    file.as_file().set_len(512).expect("shrink");
    let (memory, addresses) = striped(1);
    let slices = [memory.get_slice(addresses[0], 16).expect("slice")];
    assert_eq!(disk.read(512, &slices).expect_err("end").kind(), ErrorKind::UnexpectedEof);
}

#[test]
fn partial_transfers_go_on_where_they_ended() {
    let base = std::ptr::null_mut::<libc::c_void>();
    let piece = |at: usize, len| libc::iovec { iov_base: base.wrapping_byte_add(at), iov_len: len };
    let after = |moved| {
        let mut pieces = [piece(100, 10), piece(200, 0), piece(300, 20)];
        let rest = advance(&mut pieces, moved);
        rest.iter().map(|piece| (piece.iov_base.addr(), piece.iov_len)).collect::<Vec<_>>()
    };
    assert_eq!(after(4), [(104, 6), (200, 0), (300, 20)]);
    assert_eq!(after(10), [(300, 20)]);
    assert_eq!(after(29), [(319, 1)]);
    assert_eq!(after(30), []);
}

#[test]
fn zeroes_reach_the_file_with_and_without_holes() {
    let (file, disk) = disk_of(&[7; 256 << 10], false);
    disk.write_zeroes(512, 100 << 10, false).expect("zeroes");
    disk.write_zeroes(128 << 10, 64 << 10, true).expect("hole");
    let content = fs::read(file.path()).expect("file");
    let zero = |range: std::ops::Range<usize>| content[range].iter().all(|byte| *byte == 0);
    assert!(zero(512..(100 << 10) + 512) && zero(128 << 10..192 << 10));
    assert_eq!(content.iter().filter(|byte| **byte == 7).count(), (256 - 100 - 64) << 10);
}
