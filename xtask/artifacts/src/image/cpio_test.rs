use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use super::*;

fn bytes(archive: &Archive) -> Vec<u8> {
    let mut out = Vec::new();
    let written = archive.write(&mut out).expect("write");
    assert_eq!(written.bytes, out.len() as u64);
    out
}

/// Path, mode with type, and content of each entry, as the kernel would read them.
fn read(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
    let whole = archive.len();
    let mut entries = Vec::new();
    loop {
        let (header, rest) = archive.split_at(110);
        assert_eq!(&header[..6], b"070701");
        let field = |index: usize| {
            let digits = std::str::from_utf8(&header[6 + 8 * index..14 + 8 * index]).expect("digits");
            u32::from_str_radix(digits, 16).expect("hexadecimal")
        };
        let (name_length, size) = (field(11) as usize, field(6) as usize);
        let name = std::str::from_utf8(&rest[..name_length - 1]).expect("name").to_owned();
        assert_eq!(rest[name_length - 1], 0);
        let after = |consumed: usize| (whole - rest.len() + consumed).next_multiple_of(4);
        let content = after(name_length) - (whole - rest.len());
        let next = after(content + size) - (whole - rest.len());
        if name == "TRAILER!!!" {
            assert!(rest[content..].iter().all(|&byte| byte == 0) && whole.is_multiple_of(512));
            return entries;
        }
        entries.push((name, field(1), rest[content..content + size].to_vec()));
        archive = &rest[next..];
    }
}

#[test]
fn a_small_archive_has_these_very_bytes() {
    let mut archive = Archive::default();
    archive.file("etc/hi", 0o644, Content::Bytes(b"hello".to_vec())).expect("file");
    archive.device("console", 0o600, 5, 1).expect("device");
    let zero = "00000000";
    let golden = [
        // inode, mode, uid, gid, links, mtime, size, dev, rdev, name length, checksum
        &format!("0707010000000100002180{zero}{zero}00000001{zero}{zero}{zero}{zero}0000000500000001"),
        &format!("00000008{zero}console\0\0\0"),
        &format!("07070100000002000041ED{zero}{zero}00000002{zero}{zero}{zero}{zero}{zero}{zero}"),
        &format!("00000004{zero}etc\0\0\0"),
        &format!("07070100000003000081A4{zero}{zero}00000001{zero}00000005{zero}{zero}{zero}{zero}"),
        &format!("00000007{zero}etc/hi\0\0\0\0hello\0\0\0"),
        &format!("070701{zero}{zero}{zero}{zero}00000001{zero}{zero}{zero}{zero}{zero}{zero}"),
        &format!("0000000B{zero}TRAILER!!!\0\0\0\0"),
    ]
    .map(String::as_str)
    .concat();
    let mut golden = golden.into_bytes();
    golden.resize(golden.len().next_multiple_of(512), 0);
    assert_eq!(String::from_utf8(bytes(&archive)), String::from_utf8(golden));
}

#[test]
fn order_of_adding_does_not_show() {
    let add = |names: [&str; 3]| {
        let mut archive = Archive::default();
        for name in names {
            archive.file(name, 0o600, Content::Bytes(name.as_bytes().to_vec())).expect("file");
        }
        bytes(&archive)
    };
    assert_eq!(add(["b/c", "a", "b-"]), add(["a", "b-", "b/c"]));
}

#[test]
fn trees_keep_permissions_links_and_content_but_no_owner_or_time() {
    let make = || {
        let dir = tempfile::tempdir().expect("directory");
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("bin")).expect("mkdir");
        fs::write(path("bin/tool"), "#!").expect("write");
        fs::set_permissions(path("bin/tool"), fs::Permissions::from_mode(0o4751)).expect("chmod");
        fs::set_permissions(path("bin"), fs::Permissions::from_mode(0o700)).expect("chmod");
        symlink("nowhere/at/all", path("dangling")).expect("symlink");
        symlink("bin", path("sbin")).expect("symlink");
        let mut archive = Archive::default();
        archive.tree(dir.path(), "").expect("tree");
        bytes(&archive)
    };
    let archive = make();
    assert_eq!(archive, make());
    let entries = read(&archive);
    let expected = [
        ("bin", 0o040_700, "".as_bytes()),
        ("bin/tool", 0o104_751, b"#!"),
        ("dangling", 0o120_777, b"nowhere/at/all"),
        ("sbin", 0o120_777, b"bin"),
    ];
    assert_eq!(entries, expected.map(|(name, mode, content)| (name.into(), mode, content.into())));
}

#[test]
fn sockets_and_such_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("directory");
    let _listener = UnixListener::bind(dir.path().join("socket")).expect("socket");
    let error = Archive::default().tree(dir.path(), "").expect_err("a socket");
    assert!(error.to_string().contains("socket is neither"), "{error}");
    let error = Archive::default().tree(&dir.path().join("socket"), "").expect_err("a socket");
    assert!(error.to_string().contains("not a directory"), "{error}");
}

#[test]
fn paths_that_lead_elsewhere_are_refused() {
    let mut archive = Archive::default();
    for path in ["", "/", "a//b", "../x", "a/../b", "./a", "a/", "a\0b"] {
        archive.directory(path, 0o755).expect_err(path);
    }
    archive.file("a", 0o600, Content::Bytes(Vec::new())).expect("file");
    assert!(archive.directory("a/b", 0o755).is_err());
    archive.file("big", 0o600, Content::Disk(DiskImage::zero(1 << 32))).expect("file");
    let error = archive.write(io::sink()).expect_err("too big");
    assert!(format!("{error:#}").contains("/big: 4294967296 bytes"), "{error:#}");
}
