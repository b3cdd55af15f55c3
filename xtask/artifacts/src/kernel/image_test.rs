use super::*;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("x");
    fs::write(&path, bytes).expect("written");
    Command::new("gzip").arg("-c").arg(&path).output().expect("gzip runs").stdout
}

/// An ELF file with one program header for the note given, followed by `rest`.
fn elf(name: &[u8; 4], kind: u32, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 64 + 56];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[18] = 62;
    bytes[32] = 64;
    bytes[54] = 56;
    bytes[56] = 1;
    bytes[64] = 4;
    bytes[72] = 120;
    bytes[96] = 2 * 12 + 4 + 8 + 4 + 4;
    // A note to step over, then the one asked for.
    for (name, kind, desc) in [(b"GNU\0", 1, &[0; 8][..]), (name, kind, &[0; 4])] {
        for word in [4, u32::try_from(desc.len()).expect("small"), kind] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(name);
        bytes.extend(desc);
    }
    bytes.extend(rest);
    bytes
}

fn kernel() -> Vec<u8> {
    let mut rest = b"Linux version %s\0Linux version 6.1.2-vvu (a@b) #1\n\0".to_vec();
    rest.extend(b"IKCFG_ST");
    rest.extend(gzip(b"CONFIG_PVH=y\n# CONFIG_X is not set\n"));
    rest.extend(b"IKCFG_ED tail");
    rest
}

fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 0x400];
    bytes[0x1f1] = 1;
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    let length = u32::try_from(payload.len()).expect("small");
    bytes[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
    bytes.extend(payload);
    bytes
}

#[test]
fn a_vmlinux_tells_version_and_config() {
    let image = inspect_pvh(&elf(b"Xen\0", PHYS32_ENTRY, &kernel())).expect("good");
    assert_eq!(image.version, "6.1.2-vvu");
    let config = image.config.expect("embedded");
    assert_eq!(config.get("CONFIG_PVH").map(String::as_str), Some("y"));
    assert_eq!(config.len(), 1);
}

#[test]
fn an_arm64_image_is_recognised_by_its_magic_number() {
    let mut bytes = vec![0; 64];
    bytes.extend(kernel());
    inspect_bytes(&bytes, KernelFormat::Arm64Image).expect_err("no magic number");
    bytes[56..60].copy_from_slice(b"ARM\x64");
    let image = inspect_bytes(&bytes, KernelFormat::Arm64Image).expect("good");
    assert_eq!((image.version.as_str(), image.config.is_some()), ("6.1.2-vvu", true));
    inspect_bytes(&bytes, KernelFormat::Pvh).expect_err("of another machine");
}

#[test]
fn a_bzimage_is_unpacked_first() {
    let mut payload = gzip(&elf(b"Xen\0", PHYS32_ENTRY, &kernel()));
    payload.extend(1234_u32.to_le_bytes());
    let image = inspect_pvh(&bzimage(&payload)).expect("good");
    assert!(image.config.is_some());
    let error = inspect_pvh(&bzimage(b"what?")).expect_err("unknown").to_string();
    assert!(error.contains("give the vmlinux"), "{error}");
}

#[test]
fn pvh_needs_the_very_note() {
    assert!(has_pvh_note(&elf(b"Xen\0", PHYS32_ENTRY, b"")));
    assert!(!has_pvh_note(&elf(b"Xen\0", 17, b"")));
    assert!(!has_pvh_note(&elf(b"GNU\0", PHYS32_ENTRY, b"")));
    let error = inspect_pvh(&elf(b"Xen\0", 17, &kernel())).expect_err("refused").to_string();
    assert!(error.contains("CONFIG_PVH=y"), "{error}");
}

#[test]
fn cut_and_odd_files_are_refused_without_a_panic() {
    let whole = elf(b"Xen\0", PHYS32_ENTRY, b"");
    for end in 0..whole.len() {
        let mut cut = whole[..end].to_vec();
        assert!(!has_pvh_note(&cut) || end >= whole.len() - 4);
        // Sizes that point past the end.
        cut.extend([0xff; 16]);
        inspect_pvh(&cut).expect_err("no kernel in it");
    }
    inspect_pvh(b"").expect_err("empty");
}

#[test]
fn the_config_may_lie_beside() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("vmlinux");
    fs::write(&path, elf(b"Xen\0", PHYS32_ENTRY, b"Linux version 5.10.1 (x)\n")).expect("written");
    assert_eq!(inspect(&path, KernelFormat::Pvh).expect("good").config, None);
    fs::write(dir.path().join("config-5.10.1"), "CONFIG_A=y\n").expect("written");
    assert_eq!(inspect(&path, KernelFormat::Pvh).expect("good").config.expect("beside").len(), 1);
}
